"""The model that a run trains further: another run's, or one in any format that interchange/ reads."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from interchange import formats
from llamalet.config import ModelConfig
from llamalet.errors import CheckpointError
from training import checkpoint
from training.weights import read_state


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """Weights to begin with; nothing else of what made them."""

    name: str
    config: ModelConfig
    state: dict[str, Tensor]
    """The state dict, float32."""
    tokenizer_sha256: str | None
    """Of its vocabulary, where that is known."""


def read(path: str) -> StartingPoint:
    """Open the model to train further.

    Args:
        path: a run's folder (its best checkpoint is taken), a checkpoint, or a model in one of interchange's formats.

    Raises:
        CheckpointError: if the run has no sound checkpoint, or the checkpoint is damaged.
        FormatError: if it is damaged, or no model at all.
    """
    folder = Path(path)
    if checkpoint.list_steps(folder):
        best = checkpoint.find_best(folder)
        if best is None:
            raise CheckpointError(f"{folder}: none of its checkpoints is sound")
        folder = best
    if (folder / checkpoint.MANIFEST).is_file():
        found = checkpoint.load(folder)
        sha256 = found.state["tokenizer_sha256"]
        return StartingPoint(
            name=str(folder), config=found.model_config, state=found.model_state, tokenizer_sha256=sha256
        )
    source = formats.read(formats.kind_of(folder), path)
    return StartingPoint(
        name=source.name,
        config=source.config,
        state=read_state(source.tensors),
        tokenizer_sha256=source.tokenizer.sha256 if source.tokenizer else None,
    )
