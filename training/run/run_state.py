"""What a checkpoint records of its run besides tensors: the contents of state.json."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llamalet import strict
from llamalet.config import ModelConfig
from llamalet.errors import CheckpointError
from llamalet.model_file.checkpoint import STATE, read_state

GUARD_VALUES = 4  # of `Guard.state()`


def backend_of(machine: Mapping[str, Any]) -> str:
    """Return the backend, torch or numba, that has these facts (`Backend.facts`)."""
    return "numba" if "numba" in machine else "torch"


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

    def __post_init__(self) -> None:
        """Refuse a guard's state of another length."""
        if self.guard is not None and len(self.guard) != GUARD_VALUES:
            raise CheckpointError(f"guard has {len(self.guard)} numbers, must have {GUARD_VALUES}")

    def to_json(self) -> dict[str, Any]:
        """Return the contents of state.json."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a checkpoint's state.json; unknown keys are ignored.

        Raises:
            CheckpointError: if it cannot be read, or a field is missing or wrong.
        """
        return strict.build(cls, read_state(folder), str(folder / STATE), CheckpointError, ignore_unknown=True)
