"""The functions of reference.py as machine code, under their names there: one step of the forward pass each.

Attention has a file of its own, attention.py.

They write their results to memory that the caller provides and check no shapes. Shape letters are those of
reference.py. Weights differ in kind: numba compiles `embed`, `prepare_activations` and `matmul` for each kind,
and all else once.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import float32, types
from numba.extending import overload

from llamalet.kernels import simd
from llamalet.kernels.jit import PART, inner_kernel, summing_kernel
from llamalet.kernels.split_rows import SplitRows, matmul_split, split_rows
from llamalet.model_file.quantize import CHUNK_COLS, ROW_BLOCK

TILE_BLOCKS = simd.tile_blocks()
FLOAT_TILE_ROWS, FLOAT_TILE_VECTORS = simd.float_tile()


class QuantizedRows(NamedTuple):
    """Quantized vectors (T, cols), group by group.

    values: records of a group's int8 values (T, groups), so that numba knows the group's size.
    scales: float32 (T, groups).
    zero_offsets: int32 (T, groups), minus zero_point times the sum of the group's values.
    zero_point: what the matrix added to its weights to make them unsigned.
    """

    values: Any
    scales: Any
    zero_offsets: Any
    zero_point: int


def new_quantized_rows(n: int, cols: int, group_size: int, bits: int) -> QuantizedRows:
    """Return room for n vectors of `cols` components, which matrices with this many bits a weight will multiply."""
    shape = (n, -(-cols // group_size))
    values = np.zeros(shape, [("values", np.int8, (group_size,))])
    return QuantizedRows(values, np.zeros(shape, np.float32), np.zeros(shape, np.int32), 1 << (bits - 1))


# -- the functions of reference.py ------------------------------------------------------------------------------------


@inner_kernel
def rmsnorm(x: Any, weight: Any, eps: float, out: Any) -> None:
    """Normalise x (C,) into out (C,)."""
    factor = float32(1) / np.sqrt(dot(x, x) / float32(len(x)) + eps)
    for i in range(len(x)):
        out[i] = x[i] * factor * weight[i]


@inner_kernel
def rope(x: Any, cos: Any, sin: Any) -> None:
    """Turn all heads of x (n * D,) in place by the angles (D / 2,) of its position."""
    half = len(cos)
    for start in range(0, len(x), 2 * half):
        simd.rotate_eights(x, start, cos, sin)
        for i in range(half // 8 * 8, half):
            even, odd = x[start + 2 * i], x[start + 2 * i + 1]
            x[start + 2 * i] = even * cos[i] - odd * sin[i]
            x[start + 2 * i + 1] = odd * cos[i] + even * sin[i]


@inner_kernel
def swiglu(gate: Any, up: Any) -> None:
    """Replace gate (n,) by silu(gate) * up."""
    for i in range(len(gate)):
        gate[i] = gate[i] / (float32(1) + simd.exp(-gate[i])) * up[i]


def prepare_activations(x: Any, activations: Any, first: int, last: int) -> None:
    """Write x[first:last] (T, cols) to activations as the matrices multiply it.

    Packed matrices multiply QuantizedRows, bfloat16 ones SplitRows where the processor has tile registers. Other
    matrices of floats multiply x itself; then activations is x, and there is nothing to do.
    """


@overload(prepare_activations, jit_options=PART, strict=False)
def _prepare_activations(x: Any, activations: Any, first: Any, last: Any) -> Any:
    if isinstance(activations, types.Array):
        return lambda x, activations, first, last: None
    if are_split(activations):
        return lambda x, activations, first, last: split_rows(x, activations, first, last)
    return lambda x, activations, first, last: quantize_rows(x, activations, first, last)


def lanes_of(activations: Any) -> int:
    """Return how many neighbouring vectors prepare_activations must be given together."""
    return int(activations.parts.shape[3]) if isinstance(activations, SplitRows) else 1


@overload(lanes_of, jit_options=PART, strict=False)
def _lanes_of(activations: Any) -> Any:
    return (lambda activations: activations.parts.shape[3]) if are_split(activations) else (lambda activations: 1)


def are_split(activations: Any) -> bool:
    """Return whether numba's type of activations is SplitRows."""
    return getattr(activations, "instance_class", None) is SplitRows


@inner_kernel
def quantize_rows(x: Any, rows: Any, first: int, last: int) -> None:
    """Quantize x[first:last] (T, cols); as in reference.py a NaN or an infinity spoils its group's scale.

    The last group may have fewer columns than the others; its values after them stay zero.
    """
    for t in range(first, last):
        for g in range(rows.scales.shape[1]):
            values = rows.values[t, g].values
            group = x[t, g * len(values) : min((g + 1) * len(values), x.shape[1])]
            bits = np.int32(0)
            for i in range(len(group)):
                bits = max(bits, simd.magnitude_bits(group[i]))
            largest = simd.float_of_bits(bits)
            rows.scales[t, g] = largest / float32(127)
            inverse = float32(127) / largest
            if not inverse < np.inf:  # a group of zeros, or of numbers too small to invert, or a NaN
                inverse = float32(0)
            total = np.int32(0)
            for i in range(len(group)):
                value = np.int32(np.rint(group[i] * inverse))
                values[i] = value
                total += value
            rows.zero_offsets[t, g] = -rows.zero_point * total


def matmul(matrix: Any, x: Any, first_t: int, count: int, out: Any, first: int, last: int, scratch: Any) -> None:
    """Multiply blocks first..last, of 16 rows each, of a matrix with `count` vectors from first_t on.

    Args:
        matrix: (rows, cols), float32 or bfloat16, or PackedMatrix.
        x: the vectors (T, cols): float32, or SplitRows for bfloat16, or QuantizedRows for a PackedMatrix.
        first_t: the first vector.
        count: number of vectors.
        out: (T, rows); its first `count` rows are written.
        first: the first block.
        last: the block after the last; the matrix's last block may have fewer than 16 rows.
        scratch: memory of this thread, as split_rows.new_scratch makes it; only SplitRows need it.
    """


@overload(matmul, jit_options=PART, strict=False)
def _matmul(matrix: Any, x: Any, first_t: Any, count: Any, out: Any, first: Any, last: Any, scratch: Any) -> Any:
    if are_split(x):
        return lambda matrix, x, first_t, count, out, first, last, scratch: matmul_split(
            matrix, x, first_t, count, out, first, last, scratch
        )
    return matmul_floats if isinstance(matrix, types.Array) else matmul_blocks


def matmul_floats(matrix: Any, x: Any, first_t: int, count: int, out: Any, first: int, last: int, scratch: Any) -> None:
    """Be `matmul` for a matrix of floats.

    One vector is multiplied with four rows at a time, a quarter of all these rows apart: processors prefetch best from
    a few long sequential streams. Many vectors meet blocks of 16 rows by tiles (simd.float_tile), so that a block and
    these vectors stay in the core's first cache.
    """
    vectors, begin, end = x[first_t:], first * ROW_BLOCK, min(last * ROW_BLOCK, out.shape[1])
    if count == 1:
        n = (end - begin + 3) // 4
        for i in range(begin, begin + n):
            j, k, m = min(i + n, end - 1), min(i + 2 * n, end - 1), min(i + 3 * n, end - 1)
            out[0, i], out[0, j], out[0, k], out[0, m] = simd.dot_rows(matrix, (i, j, k, m), vectors, (0,))
        return
    for block in range(begin, end, ROW_BLOCK):
        block_end = min(block + ROW_BLOCK, end)
        for t in range(0, count, FLOAT_TILE_VECTORS):
            ts = vectors_of_tile(t, count)
            for i in range(block, block_end, FLOAT_TILE_ROWS):
                rows = rows_of_tile(i, block_end)
                products = simd.dot_rows(matrix, rows, vectors, ts)
                for v in range(FLOAT_TILE_VECTORS):
                    for r in range(FLOAT_TILE_ROWS):
                        out[ts[v], rows[r]] = products[FLOAT_TILE_VECTORS * r + v]


def matmul_blocks(matrix: Any, x: Any, first_t: int, count: int, out: Any, first: int, last: int, scratch: Any) -> None:
    """Be `matmul` for a PackedMatrix: one vector is multiplied with 2 blocks at a time, many by tiles.

    A tile is 4 vectors and 2 blocks, or one block where the registers hold no more sums.
    """
    if count == 1:
        n = (last - first + 1) // 2
        for i in range(first, first + n):
            simd.multiply_blocks(matrix, (i, min(i + n, last - 1)), x, (first_t,), out, first_t)
        return
    for i in range(first, last, TILE_BLOCKS):
        for t in range(first_t, first_t + count, 4):
            if TILE_BLOCKS == 1:
                simd.multiply_blocks(matrix, (i,), x, four(t, first_t + count), out, first_t)
            else:
                simd.multiply_blocks(matrix, (i, min(i + 1, last - 1)), x, four(t, first_t + count), out, first_t)


def embed(matrix: Any, token: int, x: Any, group_size: int) -> None:
    """Write the embedding of a token, a row of the matrix (V, C), to x (C,)."""


@overload(embed, jit_options=PART, strict=False)
def _embed(matrix: Any, token: Any, x: Any, group_size: Any) -> Any:
    if isinstance(matrix, types.Array):
        return lambda matrix, token, x, group_size: widen(matrix[token], x)
    if matrix.types[0].dtype.size == simd.Q8_CHUNK_BYTES:
        return lambda matrix, token, x, group_size: unpack_row(matrix, token, x, group_size, 64, 0, 255, 128)
    return lambda matrix, token, x, group_size: unpack_row(matrix, token, x, group_size, 0, 4, 15, 8)


@inner_kernel
def unpack_row(
    matrix: Any, row: int, x: Any, group_size: int, half_bytes: int, half_bits: int, mask: int, zero_point: int
) -> None:
    """Write a row of a PackedMatrix (rows, cols) to x (cols,).

    Args:
        matrix: see quantize.Packed for its layout.
        row: its number.
        x: float32, the result.
        group_size: columns that share a scale.
        half_bytes: byte offset of a chunk's columns 4-7.
        half_bits: their bit shift.
        mask: the bits of a weight.
        zero_point: added to each weight when it was packed.
    """
    block, lane = row // ROW_BLOCK, row % ROW_BLOCK
    for first in range(0, len(x), 4):
        chunk, half = first // CHUNK_COLS, first % CHUNK_COLS // 4
        scale = as_float(matrix.scales[block, first // group_size].values[lane])
        for i in range(first, min(first + 4, len(x))):
            value = matrix.values[block, chunk].values[half_bytes * half + 4 * lane + i - first]
            x[i] = float32((np.int32(value) >> (half_bits * half) & mask) - zero_point) * scale


# -- small parts of them ----------------------------------------------------------------------------------------------


@inner_kernel
def widen(x: Any, out: Any) -> None:
    """Copy x (n,), float32 or bfloat16, to out (n,)."""
    for i in range(len(out)):
        out[i] = as_float(x[i])


def as_float(x: Any) -> float:
    """Return a float32 unchanged; of a uint16, the bits of a bfloat16, the float32 with these upper 16 bits."""
    return float((np.uint32(x) << np.uint32(16)).view(np.float32) if isinstance(x, np.uint16) else x)


@overload(as_float, jit_options=PART, strict=False)
def _as_float(x: Any) -> Any:
    if isinstance(x, types.Float):
        return lambda x: x
    return lambda x: simd.float_of_bits(np.int32(np.uint32(x) << np.uint32(16)))


@inner_kernel
def four(first: int, end: int) -> Any:
    """Return 4 numbers from `first` on; if fewer are left before `end`, the last one repeats."""
    return first, min(first + 1, end - 1), min(first + 2, end - 1), min(first + 3, end - 1)


@inner_kernel
def three(first: int, end: int) -> Any:
    """Return 3 numbers, as `four` does."""
    return first, min(first + 1, end - 1), min(first + 2, end - 1)


@inner_kernel
def two(first: int, end: int) -> Any:
    """Return 2 numbers, as `four` does."""
    return first, min(first + 1, end - 1)


NUMBERS = {2: two, 3: three, 4: four}
rows_of_tile, vectors_of_tile = NUMBERS[FLOAT_TILE_ROWS], NUMBERS[FLOAT_TILE_VECTORS]


@summing_kernel
def dot(x: Any, y: Any) -> float:
    """Return the dot product of x (n,) and y (n,)."""
    result = float32(0)
    for i in range(len(x)):
        result += x[i] * y[i]
    return result
