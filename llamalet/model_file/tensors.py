"""The tensors of the raw binary model files: their order, their shapes and how they are stored.

A file is a header (see header.py) followed by the tensors in the version's order, row-major and little-endian. One
table of that order drives the reader, the writer and the check of the size.

    v0  float32, read by llama2.c's run.c.
    v1  float32, in another order.
    v2  int8 in groups, read by runq.c: every matrix is its int8 values followed by one float32 scale per group.
    v3  float32 (f32), bfloat16 (bf16), 8 bits (q8) or 4 bits (q4), in v1's order. A q8 or q4 matrix is its values
        followed by its scales, both laid out for the kernels as in `quantize.Packed`. Every array starts at a multiple
        of 64 bytes, with zeros before it. The layers of a matrix are equally far apart. The last tensor is
        rope_divisors, float32 (D / 2,), if the header says that RoPE is scaled by it. The model's tokenizer may follow
        the tensors: its file, unchanged.

Norms are float32 in every version. Source of v0-v2: llama2.c, export.py, run.c and runq.c.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig, RopeDivisors
from llamalet.errors import NonFiniteError
from llamalet.model_file import quantize
from llamalet.model_file.quantize import Floats, Packed, Quantized, Weight, dequantize, dequantize_rows

# Weights that are converted at a time: memory use does not depend on the model's size.
BLOCK_WEIGHTS = 1 << 22

# Alignment of v3's arrays: a cache line, and the widest vector.
ALIGNMENT = 64

# The order of the tensors in each version; "*" runs over the layers.
MATRICES = tuple(f"layers.*.attention.{w}" for w in ("wq", "wk", "wv", "wo"))
FEED_FORWARD = tuple(f"layers.*.feed_forward.{w}" for w in ("w1", "w2", "w3"))
NORMS = ("layers.*.attention_norm", "layers.*.ffn_norm", "norm")
V0_ORDER = (
    "tok_embeddings", "layers.*.attention_norm", *MATRICES, "layers.*.ffn_norm", *FEED_FORWARD, "norm",
    "rope_cos", "rope_sin", "output",
)  # fmt: skip
V1_ORDER = (*NORMS, "tok_embeddings", *MATRICES, *FEED_FORWARD, "output")
V3_ORDER = (*V1_ORDER, "rope_divisors")
ORDER = {0: V0_ORDER, 1: V1_ORDER, 2: V1_ORDER, 3: V3_ORDER}


class Rows(Protocol):
    """A tensor that gives its rows as float32 on demand: an array, or a tensor in a file of any format."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, (rows, cols) or (cols,)."""

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        """Return some rows."""


@dataclass(frozen=True)
class BinTensor:
    """A tensor in any form that a model file has, whose rows are converted to float32 on demand."""

    weight: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, in weights."""
        if isinstance(self.weight, Packed):
            return self.weight.rows, self.weight.cols
        return (self.weight.values if isinstance(self.weight, Quantized) else self.weight).shape

    def __getitem__(self, rows: slice) -> Floats:
        if isinstance(self.weight, Packed):
            return dequantize_rows(self.weight, np.arange(self.weight.rows)[rows])
        if isinstance(self.weight, Quantized):
            return dequantize(Quantized(self.weight.values[rows], self.weight.scales[rows]))
        return dequantize(self.weight[rows])


class Part(NamedTuple):
    """One array of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_values(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))

    @property
    def n_bytes(self) -> int:
        """Bytes of the elements."""
        return self.n_values * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file: its checkpoint name, its shape and how it is stored.

    dtype is one of DTYPES; group_size is None if it is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    version: int
    dtype: str
    group_size: int | None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The arrays that it consists of: one, or values and scales."""
        if self.group_size is None:
            return (Part("<f4" if self.dtype == "f32" else "<u2", self.shape),)
        rows, cols = self.shape
        if self.version == 2:
            return Part("i1", self.shape), Part("<f4", (rows, cols // self.group_size))
        values, scales = quantize.packed_shapes(rows, cols, quantize.ENCODINGS[self.dtype].bits, self.group_size)
        return Part("u1", values), Part("<u2", scales)

    @property
    def n_bytes(self) -> int:
        """Bytes in the file, up to the start of the next tensor."""
        return sum(part.n_bytes + self.padding(part) for part in self.parts)

    def padding(self, part: Part) -> int:
        """Return the number of zeros after one of its parts."""
        return -part.n_bytes % ALIGNMENT if self.version == 3 else 0

    def encode(self, weights: NDArray[np.float32]) -> Weight:
        """Return float32 weights as they are stored."""
        if self.version == 2 and self.group_size is not None:
            return quantize.quantize(weights, self.group_size)
        return quantize.ENCODINGS[self.dtype].encode(weights)

    def stores(self, weight: Weight) -> bool:
        """Return whether a matrix of the same shape is packed as the file stores it."""
        if self.version != 3 or not isinstance(weight, Packed):
            return False
        bits, group_size, _ = quantize.ENCODINGS[self.dtype]
        return (weight.bits, weight.group_size, weight.scales.dtype) == (bits, group_size, np.uint16)

    def assemble(self, arrays: Sequence[NDArray[Any]]) -> Weight:
        """Return the tensor with these parts."""
        if self.group_size is None:
            return arrays[0]
        (values, scales), (rows, cols) = arrays, self.shape
        return Quantized(values, scales) if self.version == 2 else Packed(values, scales, rows, cols, self.group_size)


def tensor_specs(
    version: int, config: ModelConfig, dtype: str = "f32", group_size: int | None = None
) -> Iterator[TensorSpec]:
    """Yield the tensors of a file in their order.

    Args:
        version: 0 to 3.
        config: the model's shape.
        dtype: one of DTYPES that the version has; norms are always f32.
        group_size: columns that share a scale; None if nothing is quantized.
    """
    c = config
    q_dim = c.n_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (c.vocab_size, c.dim), "output": (c.vocab_size, c.dim), "norm": (c.dim,),
        "attention_norm": (c.dim,), "ffn_norm": (c.dim,),
        "wq": (q_dim, c.dim), "wk": (c.kv_dim, c.dim), "wv": (c.kv_dim, c.dim), "wo": (c.dim, q_dim),
        "w1": (c.hidden_dim, c.dim), "w2": (c.dim, c.hidden_dim), "w3": (c.hidden_dim, c.dim),
        "rope_cos": (c.max_seq_len, c.head_dim // 2), "rope_sin": (c.max_seq_len, c.head_dim // 2),
        "rope_divisors": (c.head_dim // 2,),
    }  # fmt: skip
    absent = {"output": c.tied, "rope_divisors": not isinstance(c.rope_scaling, RopeDivisors)}
    for pattern in ORDER[version]:
        if absent.get(pattern):
            continue
        shape = shapes[pattern.rpartition(".")[2]]
        for layer in range(c.n_layers) if "*" in pattern else (0,):
            kind = (dtype, group_size) if len(shape) == 2 else ("f32", None)
            yield TensorSpec(pattern.replace("*", str(layer)), shape, version, *kind)


def row_blocks(name: str, tensor: Rows) -> Iterator[NDArray[np.float32]]:
    """Yield a tensor as blocks of rows, about BLOCK_WEIGHTS each; all but the last are a multiple of ROW_BLOCK rows.

    Raises:
        NonFiniteError: naming the tensor, if a weight is NaN or infinite.
    """
    rows, *cols = tensor.shape
    step = max(1, BLOCK_WEIGHTS // (int(np.prod(cols)) * quantize.ROW_BLOCK)) * quantize.ROW_BLOCK
    for start in range(0, rows, step):
        block = np.ascontiguousarray(tensor[start : start + step], dtype=np.float32)
        # The sum is NaN or infinite if any weight is: one pass, no temporary.
        with np.errstate(invalid="ignore"):  # inf - inf
            total = block.sum(dtype=np.float64)
        if not np.isfinite(total):
            raise NonFiniteError(f"{name} holds NaN or infinite weights")
        yield block
