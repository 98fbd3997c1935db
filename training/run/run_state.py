"""What a checkpoint records of its run besides tensors: the contents of state.json."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from llamalet.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The state of a run after `step`; the fields are the keys of state.json, in their order."""

    step: int
    """Optimizer steps done."""
    val_loss: float | None
    """Validation loss in nats per token; None if it was not measured at this step."""
    guard: list[float] | None = None
    """`Guard.state()`; None in checkpoints older than the guard."""
    tokenizer_sha256: str
    """Digest of the vocabulary."""
    data: str
    """Folder of the prepared data."""
    train_config: dict[str, Any]
    """The run's TrainConfig as JSON types; older checkpoints lack newer options."""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    """`training.machine.hardware.machine_facts`; empty in the oldest checkpoints."""
    launch: str | None = None
    """Identifies the torchrun command that wrote the checkpoint; None without torchrun."""
    model_config: ModelConfig
    """Shape of the model."""
    tokenizer: str
    """Name of the tokenizer's file in the checkpoint."""

    def to_json(self) -> dict[str, Any]:
        """Return the contents of state.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Invert `to_json`; unknown keys are ignored.

        Raises:
            KeyError: if a required key is missing.
            ConfigError: if the model config is invalid.
        """
        optional = {"guard", "machine", "launch"}
        known = {field.name for field in dataclasses.fields(cls)}
        found = {name: values[name] for name in known if name in values or name not in optional}
        return cls(**found | {"model_config": ModelConfig.from_dict(values["model_config"])})
