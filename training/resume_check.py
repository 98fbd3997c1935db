"""Whether a resumed run is the one that was stopped: what must not change, and what changes its last bits."""

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

import torch

from llamalet.config import ModelConfig
from llamalet.errors import ConfigError
from llamalet.shards import Shards
from training.config import TrainConfig
from training.machine.distributed import Processes
from training.run.checkpoint import Checkpoint

STREAM = ("total_batch_tokens", "seed", "align_documents", "data")
"""The settings that the stream of tokens follows from."""


def check(resumed: Checkpoint, config: TrainConfig, model_config: ModelConfig, data: Shards) -> None:
    """Refuse to go on with another shape, optimizer or vocabulary.

    Raises:
        ConfigError: listing what differs.
    """
    old, new = resumed.model_config.to_dict(), model_config.to_dict()
    problems = [f"{key}={new[key]}: the checkpoint has {old[key]}" for key in old if old[key] != new[key]]
    optimizer = resumed.state["train_config"]["optimizer"]
    if config.optimizer != optimizer:
        problems.append(f"optimizer={config.optimizer}: the checkpoint has {optimizer}'s state")
    if resumed.state["tokenizer_sha256"] != data.tokenizer_sha256:
        problems.append(f"{data.folder}: its vocabulary is not that of {resumed.state['data']}, which the run used")
    if problems:
        raise ConfigError.from_problems(problems)


def machine(config: TrainConfig, group: Processes, dtype: torch.dtype, *, compiled: bool) -> dict[str, Any]:
    """Return what, beside the settings of the stream, decides the last bits of a result."""
    return {
        "torch": torch.__version__,
        "device": group.device.type,
        "processor": torch.cuda.get_device_name() if group.device.type == "cuda" else platform.machine(),
        "processes": group.count,
        "parallel": config.parallel,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": compiled,
    }


def changes(state: Mapping[str, Any], config: TrainConfig, machine: Mapping[str, Any]) -> list[str]:
    """Return what differs from when a checkpoint's `state` was saved, and changes the last bits of what follows."""
    settings = dataclasses.asdict(config)
    now = {name: settings[name] for name in STREAM}
    then = {name: state["train_config"][name] or settings[name] for name in STREAM}
    if state["step"]:  # otherwise nothing has been computed yet
        now, then = {**machine, **now}, {**state.get("machine", {}), **then}
    return [f"{key} {then[key]} before, {now[key]} now" for key in now if key in then and then[key] != now[key]]
