"""How the numbers of a KV cache are kept: float32, bfloat16, or 8-bit integers with a scale for each key and value.

The arrays are laid out for kernels/attention.py, whose vectors take 16 neighbours at once:

    keys     component by component of 16 positions, then those of the next 16: a query meets 16 keys at once
    values   position by position, filled up with zeros to a multiple of 16 components
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig
from llamalet.model_file.quantize import Weight, bits_of, from_bfloat16, to_bfloat16

Array = NDArray[np.float32]

LANES = 16
"""Positions whose keys lie side by side, and components of a value that a vector takes."""
STEP = 64
"""Memory is allocated for a multiple of this many positions."""


class CacheKind(NamedTuple):
    """How numbers are kept.

    dtype: of the arrays; uint16 are the bits of bfloat16.
    scaled: whether each key and each value of a head has a scale, float32.
    error: the largest error of keeping a number: relative to it, or with a scale to the largest of its key or value.
    """

    dtype: Any
    scaled: bool
    error: float


KINDS = {
    "f32": CacheKind(np.dtype(np.float32), False, 0.0),
    "bf16": CacheKind(np.dtype(np.uint16), False, 2.0**-8),
    "q8": CacheKind(np.dtype(np.int8), True, 0.5001 / 127),
}


def kind_for(weight: Weight, chosen: str | None) -> str:
    """Return the chosen kind; if there is none, float32 for weights of float32 and bfloat16 for those of fewer bits."""
    return chosen or ("f32" if bits_of(weight) > 16 else "bf16")


def swapped(blocks: NDArray[Any]) -> NDArray[Any]:
    """Swap the positions and the components of blocks of 16 positions."""
    return np.ascontiguousarray(blocks.swapaxes(2, 3))


def encode(x: Array, dtype: Any) -> tuple[NDArray[Any], Array]:
    """Return numbers (G, n, D) as they are kept, and for int8 the scales (G, n).

    A key or value with a NaN or an infinity gets a scale that is not finite, so nothing computed from it is finite.
    """
    none = np.empty((*x.shape[:2], 0), np.float32)
    if dtype != np.int8:
        return (to_bfloat16(x) if dtype == np.uint16 else x), none
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        largest = np.abs(x).max(axis=-1)
        largest = largest + np.float32(0) * largest  # NaN if any is infinite
        inverse = np.float32(127) / largest
        rounded = np.rint(x * np.where(np.isfinite(inverse), inverse, np.float32(0))[..., None])
        return np.nan_to_num(rounded).astype(np.int8), (largest / np.float32(127)).astype(np.float32)


def decode(numbers: NDArray[Any], scales: Array) -> Array:
    """Return kept numbers (G, n, D) as float32."""
    if numbers.dtype == np.int8:
        return numbers.astype(np.float32) * scales[..., None]
    return from_bfloat16(np.ascontiguousarray(numbers)) if numbers.dtype == np.uint16 else numbers


def shapes(config: ModelConfig, n_positions: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of keys, values and scales with room for this many positions."""
    capacity = -(-n_positions // STEP) * STEP
    heads = config.n_layers, config.n_kv_heads
    width = -(-config.head_dim // LANES) * LANES
    return (*heads, capacity // LANES, config.head_dim, LANES), (*heads, capacity, width), (*heads, capacity)


def cache_bytes(config: ModelConfig, n_positions: int, kind: str = "f32") -> int:
    """Return the size of a cache with room for this many positions, in bytes."""
    keys, values, scales = (int(np.prod(shape)) for shape in shapes(config, n_positions))
    dtype, scaled, _ = KINDS[kind]
    return (keys + values) * dtype.itemsize + (2 * scales * 4 if scaled else 0)
