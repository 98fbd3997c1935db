"""The weights that a run starts from with --init_from: another run's, or a model's in any format."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.prepare import command_for
from llamalet.config import ModelConfig
from llamalet.convert import formats
from llamalet.errors import ConfigError
from llamalet.model_file.checkpoint import SUFFIX
from llamalet.shards import Shards
from training.backend import Arrays


@dataclass(frozen=True, kw_only=True, slots=True)
class StartingPoint:
    """Weights to start from, without the optimizer's state or the step."""

    name: str
    config: ModelConfig
    state: Arrays
    """The weights, float32, by the names that checkpoints use."""
    tokenizer_sha256: str | None
    """Identity of its tokenizer, if that is known."""
    tokenizer_path: str | None
    """The model's path as typed, which `tinystories.py pretokenize --vocab` takes too; None if it has no tokenizer."""

    def check(self, config: ModelConfig, data: Shards) -> None:
        """Raise a ConfigError that lists what differs if the run has another shape or vocabulary than these weights.

        Args:
            config: the shape to train; the context may differ.
            data: the data to train on.
        """
        old, new = self.config.to_dict(), config.to_dict()
        differs = [key for key in old if key not in ("max_seq_len", "vocab_size") and old[key] != new[key]]
        problems = [f"{key}={new[key]}: {self.name} has {old[key]}" for key in differs]
        fits = data.vocab_size == self.config.vocab_size  # or it has rows without a token
        if self.tokenizer_sha256 is not None:
            fits = self.tokenizer_sha256 == data.tokenizer_sha256 and data.vocab_size <= self.config.vocab_size
        if not fits:
            problems.append(
                f"{data.folder}: prepared with another vocabulary ({data.vocab_size} tokens) than that of {self.name} "
                f"({self.config.vocab_size}); prepare the text with that one: "
                f"{command_for(data, self.tokenizer_path or 'ITS_TOKENIZER')}"
            )
        ConfigError.raise_for(problems)


def read(path: str) -> StartingPoint:
    """Open the model to start from.

    Args:
        path: a run's folder (its best checkpoint is taken), a checkpoint, or a model in any other format.

    Raises:
        CheckpointError: if the checkpoint is damaged, or the run has no valid one.
        FormatError: if there is no model, or it is damaged.
    """
    source = formats.read(formats.kind_of(Path(path)), path)
    return StartingPoint(
        name=source.name,
        config=source.config,
        state={name + SUFFIX: np.array(tensor[0 : tensor.shape[0]]) for name, tensor in source.tensors.items()},
        tokenizer_sha256=source.tokenizer.sha256 if source.tokenizer else source.tokenizer_sha256,
        tokenizer_path=path if source.tokenizer else None,
    )
