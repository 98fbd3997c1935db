"""The model that a run trains further: another run's, or one in any format that llamalet/convert reads."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from corpus.prepare import command_for
from llamalet.config import ModelConfig
from llamalet.convert import formats
from llamalet.errors import CheckpointError, ConfigError
from llamalet.model_file.checkpoint import MANIFEST, find_best, list_steps
from llamalet.shards import Shards
from training.run import checkpoint
from training.weights import read_state, to_torch


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """Weights to begin with; nothing else of what made them."""

    name: str
    config: ModelConfig
    state: dict[str, Tensor]
    """The state dict, float32."""
    tokenizer_sha256: str | None
    """Of its vocabulary, where that is known."""
    tokenizer_path: str | None
    """What to prepare data with: the file of the vocabulary, or the model that it comes with."""

    def check(self, config: ModelConfig, data: Shards) -> None:
        """Refuse to train the model further in another shape than its own, or on another vocabulary.

        Args:
            config: the shape to train; the context may differ.
            data: what to train on.

        Raises:
            ConfigError: listing what differs, and what to do.
        """
        old, new = self.config.to_dict(), config.to_dict()
        differs = [key for key in old if key not in ("max_seq_len", "vocab_size") and old[key] != new[key]]
        problems = [f"{key}={new[key]}: {self.name} has {old[key]}" for key in differs]
        if data.vocab_size != self.config.vocab_size or self.tokenizer_sha256 not in (None, data.tokenizer_sha256):
            problems.append(
                f"{data.folder}: prepared with another vocabulary ({data.vocab_size} tokens) than that of {self.name} "
                f"({self.config.vocab_size}); prepare the text with that one: "
                f"{command_for(data, self.tokenizer_path or 'ITS_TOKENIZER')}"
            )
        if problems:
            raise ConfigError.from_problems(problems)


def read(path: str) -> StartingPoint:
    """Open the model to train further.

    Args:
        path: a run (its best checkpoint is taken), a checkpoint, or a model in a format that llamalet/convert reads.

    Raises:
        CheckpointError: if the run has no sound checkpoint, or the checkpoint is damaged.
        FormatError: if it is damaged, or no model at all.
    """
    folder = Path(path)
    if list_steps(folder):
        best = find_best(folder)
        if best is None:
            raise CheckpointError(f"{folder}: none of its checkpoints is sound")
        folder = best
    if (folder / MANIFEST).is_file():
        found = checkpoint.load(folder)
        return StartingPoint(
            name=str(folder),
            config=found.model_config,
            state=to_torch(found.model_state),
            tokenizer_sha256=found.state.tokenizer_sha256,
            tokenizer_path=str(found.tokenizer_path),
        )
    source = formats.read(formats.kind_of(folder), path)
    return StartingPoint(
        name=source.name,
        config=source.config,
        state=read_state(source.tensors),
        tokenizer_sha256=source.tokenizer.sha256 if source.tokenizer else None,
        tokenizer_path=path if source.tokenizer else None,
    )
