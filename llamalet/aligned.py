"""Arrays that begin where a cache line of the processor does, and the addresses of arrays."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector."""


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return zeros that begin at a multiple of ALIGNMENT bytes, where the processor loads vectors and tiles fastest."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(n_bytes + ALIGNMENT, np.uint8)
    first = -address_of(memory) % ALIGNMENT
    return memory[first : first + n_bytes].view(dtype).reshape(shape)


def address_of(array: NDArray[Any]) -> int:
    """Return the address of an array's first element."""
    address: int = array.__array_interface__["data"][0]
    return address
