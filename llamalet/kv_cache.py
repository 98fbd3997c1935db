"""The keys and values of past positions: with them a new token costs one position instead of all."""

import copy
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig, rope_frequencies
from llamalet.errors import UsageError

Array = NDArray[np.float32]

# The largest error of rotating a pair of components once, relative to its length. In units of 2^-24: the rotation is
# rounded in both components (0.8), and a product of complex numbers adds the square root of 5 (2.3).
# Source: https://doi.org/10.1090/S0025-5718-07-01931-X
ROLL_ERROR = 4 * 2.0**-24

MEMINFO = Path("/proc/meminfo")


class KVCache:
    """The keys and values of the positions so far; it grows with them.

    Attributes:
        keys: (L, G, capacity, D), of which the first `length` positions are in use.
        values: (L, G, capacity, D).
        length: number of positions.
        context: the largest number of positions allowed.
    """

    def __init__(self, config: ModelConfig, capacity: int = 0) -> None:
        self._config = config
        self.context = config.max_seq_len
        shape = (config.n_layers, config.n_kv_heads, min(capacity, config.max_seq_len), config.head_dim)
        self.keys: Array = np.empty(shape, np.float32)
        self.values: Array = np.empty(shape, np.float32)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Number of positions that fit into the memory allocated so far."""
        return self.keys.shape[2]

    def reserve(self, length: int) -> None:
        """Make room for `length` positions, at least doubling the capacity if it must grow, so that copies are rare.

        Raises:
            UsageError: if the model's context or the free memory is too small for that.
        """
        if length > self.context:
            raise UsageError(f"{length} positions: the model's context is {self.context}")
        if length > self.capacity:
            capacity = min(max(length, 2 * self.capacity, 64), self.context)
            n_bytes, n_free = cache_bytes(self._config, capacity), free_memory()
            if n_bytes > n_free:
                raise UsageError(
                    f"a KV cache of {capacity} positions takes {n_bytes / 1e6:.0f} MB, and {n_free / 1e6:.0f} MB of "
                    "memory are free: use shorter texts or fewer at once"
                )
            self.keys, self.values = (self._grown(array, capacity) for array in (self.keys, self.values))

    def truncate(self, length: int) -> None:
        """Drop all positions from `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length

    def copy(self) -> "KVCache":
        """Return an independent copy, with no spare capacity."""
        twin = copy.copy(self)
        twin.keys, twin.values = (self._grown(array, self.length) for array in (self.keys, self.values))
        return twin

    def roll(self, keep: int, drop: int) -> None:
        """Drop positions keep .. keep + drop - 1; later ones move down by `drop`, and the length shrinks.

        RoPE has rotated each pair of a key's components by an angle proportional to its position, so the moved keys are
        rotated back by `drop` positions. A pair is two neighbours, in memory a complex number, and rotating it is one
        product. The angle is computed in float64, so a roll adds an error of at most `ROLL_ERROR` of a pair's length,
        at any position, and n rolls at most n times as much. The arrays are changed in place.

        Args:
            keep: number of first positions that stay as they are.
            drop: number of positions to drop after them.

        Raises:
            UsageError: if the cache has fewer positions.

        Source: https://arxiv.org/abs/2309.17453, section 3.2.
        """
        if not (keep >= 0 <= drop and keep + drop <= self.length):
            raise UsageError(f"cannot keep {keep} and drop {drop} of a cache of {self.length} positions")
        turn = np.exp(-1j * drop * rope_frequencies(self._config)).astype(np.complex64)  # (D / 2,)
        old, new = slice(keep + drop, self.length), slice(keep, self.length - drop)
        # Layer by layer, to keep the temporaries small.
        for keys, values in zip(self.keys, self.values, strict=True):  # (G, capacity, D) each
            pairs = keys.view(np.complex64)  # (G, capacity, D / 2)
            pairs[:, new] = pairs[:, old] * turn
            values[:, new] = values[:, old]
        self.length -= drop

    def _grown(self, array: Array, capacity: int) -> Array:
        """Return a copy of keys or values with room for `capacity` positions."""
        n_layers, n_kv_heads, _, head_dim = array.shape
        grown = np.empty((n_layers, n_kv_heads, capacity, head_dim), np.float32)
        grown[:, :, : self.length] = array[:, :, : self.length]
        return grown


def cache_bytes(config: ModelConfig, n_positions: int) -> int:
    """Return the size of a cache with room for this many positions, in bytes."""
    return 2 * config.n_layers * config.kv_dim * n_positions * np.dtype(np.float32).itemsize


def free_memory() -> int:
    """Return the bytes that can still be allocated without swapping; if the system does not say, all memory."""
    try:
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
