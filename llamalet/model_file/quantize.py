"""Weights in fewer bits, and back: bfloat16, and groups of small integers that share a scale, in numpy.

A weight is about q * s, with one scale s for a group of neighbouring columns of a row. 8 bits: s = max|w| / 127 and q
in -127..127. 4 bits: q in -8..7, and s is the best of several candidates, the one with the least squared error.
Source: llama2.c, `quantize_q80` in export.py; 4 bits: llama.cpp, `quantize_row_q4_0_ref`, the first candidate.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamalet.errors import FormatError

MAX_GROUP_SIZE = 64
MIN_GROUP_SIZE = 16

# The groups of `pack_q8` and `pack_q4`.
Q8_GROUP_SIZE = 64
Q4_GROUP_SIZE = 32

# The kernels' tile: a vector holds 4 columns of 16 rows, a chunk is two vectors.
ROW_BLOCK = 16
CHUNK_COLS = 8

# Candidates for a 4-bit scale: the group's largest weight divided by each of these; -8 is Q4_0's rule. Then the scale
# is refitted to the integers of the best candidate a few times. For normally distributed weights the squared error ends
# up within 0.2 % of the least that any bfloat16 scale gives.
Q4_LARGEST = (-8.0, *(sign * quarters / 4 for quarters in range(22, 36) for sign in (-1, 1)))
Q4_REFITS = 2

# Weights quantized per step: few enough that the temporaries stay in a core's cache.
BLOCK_WEIGHTS = 1 << 16

Floats = NDArray[np.float32]


class Quantized(NamedTuple):
    """A matrix of int8 values with one scale per group of columns.

    values: int8 (rows, cols), in -127..127.
    scales: float32 (rows, cols // group), not negative.
    """

    values: NDArray[np.int8]
    scales: Floats

    @property
    def group_size(self) -> int:
        """Number of neighbouring columns that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]


class Packed(NamedTuple):
    """A quantized matrix as the kernels read it: 16 rows side by side, in chunks of 8 columns.

    values: uint8 (row_blocks, chunks, 128) for 8 bits or (row_blocks, chunks, 64) for 4. Of block b and chunk c, with
        r in 0..15 and k in 0..3: 8 bits have weight [16 b + r, 8 c + 4 h + k] plus 128 at byte 64 h + 4 r + k, where
        h is 0 or 1; 4 bits have weight [16 b + r, 8 c + k] plus 8 in the low half of byte 4 r + k, and that of column
        8 c + 4 + k in its high half.
    scales: uint16, the bits of bfloat16, or float32: (row_blocks, groups, 16).
    rows: the matrix's rows; those up to a multiple of 16 are zeros.
    cols: the matrix's columns; those up to a multiple of 8 are zeros.
    group_size: columns that share a scale, a multiple of 8; a row's last group may be shorter.
    """

    values: NDArray[np.uint8]
    scales: NDArray[np.uint16] | Floats
    rows: int
    cols: int
    group_size: int

    @property
    def bits(self) -> int:
        """Bits of a value: 8 or 4."""
        return self.values.shape[2] // ROW_BLOCK


# A matrix in any of its forms; uint16 are the bits of bfloat16.
Weight = Floats | NDArray[np.uint16] | Quantized | Packed


def bits_of(weight: Weight) -> int:
    """Return the bits of a matrix's number, scales not counted."""
    if isinstance(weight, Packed):
        return weight.bits
    return 8 if isinstance(weight, Quantized) else 8 * weight.itemsize


def dequantize(weight: Weight) -> Floats:
    """Return weights as float32 (rows, cols); float32 weights are returned unchanged."""
    if isinstance(weight, Packed):
        return dequantize_rows(weight, np.arange(weight.rows))
    if isinstance(weight, Quantized):
        return _scaled(weight.values, weight.scales, weight.group_size)
    return _as_float32(weight)


def dequantize_rows(packed: Packed, rows: NDArray[np.integer[Any]]) -> Floats:
    """Return some rows (n,) of a packed matrix as float32 (n, cols)."""
    return _scaled(*unpack(packed, rows), packed.group_size)


def _scaled(values: NDArray[np.int8], scales: Floats, group_size: int) -> Floats:
    """Multiply values (rows, cols) by their groups' scales (rows, groups)."""
    rows, cols = values.shape
    whole = cols // group_size * group_size  # columns in whole groups; a short group may follow
    weights = np.empty((rows, cols), np.float32)
    groups = (rows, whole // group_size, group_size)
    np.multiply(values[:, :whole].reshape(groups), scales[:, : groups[1], None], out=weights[:, :whole].reshape(groups))
    np.multiply(values[:, whole:], scales[:, groups[1] :], out=weights[:, whole:])
    return weights


# -- groups along a row -----------------------------------------------------------------------------------------------


def quantize(weights: Floats, group_size: int) -> Quantized:
    """Round each group of `group_size` columns to int8 with its own scale.

    Args:
        weights: finite float32 (rows, cols).
        group_size: divides cols, so that no group crosses a row.

    Returns:
        The values, rounded half to even; a group of zeros has scale 0. The error of a weight is at most scale / 2 (and
        a few float32 roundings).
    """
    assert weights.size % group_size == 0 and weights.shape[1] % group_size == 0
    groups = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, group_size)
    values = np.empty(groups.shape, np.int8)
    scales = np.empty(len(groups), np.float32)
    step = max(1, BLOCK_WEIGHTS // group_size)
    for start in range(0, len(groups), step):
        block = groups[start : start + step]
        scale = np.maximum(block.max(axis=1), -block.min(axis=1)) / np.float32(127)
        # Dividing by 1 keeps the zeros of an all-zero group zero, where 0 / 0 would be NaN.
        quotient = block / np.where(scale > 0, scale, np.float32(1))[:, None]
        np.rint(quotient, out=quotient)
        values[start : start + step] = quotient
        scales[start : start + step] = scale
    return Quantized(values.reshape(weights.shape), scales.reshape(weights.shape[0], -1))


def group_size_for(*widths: int) -> int:
    """Return the largest power of two, at most MAX_GROUP_SIZE, that divides every one of `widths`."""
    return math.gcd(MAX_GROUP_SIZE, *widths)


# -- packed as the kernels read them ----------------------------------------------------------------------------------


def pack_q8(weights: Floats) -> Packed:
    """Round weights, finite float32 (rows, cols), to 8 bits with a bfloat16 scale for each Q8_GROUP_SIZE columns.

    The scale is max|w| / 127 rounded up, so no value is clipped; the error of a weight is at most scale / 2.
    """
    return _pack_groups(weights, 8, Q8_GROUP_SIZE, round_q8)


def pack_q4(weights: Floats) -> Packed:
    """Round weights, finite float32 (rows, cols), to 4 bits with a bfloat16 scale for each Q4_GROUP_SIZE columns.

    The squared error of a group is at most that of Q4_0's rule, scale = w / -8 with the w of largest magnitude, and
    less for most. A short last group is filled up with zeros.
    """
    return _pack_groups(weights, 4, Q4_GROUP_SIZE, round_q4)


def pack(quantized: Quantized) -> Packed:
    """Return an int8 matrix as the kernels read it, with the same float32 scales.

    Raises:
        FormatError: if the group size is not a multiple of CHUNK_COLS: a chunk has one scale.
    """
    group_size = quantized.group_size
    if group_size % CHUNK_COLS:
        raise FormatError(
            f"int8 in groups of {group_size}: the kernels need a multiple of {CHUNK_COLS}; run it with --backend=numpy"
        )
    return pack_values(*quantized, 8, group_size)


def pack_values(values: NDArray[np.int8], scales: NDArray[np.uint16] | Floats, bits: int, group_size: int) -> Packed:
    """Return integers that are chosen already as the kernels read them.

    Args:
        values: int8 (rows, cols), in -127..127 for 8 bits and -8..7 for 4.
        scales: the bits of bfloat16, or float32: (rows, groups).
        bits: 8 or 4.
        group_size: columns that share a scale, a multiple of CHUNK_COLS; the last group may be shorter.
    """
    rows, cols = values.shape
    packed = _empty(rows, cols, bits, group_size, scales.dtype.type)
    for blocks, part in _row_blocks(packed):
        _put(packed, blocks, values[part], scales[part])
    return packed


def unpack(packed: Packed, rows: NDArray[np.integer[Any]] | None = None) -> tuple[NDArray[np.int8], Floats]:
    """Return the values, int8 (n, cols), and scales, float32 (n, groups), of some rows (n,) of a matrix, or of all."""
    rows = np.arange(packed.rows) if rows is None else rows
    block, lane = np.divmod(rows, ROW_BLOCK)
    row_blocks, chunks, n_bytes = packed.values.shape
    # Four neighbouring columns of a row are one uint32.
    fours = packed.values.view(np.uint32).reshape(row_blocks, chunks, -1, ROW_BLOCK)
    values = (
        np.ascontiguousarray(fours.transpose(0, 3, 1, 2)[block, lane]).view(np.uint8).reshape(len(rows), chunks, -1)
    )
    if packed.bits == 4:
        values = np.concatenate([values & 15, values >> 4], axis=2)
    signed = (values - np.uint8(1 << (packed.bits - 1))).view(np.int8)  # modulo 256, so the sign comes out right
    return signed.reshape(len(rows), -1)[:, : packed.cols], _as_float32(packed.scales.swapaxes(1, 2)[block, lane])


def _pack_groups(
    weights: Floats, bits: int, group_size: int, round_groups: Callable[[Floats], tuple[Floats, NDArray[np.uint16]]]
) -> Packed:
    """Pack weights; `round_groups` rounds groups, float32 (n, group_size), to values and bfloat16 scales."""
    rows, cols = weights.shape
    packed = _empty(rows, cols, bits, group_size, np.uint16)
    n_groups = packed.scales.shape[1]
    for blocks, part in _row_blocks(packed):
        groups = _padded(weights[part], len(weights[part]), n_groups * group_size).reshape(-1, group_size)
        values, scales = round_groups(groups)
        _put(packed, blocks, values.reshape(-1, n_groups * group_size)[:, : packed.cols], scales.reshape(-1, n_groups))
    return packed


def _empty(rows: int, cols: int, bits: int, group_size: int, scale_dtype: type) -> Packed:
    """Return a packed matrix whose values and scales are not set."""
    values, scales = packed_shapes(rows, cols, bits, group_size)
    return Packed(np.empty(values, np.uint8), np.empty(scales, scale_dtype), rows, cols, group_size)


def packed_shapes(rows: int, cols: int, bits: int, group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a packed matrix's values and scales."""
    row_blocks, chunks, groups = -(-rows // ROW_BLOCK), -(-cols // CHUNK_COLS), -(-cols // group_size)
    return (row_blocks, chunks, ROW_BLOCK * bits), (row_blocks, groups, ROW_BLOCK)


def _row_blocks(packed: Packed) -> list[tuple[slice, slice]]:
    """Split a matrix into parts of about BLOCK_WEIGHTS weights: slices of its row blocks, and of its rows."""
    n = len(packed.values)
    step = max(1, BLOCK_WEIGHTS // (ROW_BLOCK * packed.cols))
    cuts = [slice(start, min(start + step, n)) for start in range(0, n, step)]
    return [(cut, slice(cut.start * ROW_BLOCK, min(cut.stop * ROW_BLOCK, packed.rows))) for cut in cuts]


def _put(packed: Packed, blocks: slice, values: NDArray[Any], scales: NDArray[Any]) -> None:
    """Store the integers (rows, cols) and scales (rows, groups) of some row blocks."""
    _, chunks, _ = packed.values.shape
    rows = (blocks.stop - blocks.start) * ROW_BLOCK
    signed = _padded(values.astype(np.int8, copy=False), rows, chunks * CHUNK_COLS)
    unsigned: NDArray[Any] = signed.view(np.uint8) + np.uint8(1 << (packed.bits - 1))  # modulo 256
    if packed.bits == 4:
        halves = unsigned.reshape(rows, chunks, 2, CHUNK_COLS // 2)
        unsigned = halves[:, :, 0] | halves[:, :, 1] << 4
    fours = np.ascontiguousarray(unsigned).view(np.uint32).reshape(-1, ROW_BLOCK, chunks, packed.bits // 4)
    packed.values.view(np.uint32).reshape(-1, chunks, packed.bits // 4, ROW_BLOCK)[blocks] = fours.transpose(0, 2, 3, 1)
    padded_scales = _padded(scales, rows, scales.shape[1])
    packed.scales[blocks] = padded_scales.reshape(-1, ROW_BLOCK, scales.shape[1]).swapaxes(1, 2)


def _padded(array: NDArray[Any], rows: int, cols: int) -> NDArray[Any]:
    """Return `array` padded with zeros to (rows, cols), contiguous."""
    if array.shape == (rows, cols):
        return np.ascontiguousarray(array)
    padded = np.zeros((rows, cols), array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def round_q8(groups: Floats, importance: Floats | None = None) -> tuple[Floats, NDArray[np.uint16]]:
    """Return the values (n, group_size) and bfloat16 scales (n,) of `pack_q8` for groups, float32 (n, group_size).

    The importance of weights, see `round_q4`, changes nothing: a scale that clips a value is never better at 8 bits.
    """
    scale = np.maximum(groups.max(axis=1), -groups.min(axis=1)) / np.float32(127)
    bits = ((scale.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)
    scale = from_bfloat16(bits)
    return np.rint(groups / np.where(scale > 0, scale, np.float32(1))[:, None]), bits


def round_q4(groups: Floats, importance: Floats | None = None) -> tuple[Floats, NDArray[np.uint16]]:
    """Return the values (n, group_size) and bfloat16 scales (n,) of `pack_q4` for groups, float32 (n, group_size).

    With the importance of each weight, (n, group_size) or (group_size,), squared errors count that many times.
    """
    w = np.ascontiguousarray(groups.T)  # (group_size, n): operations on groups run along the memory
    largest = np.where(w.max(axis=0) >= -w.min(axis=0), w.max(axis=0), w.min(axis=0))
    values, scratch = np.empty_like(w), np.empty_like(w)

    def round_to(scale: Floats) -> None:
        """Set `values` to the integers nearest to w / scale."""
        usable = np.abs(scale) >= np.finfo(np.float32).tiny  # otherwise the inverse may overflow
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=usable)
        np.multiply(w, inverse, out=values)
        np.rint(values, out=values)
        np.clip(values, -8, 7, out=values)

    def squared_error(scale: Floats) -> Floats:
        """Return the squared error of each group when rounded with a scale."""
        round_to(scale)
        np.multiply(values, scale, out=scratch)
        np.subtract(scratch, w, out=scratch)
        np.multiply(scratch, scratch, out=scratch)
        if importance is not None:
            np.multiply(scratch, importance.T.reshape(len(w), -1), out=scratch)
        return scratch.sum(axis=0)

    def fitted(scale: Floats) -> Floats:
        """Return the scale with the least squared error for the integers of `scale`."""
        round_to(scale)
        if importance is None:
            squares = np.multiply(values, values, out=scratch).sum(axis=0)
            products = np.multiply(values, w, out=scratch).sum(axis=0)
            return products / np.maximum(squares, 1)
        weighted = values * importance.T.reshape(len(w), -1)
        squares = np.multiply(values, weighted, out=scratch).sum(axis=0)
        products = np.multiply(weighted, w, out=scratch).sum(axis=0)
        return np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)

    best = from_bfloat16(to_bfloat16(largest / np.float32(Q4_LARGEST[0])))
    # Errors of weights beyond 1e18 overflow and never compare as better, so Q4_0's scale stays.
    with np.errstate(over="ignore", invalid="ignore"):
        least = squared_error(best)
        for trial in range(1, len(Q4_LARGEST) + Q4_REFITS):
            wanted = largest / np.float32(Q4_LARGEST[trial]) if trial < len(Q4_LARGEST) else fitted(best)
            scale = from_bfloat16(to_bfloat16(wanted))
            error = squared_error(scale)
            better = error < least
            best, least = np.where(better, scale, best), np.where(better, error, least)
        round_to(best)
    return values.T, to_bfloat16(best)


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


def to_bfloat16(x: Floats) -> NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, half to even, and return its bits; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    # Rounding could turn a NaN into an infinity or a zero: keep it as a quiet NaN.
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    """Return bfloat16 bits as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _as_float32(x: Floats | NDArray[np.uint16]) -> Floats:
    """Return float32 numbers unchanged, and bfloat16 bits as float32."""
    return from_bfloat16(x) if x.dtype == np.uint16 else x  # type: ignore[arg-type, return-value]


# -- the types of version 3 --------------------------------------------------------------------------------------------


class Encoding(NamedTuple):
    """How version 3 stores a matrix.

    bits: of a weight, without its scale.
    group_size: columns that share a scale; None if the type has no scales.
    encode: makes finite float32 (rows, cols) into what is stored.
    """

    bits: int
    group_size: int | None
    encode: Callable[[Floats], Weight]


# By the name of the type. A header has its place in this table: new ones go to the end.
ENCODINGS = {
    "f32": Encoding(32, None, np.asarray),
    "bf16": Encoding(16, None, to_bfloat16),
    "q8": Encoding(8, Q8_GROUP_SIZE, pack_q8),
    "q4": Encoding(4, Q4_GROUP_SIZE, pack_q4),
}
