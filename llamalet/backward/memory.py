"""Memory that is counted before it is taken.

A layout is a function that asks for arrays with `take(*shape, dtype=)` and returns them. It is called twice: first with
a `take` that only counts, then with one that returns parts of a single allocation. One large allocation gets large
pages from the system, which the processor finds faster than many small ones.

Products of bfloat16 read up to 15 rows after the last of an operand, and ignore them. So the allocation goes on after
the last array by as much of the widest operand.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llamalet.aligned import ALIGNMENT, aligned_zeros
from llamalet.kernels.bfloat16 import TILE_ROWS

Array = NDArray[np.float32]
Result = TypeVar("Result")
Take = Callable[..., Any]


class Counter:
    """Counts the bytes that arrays take up."""

    def __init__(self) -> None:
        self.n_bytes = self.read_after = 0

    def take(self, *shape: int, dtype: type[np.generic] = np.float32) -> Any:
        """Count an array of this shape and type."""
        if dtype is np.uint16 and len(shape) > 1:
            self.read_after = max(self.read_after, TILE_ROWS * shape[-1] * np.dtype(dtype).itemsize)
        self.n_bytes += -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT


class Memory(Counter):
    """One allocation, from which arrays are taken, each at a multiple of ALIGNMENT bytes."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self._bytes = aligned_zeros((n_bytes,), np.uint8)

    def take(self, *shape: int, dtype: type[np.generic] = np.float32) -> NDArray[Any]:
        """Return an array of this shape and type, all zeros."""
        first = self.n_bytes
        super().take(*shape, dtype=dtype)
        return self._bytes[first : first + math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


def bytes_of(layout: Callable[[Take], Any]) -> int:
    """Return the bytes that a layout takes."""
    counter = Counter()
    layout(counter.take)
    return counter.n_bytes + counter.read_after


def allocate(layout: Callable[[Take], Result]) -> Result:
    """Return a layout of arrays, all zeros.

    Raises:
        MemoryError: if there is not as much memory.
    """
    return layout(Memory(bytes_of(layout)).take)
