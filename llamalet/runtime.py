"""A model ready to use: its weights, a forward pass, its tokenizer."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llamalet import model_file, tokenizer
from llamalet.config import ModelConfig
from llamalet.errors import CheckpointError, ConfigError, TokenizerError, UsageError
from llamalet.generate import ForwardPass, Tokens, generate_batch, stream
from llamalet.sampler import SamplingConfig
from llamalet.scoring import NOTHING, Evaluation, evaluate_documents
from llamalet.tokenizer import StreamDecoder, Tokenizer, beside

BACKENDS = ("numba", "numpy")
CHECKPOINT_MODEL = "model.safetensors"


class Model:
    """A model file or training checkpoint, opened for inference.

    Attributes:
        path: where it was read from.
        config: its shape.
        tokenizer: its vocabulary.
        transformer: its forward pass.
    """

    def __init__(self, path: Path, transformer: ForwardPass, tokenizer: Tokenizer) -> None:
        self.path = path
        self.config = transformer.config
        self.tokenizer = tokenizer
        self.transformer = transformer

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        backend: str = "numba",
        threads: int | None = None,
        verify: bool | None = None,
    ) -> Self:
        """Open a model.

        Args:
            path: a .bin, a training checkpoint, or a run's folder (its best checkpoint).
            tokenizer: a tokenizer's file; None takes the one inside the model's, or beside it.
            backend: numba, or numpy, which is slow and needs no compiler.
            threads: how many threads compute; None leaves it to the backend.
            verify: whether to verify the payload's checksum; None verifies small files only.

        Raises:
            FormatError: if the file is missing, damaged or of another kind.
            CheckpointError: the same for a checkpoint.
            TokenizerError: if there is no tokenizer, or it is not the model's.
            ConfigError: on an unknown backend.
        """
        if backend not in BACKENDS:
            raise ConfigError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
        path = Path(path)
        file, found = read_checkpoint(path) if path.is_dir() else (model_file.read(path, verify=verify), beside(path))
        if tokenizer is not None:
            found = Path(tokenizer)
        elif file.tokenizer_data is not None:
            found = None
        vocabulary = load_tokenizer(file, found)
        # The compiled kernels take longest to import: whatever else is wrong has been said by now.
        if backend == "numpy":
            from llamalet.reference import NumpyTransformer

            return cls(file.path, NumpyTransformer(file), vocabulary)
        from llamalet.kernels.transformer import Transformer

        return cls(file.path, Transformer(file, threads=threads), vocabulary)

    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        """Return the logits after each token, computed from an empty cache.

        Args:
            tokens: ids (T,), at most the context.

        Returns:
            float32 (T, V).
        """
        return self.transformer.logits(tokens)

    def score(self, text: str) -> Evaluation:
        """Return how well the model predicts a text: its loss in nats per token and bits per byte.

        Each token is predicted from those before it: all of them, or in a long text at least half a context.

        Args:
            text: any text that is not empty.

        Raises:
            UsageError: if the text is empty.
            NonFiniteError: if the model's logits are NaN or infinite.
        """
        if not text:
            raise UsageError("there is no text to score")
        ids = np.array(self.tokenizer.encode(text, bos=True))
        return sum(evaluate_documents(self.transformer, self.tokenizer, [ids]), NOTHING)

    def generate(self, prompt: str = "", sampling: SamplingConfig | None = None, **options: Any) -> Iterator[str]:
        """Return the text that continues a prompt, piece by piece as it is generated.

        The same seed and settings always give the same text:

            model.generate("Once upon a time", temperature=0.8, seed=7)

        Args:
            prompt: the beginning; if it is empty, the model begins.
            sampling: how tokens are chosen and when the text ends.
            options: fields of SamplingConfig, which replace those of `sampling`.

        Raises:
            ConfigError: on an unknown option, or listing every value out of range.
            UsageError: if the prompt is longer than a context that does not roll.
        """
        return (text for _, text in self.generate_batch([prompt], sampling, **options))

    def generate_batch(
        self,
        prompts: Iterable[str],
        sampling: SamplingConfig | None = None,
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, str]]:
        """Return the texts that continue several prompts, generated together, as (number of the prompt, piece).

        This is several times as fast as one after the other, and each text is the one that `generate` gives alone:

            texts = [""] * len(prompts)
            for number, piece in model.generate_batch(prompts, seed=7):
                texts[number] += piece

        Args:
            prompts: any number of beginnings.
            sampling: see generate. Its seed is that of the first text; each has one more than the last.
            batch_size: number of texts in progress at once, at most 64; None: as many as memory has room for.
            options: see generate.

        Raises:
            ConfigError: see generate.
            UsageError: see generate, or if the batch size is out of range.
        """
        ids = [self.tokenizer.encode(prompt, bos=True) for prompt in prompts]
        configs = SamplingConfig.create(sampling, options).for_texts(len(ids))
        decoders = [StreamDecoder(self.tokenizer) for _ in ids]
        for decoder, prompt_ids in zip(decoders, ids, strict=True):
            for token in prompt_ids:
                decoder.push(token)
        events = generate_batch(self.transformer, ids, configs, stop_tokens=self.stop_tokens, batch_size=batch_size)
        return stream(events, decoders)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that end a text: EOS, the end of a turn, and BOS, which begins the next text in training data."""
        return self.tokenizer.stop_ids


def load_tokenizer(file: model_file.ModelFile, path: Path | None) -> Tokenizer:
    """Read a model's tokenizer, from `path` or from inside the file, and check that it is the model's.

    Raises:
        TokenizerError: if there is none, it is damaged, or of another vocabulary.
    """
    if path is not None:
        found = tokenizer.load(path, file.config.vocab_size)
    elif file.tokenizer_data is not None:
        found = tokenizer.parse(file.tokenizer_data, f"{file.path}, tokenizer inside", file.config.vocab_size)
        if file.header.tokenizer is not None and found.suffix != file.header.tokenizer.kind:
            raise TokenizerError(
                f"{file.path}: the tokenizer inside is of kind {found.suffix}, not {file.header.tokenizer.kind} as the "
                "header says"
            )
    else:
        names = f"{file.path.stem}.tokenizer.{{{','.join(tokenizer.SUFFIXES)}}}"
        raise TokenizerError(
            f"{file.path}: no tokenizer inside it and no tokenizer beside it ({names}); name one with -z"
        )
    if file.tokenizer_sha256 not in (None, found.sha256):
        raise TokenizerError(
            f"{path or file.path}: not the vocabulary that {file.path} was trained with: "
            f"sha256 is {found.sha256[:12]}..., must be {str(file.tokenizer_sha256)[:12]}..."
        )
    return found


def find_checkpoint(folder: Path) -> Path:
    """Return `folder` if it is a training checkpoint, or the best checkpoint of the run that it holds.

    Raises:
        CheckpointError: if it is neither.
    """
    if (folder / CHECKPOINT_MODEL).is_file():
        return folder
    steps = best_first(folder.glob("checkpoints/step-*"))
    if not steps:
        raise CheckpointError(
            f"{folder}: neither a checkpoint (a folder with {CHECKPOINT_MODEL}) nor a run with checkpoints/step-*"
        )
    return steps[0]


def best_first(steps: Iterable[Path]) -> list[Path]:
    """Return a run's checkpoints by their validation losses, then those without one, the newest first."""
    return sorted(sorted(steps, reverse=True), key=_val_loss)


def _val_loss(folder: Path) -> float:
    """Return the validation loss that a checkpoint records; infinity where it has none or cannot be read."""
    try:
        loss = json.loads((folder / "state.json").read_bytes()).get("val_loss")
    except (OSError, ValueError, AttributeError):
        return math.inf
    return loss if isinstance(loss, float) else math.inf


def read_checkpoint(folder: Path) -> tuple[model_file.ModelFile, Path | None]:
    """Read the weights of a training checkpoint, without torch.

    Args:
        folder: the checkpoint, or a run's folder, of which the best checkpoint is taken.

    Returns:
        The model as a version 1 file would hold it, and the path of its tokenizer.

    Raises:
        CheckpointError: if there is none, a file is missing or damaged, or a tensor's shape is not the config's.
        UsageError: if the safetensors library is not installed.
    """
    folder = find_checkpoint(folder)
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise UsageError(
            f"{folder}: reading a checkpoint needs safetensors: pip install safetensors; or export it to a .bin"
        ) from None
    try:
        state = json.loads((folder / "state.json").read_bytes())
        config = ModelConfig.from_dict(state["model_config"])
        tokenizer_path = folder / Path(state["tokenizer"]).name
        loaded = safetensors.numpy.load_file(folder / CHECKPOINT_MODEL)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from None
    tensors = {name.removesuffix(".weight"): tensor for name, tensor in loaded.items()}
    shapes = {spec.name: spec.shape for spec in model_file.tensor_specs(1, config)}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise CheckpointError(f"{folder / CHECKPOINT_MODEL}: its tensors are not those of the config in state.json")
    arrays: dict[str, model_file.Tensor] = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    header = model_file.Header(1, config, tokenizer_sha256=state.get("tokenizer_sha256"))
    return model_file.ModelFile(folder, header, arrays), tokenizer_path
