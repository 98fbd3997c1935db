"""PyTorch's files: mapped, and nothing in them is run as code. Only this module needs torch."""

import io
import os
import re
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamalet.convert import imported_model
from llamalet.convert.imported_model import Floats, ImportedModel
from llamalet.errors import FormatError, UsageError
from llamalet.files import open_file
from llamalet.model_file.tensors import tensor_specs

if TYPE_CHECKING:
    import torch

SUFFIX = ".weight"  # ends every name
ZIP_START = b"PK"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# The matrices from which the model's shape is read; the first two must be there.
MATRICES = ("tok_embeddings", "layers.0.feed_forward.w1", "output")


def load(path: Path) -> dict[str, Any]:
    """Return the dict that a file holds. Its tensors are mapped, except in files from before PyTorch 1.6.

    Raises:
        FormatError: if it is missing, damaged, not a dict, or cannot be read without running code.
        UsageError: if torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UsageError(f"{path}: reading PyTorch's files needs torch: pip install torch") from None
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    with open_file(path) as file:
        is_zip = file.read(len(ZIP_START)) == ZIP_START  # older files cannot be mapped
    try:
        if is_zip:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            with _Bounded(io.FileIO(path)) as bounded:
                found = torch.load(bounded, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damage can lead to almost any error
        raise FormatError(f"{path}: not a PyTorch file that can be read without running code: {_why(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise FormatError(f"{path}: holds a {type(found).__name__}, not a dict of tensors by their names")
    return found


def _why(error: Exception) -> str:
    """Return why torch does not read a file; its own message goes on to advise to run the file's code."""
    message = str(error).strip()
    if found := re.search(r"GLOBAL (\S+) was not an allowed global", message):
        return f"it wants to run {found[1]}"
    if message.startswith("Weights only load failed"):
        return "it is damaged, or holds more than tensors"
    return message.partition("\n")[0]


class _Bounded(io.BufferedReader):
    """A file that never reads past its end: a damaged length would allocate gigabytes before the end is seen."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes."""
        rest = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(rest if size is None or size < 0 else min(size, rest))


@dataclass(frozen=True)
class TorchTensor:
    """A tensor in one PyTorch file or split over several; rows are converted to float32 on demand.

    Attributes:
        parts: tensors of any floating-point type.
        axis: the axis along which they are concatenated.
    """

    parts: "tuple[torch.Tensor, ...]"
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        sizes = list(self.parts[0].shape)
        sizes[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(sizes)

    @property
    def dtype(self) -> str:
        """The type in which it is stored, by safetensors' names."""
        name = str(self.parts[0].dtype).removeprefix("torch.")
        return DTYPES.get(name, name)

    def __getitem__(self, rows: slice) -> Floats:
        if self.axis == 1:
            return np.concatenate([part[rows].detach().float().numpy() for part in self.parts], axis=1)
        start, stop, _ = rows.indices(self.shape[0])
        pieces, first = [], 0
        for part in self.parts:
            piece = part[max(0, start - first) : max(0, stop - first)]
            pieces.append(piece.detach().float().numpy())
            first += len(part)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def check_weights(path: Path, name: str, value: Any, n_axes: Collection[int] = (1, 2)) -> None:
    """Raise a FormatError unless a file's value is a plain floating-point tensor with one of these numbers of axes."""
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise FormatError(f"{path}: {name} is not a floating-point tensor: quantized models cannot be read")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise FormatError(f"{path}: {name} is a sparse tensor, or one without values")
    if value.dim() not in n_axes or not value.numel():
        raise FormatError(f"{path}: {name} has shape {tuple(value.shape)}, where weights must be a matrix or a vector")


def imported(
    name: Path,
    found: dict[str, TorchTensor],
    fields: Mapping[str, Any],
    vocabularies: Sequence[Path],
    missing: str = "",
) -> ImportedModel:
    """Return the model that PyTorch's files hold.

    Args:
        name: the model, for messages.
        found: its tensors by our names; a copy of the embeddings as output makes it a tied model.
        fields: what the file says of ModelConfig's fields; widths that the tensors tell are left out.
        vocabularies: where its tokenizer may be, the best first.
        missing: the tokenizer_problem if there is none at all.

    Raises:
        FormatError: if the fields and the tensors are not a Llama model's.
    """
    tied = "output" not in found or _same(found["output"], found["tok_embeddings"])
    if tied:
        found.pop("output", None)
    config = imported_model.build_config(str(name), {**fields, "hidden_dim": found[MATRICES[1]].shape[0], "tied": tied})
    names = {spec.name: spec.name + SUFFIX for spec in tensor_specs(1, config)}
    imported_model.check_shapes(str(name), config, {ours: tensor.shape for ours, tensor in found.items()}, names)
    vocabulary, data, problems = imported_model.find_tokenizer(vocabularies, config.vocab_size)
    return ImportedModel(
        name=str(name),
        config=config,
        tensors=found,
        stored=imported_model.stored_types(found.values()),
        tokenizer=vocabulary,
        tokenizer_data=data,
        tokenizer_problem="" if vocabulary is not None else "; ".join(problems) or missing,
    )


def check_present(name: Path, found: Container[str]) -> None:
    """Raise a FormatError if a tensor is missing from which the model's shape is read."""
    for needed in MATRICES[:2]:
        if needed not in found:
            raise FormatError(f"{name}: {needed}{SUFFIX} is missing")


def _same(a: TorchTensor, b: TorchTensor) -> bool:
    """Return whether two matrices share their memory or hold the same values."""
    shared = [part.data_ptr() for part in a.parts] == [part.data_ptr() for part in b.parts]
    return a.shape == b.shape if shared else imported_model.same(a, b)
