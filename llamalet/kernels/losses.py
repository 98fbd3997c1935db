"""Negative log-probabilities, compiled: `reference.losses`."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import float32, float64
from numpy.typing import NDArray

from llamalet.kernels import cache
from llamalet.kernels.jit import kernel
from llamalet.kernels.powers import sum_of_powers
from llamalet.kernels.sampling import largest_if_finite

BLOCK = 1024
"""Powers that are added in float32; the sums of blocks are added in float64."""


class Losses:
    """A compiled `reference.losses`; it is compiled at the first call, because most programs make none."""

    def __init__(self) -> None:
        self._write: Callable[..., None] | None = None

    def __call__(self, logits: NDArray[np.float32], targets: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """See reference.losses; there must be a target in the vocabulary for each row."""
        n, vocab_size = logits.shape
        if len(targets) != n or np.any((targets < 0) | (targets >= vocab_size)):
            raise IndexError(f"{len(targets)} targets for {n} rows of {vocab_size} logits, or one outside of them")
        nats = np.empty(n)
        arguments = np.ascontiguousarray(logits), targets.astype(np.int64), nats
        self._write = self._write or compile_losses(arguments)
        self._write(*arguments)
        return nats


def compile_losses(arguments: tuple[Any, ...]) -> Callable[..., None]:
    """Return `write_losses` for arguments of these types, compiled or from the cache."""
    if not write_losses.signatures:
        cache.enable(write_losses)
    with cache.without_collecting():
        return write_losses.compile(tuple(map(numba.typeof, arguments)))


@kernel
def write_losses(logits: Any, targets: Any, out: Any) -> None:
    """Write -log softmax(logits)[target] for each row of (n, V) to out (n,), or NaN if a logit is not finite."""
    for t in range(len(targets)):
        row = logits[t]
        peak, total = largest_if_finite(row), float64(0)  # NaN makes the loss NaN, too
        for first in range(0, len(row), BLOCK):
            total += sum_of_powers(row[first : first + BLOCK], peak, float32(1))
        out[t] = np.log(total) + peak - row[targets[t]]
