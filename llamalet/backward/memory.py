"""Memory that is counted before it is taken.

A layout is a function that asks for arrays with `take(*shape)` and returns them. It is called twice: first with a
`take` that only counts, then with one that returns parts of a single allocation. One large allocation gets large pages
from the system, which the processor finds faster than many small ones.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llamalet.kernels.layers import FLOAT_BYTES, address_of

Array = NDArray[np.float32]
Result = TypeVar("Result")
Take = Callable[..., Any]

ALIGNMENT = 16
"""Every array begins at a multiple of this many numbers: a cache line, the widest vector."""


class Counter:
    """Counts the numbers that arrays take up."""

    def __init__(self) -> None:
        self.count = 0

    def take(self, *shape: int) -> Any:
        """Count an array of this shape."""
        self.count += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


class Memory(Counter):
    """One allocation, from which arrays are taken, each at a multiple of ALIGNMENT numbers."""

    def __init__(self, count: int) -> None:
        super().__init__()
        whole = np.zeros(count + ALIGNMENT, np.float32)
        self._numbers = whole[-address_of(whole) // whole.itemsize % ALIGNMENT :][:count]

    def take(self, *shape: int) -> Array:
        """Return an array of this shape, all zeros."""
        first = self.count
        super().take(*shape)
        return self._numbers[first : first + math.prod(shape)].reshape(shape)


def bytes_of(layout: Callable[[Take], Any]) -> int:
    """Return the bytes that a layout takes."""
    counter = Counter()
    layout(counter.take)
    return counter.count * FLOAT_BYTES


def allocate(layout: Callable[[Take], Result]) -> Result:
    """Return a layout of arrays, float32 and all zeros.

    Raises:
        MemoryError: if there is not as much memory.
    """
    return layout(Memory(bytes_of(layout) // FLOAT_BYTES).take)
