"""The keys and values of past positions, which make a new token cost one position instead of all."""

import copy
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig, rope_frequencies
from llamalet.errors import UsageError

Array = NDArray[np.float32]

# The most that turning a pair of components once may be off, as a share of its length. In units of 2^-24: the turn
# itself is rounded in both components (0.8), and a product of complex numbers costs the square root of 5 (2.3).
# Source: https://doi.org/10.1090/S0025-5718-07-01931-X
ROLL_ERROR = 4 * 2.0**-24

MEMINFO = Path("/proc/meminfo")


class KVCache:
    """The keys and values of the positions so far; it grows as they come.

    Attributes:
        keys: (L, G, capacity, D), of which the first `length` positions are in use.
        values: (L, G, capacity, D).
        length: number of positions.
        context: the most positions that it may have.
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
        """Positions that there is memory for."""
        return self.keys.shape[2]

    def reserve(self, length: int) -> None:
        """Make room for `length` positions; doubling keeps the copying small.

        Raises:
            UsageError: if that is more than the model's context, or than the machine has memory for.
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
        """Forget everything from position `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length

    def copy(self) -> "KVCache":
        """Return a cache of the same positions that goes its own way from here."""
        twin = copy.copy(self)
        twin.keys, twin.values = (self._grown(array, self.length) for array in (self.keys, self.values))
        return twin

    def roll(self, keep: int, drop: int) -> None:
        """Forget positions keep .. keep + drop - 1; those after them move down by `drop` and the length shrinks.

        A key holds its position as an angle for each pair of components, so the moved keys are turned back by `drop`
        positions. RoPE's pairs are neighbours, in memory complex numbers, and to turn them is one product. The angle is
        computed in float64, so a roll costs a pair at most `ROLL_ERROR` of its length, wherever it stands, and n rolls
        at most n times as much. Nothing is allocated for good: the arrays stay those they were.

        Args:
            keep: first positions that stay as they are.
            drop: positions to forget.

        Raises:
            UsageError: if the cache has not so many positions.

        Source: https://arxiv.org/abs/2309.17453, section 3.2.
        """
        if not (keep >= 0 <= drop and keep + drop <= self.length):
            raise UsageError(f"cannot keep {keep} and drop {drop} of a cache of {self.length} positions")
        turn = np.exp(-1j * drop * rope_frequencies(self._config)).astype(np.complex64)  # (D / 2,)
        old, new = slice(keep + drop, self.length), slice(keep, self.length - drop)
        # Layer by layer, so that what is moved needs little memory besides the cache.
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
    """Return the bytes that can still be allocated without swapping; where the system does not tell, what it has."""
    try:
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
