"""Checks on resuming: what must not change, and what changes the last bits of the results."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llamalet.config import ModelConfig
from llamalet.errors import ConfigError
from llamalet.shards import Shards
from training.config import BEFORE_THE_OPTION, TrainConfig
from training.run.checkpoint import Checkpoint
from training.run.run_state import RunState, backend_of

STREAM = ("total_batch_tokens", "seed", "align_documents", "random_starts", "data")
"""The settings that decide the stream of training tokens."""


def check(resumed: Checkpoint, config: TrainConfig, model_config: ModelConfig, data: Shards) -> None:
    """Refuse to resume with another shape, optimizer or vocabulary.

    Raises:
        ConfigError: listing what differs.
    """
    old, new = resumed.model_config.to_dict(), model_config.to_dict()
    problems = [f"{key}={new[key]}: the checkpoint has {old[key]}" for key in old if old[key] != new[key]]
    optimizer = resumed.state.train_config["optimizer"]
    if config.optimizer != optimizer:
        problems.append(f"optimizer={config.optimizer}: the checkpoint has {optimizer}'s state")
    if resumed.state.tokenizer_sha256 != data.tokenizer_sha256:
        problems.append(f"{data.folder}: its vocabulary is not that of {resumed.state.data}, which the run used")
    ConfigError.raise_for(problems)


def changes(state: RunState, config: TrainConfig, machine: Mapping[str, Any]) -> list[str]:
    """Describe each difference to the run that saved `state` that changes the last bits of what follows."""
    settings, saved = dataclasses.asdict(config), BEFORE_THE_OPTION | state.train_config
    now = {name: settings[name] for name in STREAM}
    then = {name: settings[name] if saved[name] is None else saved[name] for name in STREAM}
    if state.step:  # otherwise nothing has been computed yet
        now, then = ({"backend": backend_of(m), **m, **more} for m, more in ((machine, now), (state.machine, then)))
    return [f"{key} {then[key]} before, {now[key]} now" for key in now if key in then and then[key] != now[key]]
