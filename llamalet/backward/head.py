"""The head: from the last activations to the loss, and back, some columns of the vocabulary at a time.

All logits (N, V) together would be by far the largest array of a step. Each is needed twice: for the sum that a row's
softmax divides by, and for its own gradient. bfloat16 products are so fast that computing a logit again takes less time
than keeping it. In float32 the logits of some rows are kept.

    forward     a block of columns: its logits, and of each row their largest and the sum of their powers
    losses      some rows: the sums of all blocks together
    backward    a block of columns: the gradient of its logits, and with it that of its rows of the output matrix

TrainingModel._head calls them, and makes the gradient of the activations from those of the logits, group by group. R is
the rows at a time, all N or fewer; the other shape letters are those of backward/reference.py.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import float32

from llamalet.backward.memory import Take
from llamalet.backward.ops import BLOCK_ROWS
from llamalet.kernels import products, simd
from llamalet.kernels.bfloat16 import LANES, stored
from llamalet.kernels.jit import inlined_kernel, kernel
from llamalet.kernels.layers import FLOAT_BYTES
from llamalet.kernels.powers import sum_of_powers, write_powers
from llamalet.kernels.threads import blocks

COLUMNS = 192
"""Columns of the vocabulary in a block: whole tiles."""

GROUP = 16
"""Blocks whose gradients are kept at a time."""

ROWS = 256
"""Rows of a block computed at a time: its logits stay in a core's second cache."""

LOGITS_BYTES = 1 << 27
"""The logits of so many rows are kept in float32 as fit into this many bytes. For each such part of the rows, the
output matrix is packed again, and its gradient read and written again."""


class HeadSpace(NamedTuple):
    """Memory for the head.

    kept: whether logits are kept.
    logits: float32 (blocks, R, COLUMNS) if they are, else (threads, ROWS, COLUMNS).
    largest_parts: float32 (blocks, R), the largest logit of each row in each block.
    sum_parts: float32 (blocks, R), the sum of exp(logit - that), without the target's.
    at_target: float32 (R,), the target's logit.
    largest: float32 (R,), the largest logit.
    factors: float32 (R,), what exp(logit - largest) is multiplied with to give the logit's gradient.
    d_target: float32 (R,), the gradient of the target's logit.
    d_logits: (R, GROUP * COLUMNS) or less, the gradients of a group, an operand.
    left: room for products.transpose_of, for each thread; to left_of it only says the type.
    edges: (threads, *products.EDGE_SHAPE).
    """

    kept: bool
    logits: Any
    largest_parts: Any
    sum_parts: Any
    at_target: Any
    largest: Any
    factors: Any
    d_target: Any
    d_logits: Any
    left: Any
    edges: Any


def n_blocks(vocab_size: int) -> int:
    """Return the number of blocks of columns."""
    return -(-vocab_size // COLUMNS)


def rows_at_once(n_rows: int, vocab_size: int, *, rounded: bool) -> int:
    """Return R: all n_rows rows if products multiply bfloat16, else as many as have their logits kept."""
    of_row = FLOAT_BYTES * n_blocks(vocab_size) * COLUMNS
    return n_rows if rounded else min(n_rows, max(1, LOGITS_BYTES // of_row))


def lay_out(n_rows: int, vocab_size: int, n_threads: int, rounded: bool, take: Take) -> HeadSpace:
    """Return the memory for n_rows rows (N); the other arguments are those of workspace.lay_out."""
    R, count = rows_at_once(n_rows, vocab_size, rounded=rounded), n_blocks(vocab_size)
    kind = products.PAIRS if rounded else products.FLOATS
    return HeadSpace(
        kept=not rounded,
        logits=take(n_threads, ROWS, COLUMNS) if rounded else take(count, R, COLUMNS),
        largest_parts=take(count, R),
        sum_parts=take(count, R),
        at_target=take(R),
        largest=take(R),
        factors=take(R),
        d_target=take(R),
        d_logits=take(R, min(count, GROUP) * COLUMNS, dtype=kind.operand),
        left=take(n_threads, *kind.left_shape(R, COLUMNS), dtype=kind.operand),
        edges=take(n_threads, *products.EDGE_SHAPE),
    )


@kernel
def forward(normed: Any, panels: Any, vocab_size: int, targets: Any, space: Any, team: Any) -> None:
    """Write the largest logit and the sum of the powers of each row, block by block, and the targets' logits.

    Args:
        normed: (R, C), an operand.
        panels: the output matrix (V, C), packed by rows.
        vocab_size: V.
        targets: (R,).
        space: HeadSpace.
        team: a block is one of columns.
    """
    for block in blocks(team):
        column, n = block * COLUMNS, min(COLUMNS, vocab_size - block * COLUMNS)
        for first in range(0, len(targets), ROWS):
            end = min(first + ROWS, len(targets))
            room, row = (block, first) if space.kept else (team.thread, 0)
            logits = space.logits[room, row : row + end - first]
            compute_logits(normed[first:end], panels, column, n, logits, space, team.thread)
            for t in range(end - first):
                numbers, target = logits[t, :n], targets[first + t] - column
                largest = simd.largest(numbers)
                space.largest_parts[block, first + t] = largest
                if 0 <= target < n:
                    at_target, numbers[target] = numbers[target], float32(-np.inf)
                    space.sum_parts[block, first + t] = sum_of_powers(numbers, largest, float32(1))
                    space.at_target[first + t] = numbers[target] = at_target
                else:
                    space.sum_parts[block, first + t] = sum_of_powers(numbers, largest, float32(1))


@inlined_kernel
def compute_logits(normed: Any, panels: Any, column: int, n: int, logits: Any, space: Any, thread: int) -> None:
    """Write n columns of the logits, from `column` on, to logits (rows, COLUMNS)."""
    left = products.left_of(normed, space.left[thread])
    own = panels[column // LANES : (column + n + LANES - 1) // LANES]
    terms = (0, panels.shape[1])
    products.multiply_range(left, own, logits, False, (0, len(normed)), (0, n), terms, space.edges[thread])


@kernel
def losses(targets: Any, divisor: float, losses: Any, space: Any, team: Any) -> None:
    """Write each row's loss, and what its gradients are made with.

    Args:
        targets: (R,); where one is IGNORED (negative), loss and gradient are zero.
        divisor: what gradients are divided by: the targets of the whole batch that count, float32.
        losses: float32 (R,).
        space: HeadSpace.
        team: a block is BLOCK_ROWS rows.
    """
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(targets))):
            largest = float32(-np.inf)
            for part in range(len(space.largest_parts)):
                largest = max(largest, space.largest_parts[part, t])
            # The target's probability minus 1 is minus that of all others. A difference would lose its digits near 1.
            others, power = float32(0), simd.exp(space.at_target[t] - largest)
            for part in range(len(space.sum_parts)):
                others += space.sum_parts[part, t] * simd.exp(space.largest_parts[part, t] - largest)
            space.largest[t] = largest
            if targets[t] < 0:
                losses[t] = space.factors[t] = space.d_target[t] = float32(0)
            else:
                losses[t] = np.log(others + power) + largest - space.at_target[t]
                space.factors[t] = float32(1) / ((others + power) * divisor)
                space.d_target[t] = -others * space.factors[t]


@kernel
def backward(
    normed: Any, panels: Any, vocab_size: int, targets: Any, by_columns: Any, first_block: int, d_output: Any,
    add: bool, space: Any, team: Any,
) -> None:  # fmt: skip
    """Write the gradients of a group's logits to space.d_logits, and those of its rows of the output matrix.

    Args:
        normed: (R, C), an operand.
        panels: the output matrix (V, C), packed by rows.
        vocab_size: V.
        targets: (R,).
        by_columns: normed, packed by columns.
        first_block: the group's first.
        d_output: (V, C).
        add: whether to add to what is there.
        space: HeadSpace.
        team: a block is one of columns.
    """
    for block in blocks(team):
        column = (first_block + block) * COLUMNS
        n, R, first_column = min(COLUMNS, vocab_size - column), len(targets), block * COLUMNS
        for first in range(0, R, ROWS):
            end = min(first + ROWS, R)
            room, row = (first_block + block, first) if space.kept else (team.thread, 0)
            logits = space.logits[room, row : row + end - first]
            if not space.kept:
                compute_logits(normed[first:end], panels, column, n, logits, space, team.thread)
            for t in range(first, end):
                numbers, d_row = logits[t - first, :n], space.d_logits[t, first_column : first_column + n]
                target = targets[t] - column
                write_powers(numbers, space.largest[t], float32(1), space.factors[t], d_row)
                if 0 <= target < n:
                    d_row[target] = stored(space.d_target[t], d_row)
        left = space.left[team.thread]
        products.prepare_transpose(space.d_logits[:R, first_column : first_column + n], left)
        products.multiply_range(
            products.transpose_of(left), by_columns, d_output[column : column + n], add, (0, n),
            (0, d_output.shape[1]), (0, by_columns.shape[1]), space.edges[team.thread],
        )  # fmt: skip
