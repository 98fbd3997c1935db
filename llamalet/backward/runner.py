"""Runs the functions of ops.py, attention.py and head.py on a team of threads, and makes products with them."""

import math
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet.backward import ops
from llamalet.backward.memory import Array
from llamalet.kernels import bfloat16, products
from llamalet.kernels import cache as kernel_cache
from llamalet.kernels.threads import BLOCK_MASK, Team, ThreadTeam


class Runner:
    """A team of threads.

    Args:
        n_threads: number of threads, the caller's included.
        edges: float32 (threads, *products.EDGE_SHAPE), overwritten.
    """

    def __init__(self, n_threads: int, edges: Array) -> None:
        self.n_threads = n_threads
        self._team, self._edges = ThreadTeam(_call, n_threads), edges
        weakref.finalize(self, self._team.stop)  # else its threads would keep the last op's memory

    def run(self, op: Any, n_blocks: int, *arguments: Any) -> None:
        """Run an op of n_blocks blocks, at most threads.BLOCK_MASK, on all threads."""
        assert 0 < n_blocks <= BLOCK_MASK, f"{op.__name__}: {n_blocks} blocks"
        if not op.signatures:
            kernel_cache.enable(op)
        self._team.run((op, np.array([n_blocks, 0]), arguments))

    def by_rows(self, op: Any, n_rows: int, *arguments: Any) -> None:
        """Run an op whose blocks are ops.BLOCK_ROWS rows."""
        self.run(op, -(-n_rows // ops.BLOCK_ROWS), *arguments)

    def pack_rows(self, weight: NDArray[Any], memory: NDArray[Any]) -> NDArray[Any]:
        """Return a matrix (n, depth) packed by rows, in a part of `memory` (numbers,)."""
        n, depth = weight.shape
        panels = panels_in(memory, depth, n)
        self.run(ops.pack_rows, len(panels), weight, panels)
        return panels

    def pack_columns(self, x: NDArray[Any], memory: NDArray[Any]) -> NDArray[Any]:
        """Return a matrix (depth, n) packed by columns, in a part of `memory` (numbers,)."""
        panels = panels_in(memory, *x.shape)
        self.by_rows(ops.pack_columns, len(x), x, panels)
        return panels

    def transposed(self, x: NDArray[Any], memory: NDArray[Any]) -> NDArray[Any]:
        """Return the transpose of a matrix (depth, n) as a left side, in a part of `memory` (numbers,)."""
        if x.dtype != np.uint16:
            return self.pack_columns(x, memory)
        shape = bfloat16.transposed_shape(*x.shape)
        out = memory[: math.prod(shape)].reshape(shape)
        self.by_rows(ops.transpose, len(x), x, out)
        return out

    def product(self, left: NDArray[Any], right: NDArray[Any], out: Array, *, add: bool = False) -> None:
        """Compute out = left @ right, or add it to out; see products.multiply."""
        if left.dtype == np.uint16:
            left = left.view(np.uint32)
        blocks = products.blocks_of(*out.shape)
        self.run(ops.multiply, blocks.n, left, right, out, add, blocks, self._edges)


def panels_in(memory: NDArray[Any], depth: int, n: int) -> NDArray[Any]:
    """Return the part of `memory` (numbers,) that a packed matrix (depth, n) takes: float32, or pairs in uint32."""
    shape = (bfloat16 if memory.dtype == np.uint32 else products).panels_shape(depth, n)
    return memory[: math.prod(shape)].reshape(shape)


def _call(op: Any, n_blocks: Any, arguments: Any, shared: Any, generation: int, thread: int) -> None:
    """Run an op on one thread."""
    op(*arguments, Team(shared, n_blocks, generation, thread))
