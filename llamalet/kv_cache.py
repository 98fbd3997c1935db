"""The keys and values of past positions, which make a new token cost one position instead of all."""

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig
from llamalet.errors import UsageError

Array = NDArray[np.float32]


class KVCache:
    """The keys and values of the positions so far; it grows as they come.

    Attributes:
        keys: (L, G, capacity, D), of which the first `length` positions are in use.
        values: (L, G, capacity, D).
        length: number of positions.
    """

    def __init__(self, config: ModelConfig, capacity: int = 0) -> None:
        self._max_seq_len = config.max_seq_len
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
            UsageError: if that is more than the model's context.
        """
        if length > self._max_seq_len:
            raise UsageError(f"{length} positions: the model's context is {self._max_seq_len}")
        if length > self.capacity:
            capacity = min(max(length, 2 * self.capacity, 64), self._max_seq_len)
            self.keys, self.values = (self._grown(array, capacity) for array in (self.keys, self.values))

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length

    def _grown(self, array: Array, capacity: int) -> Array:
        """Return a copy of keys or values with room for `capacity` positions."""
        n_layers, n_kv_heads, _, head_dim = array.shape
        grown = np.empty((n_layers, n_kv_heads, capacity, head_dim), np.float32)
        grown[:, :, : self.length] = array[:, :, : self.length]
        return grown
