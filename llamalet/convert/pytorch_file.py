"""PyTorch's own files, mapped, nothing in them run as code. The one place here that needs torch."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamalet.convert.imported_model import Floats
from llamalet.errors import FormatError, UsageError
from llamalet.model_file.tensors import BLOCK_WEIGHTS

if TYPE_CHECKING:
    import torch

ZIP_START = b"PK"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# The matrices that tell the shape of a model; the first two must be there.
MATRICES = ("tok_embeddings", "layers.0.feed_forward.w1", "output")


def load(path: Path) -> dict[str, Any]:
    """Return the dict that a file holds; its tensors stay in the file until they are read, unless it is too old.

    Raises:
        FormatError: if it is missing, damaged, no dict, or asks for code to be run.
        UsageError: if torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UsageError(f"{path}: reading PyTorch's files needs torch: pip install torch") from None
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP_START)) == ZIP_START  # older files cannot be mapped
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except Exception as error:  # the library raises what the damage leads to
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(f"{path}: no file of PyTorch's that can be read without running code: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise FormatError(f"{path}: holds a {type(found).__name__}, not a dict of tensors by their names")
    return found


@dataclass(frozen=True)
class TorchTensor:
    """A tensor in one or several PyTorch files, each with a part of it, whose rows are converted when asked for.

    Attributes:
        parts: tensors of any floating type.
        axis: along which the parts follow each other.
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
    """Raise a FormatError unless what a file holds is a plain tensor of floating-point numbers with so many axes."""
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise FormatError(f"{path}: {name} is no tensor of floating-point weights: quantized models cannot be read")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise FormatError(f"{path}: {name} is a sparse tensor, or one without values")
    if value.dim() not in n_axes or not value.numel():
        raise FormatError(f"{path}: {name} has shape {tuple(value.shape)}, where weights are a matrix or a vector")


def same(a: TorchTensor, b: TorchTensor) -> bool:
    """Return whether two matrices are one, or hold the same values."""
    if a.shape != b.shape or [part.data_ptr() for part in a.parts] == [part.data_ptr() for part in b.parts]:
        return a.shape == b.shape
    step = max(1, BLOCK_WEIGHTS // a.shape[1])
    return all(np.array_equal(a[at : at + step], b[at : at + step]) for at in range(0, a.shape[0], step))
