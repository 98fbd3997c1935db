"""Group quantization to int8 and its inverse, in numpy.

A group of consecutive weights of a row shares one scale: w is about q * s, with s = max|w| / 127 and q in -127..127.
Source: llama2.c, `quantize_q80` in export.py (llama.cpp's Q8_0 is the same with groups of 32 and fp16 scales).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_GROUP_SIZE = 64
MIN_GROUP_SIZE = 16

# Weights quantized per step: small enough that the temporaries stay in a core's cache.
BLOCK_WEIGHTS = 1 << 16


class Quantized(NamedTuple):
    """A matrix of int8 values with one scale per group of columns.

    values: int8 (rows, cols), in -127..127.
    scales: float32 (rows, cols // group), not negative.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]

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
    scales: NDArray[np.uint16] | NDArray[np.float32]
    rows: int
    cols: int
    group_size: int


def quantize(weights: NDArray[np.float32], group_size: int) -> Quantized:
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


def dequantize(quantized: Quantized) -> NDArray[np.float32]:
    """Return the float32 (rows, cols) weights that `quantized` stands for."""
    rows, cols = quantized.values.shape
    groups = quantized.values.reshape(rows, -1, quantized.group_size).astype(np.float32)
    return (groups * quantized.scales[:, :, None]).reshape(rows, cols)


def group_size_for(*widths: int) -> int:
    """Return the largest power of two, at most MAX_GROUP_SIZE, that divides every one of `widths`."""
    return math.gcd(MAX_GROUP_SIZE, *widths)
