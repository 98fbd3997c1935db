"""Attention and its adjoint: `attention` and `attention_backward`, some rows of a head's scores at a time.

A query head has T x T scores, far more than its activations. So they are computed for QUERIES queries at a time, and
become weights and gradients while they are in a core's caches. The backward pass computes them again.

    forward     some rows of q k^T, and of the weights; mixed = weights v
    backward    the same rows, those of d_weights = d_mixed v^T, and of d_scores; d_q = d_scores k
                when all rows are there: d_k = d_scores^T q, d_v = weights^T d_mixed

Each row is computed up to the end of its tile, and the weights of the future there are zero: a pass over rows of 1, 2,
3 ... numbers would take the last ones of each singly.

The shape letters are those of backward/reference.py; arrays are float32, operands as in ops.py.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import float32

from llamalet.backward.memory import Take
from llamalet.backward.ops import drop_row
from llamalet.kernels import products, simd
from llamalet.kernels.bfloat16 import TERMS, stored
from llamalet.kernels.jit import inlined_kernel, inner_kernel, kernel
from llamalet.kernels.ops import dot
from llamalet.kernels.powers import write_powers
from llamalet.kernels.threads import blocks

QUERIES = TERMS
"""Queries at a time: the rows that prepare_transpose_of_lower takes, and whole tiles of products of every kind."""


class AttentionSpace(NamedTuple):
    """Memory for a head, for each thread.

    scores: (threads, QUERIES, T), then the weights.
    d_weights: (threads, QUERIES, T).
    tile: (threads, QUERIES, D), the result of some queries.
    weights: (threads, T, T), an operand; some may be dropped.
    d_scores: (threads, T, T), an operand.
    d_mixed: (threads, T, D), an operand.
    keys: (T, D) packed by rows, see products.panels_shape.
    values: likewise.
    columns: a matrix (T, D) packed by columns.
    transposed: room for products.transpose_of a matrix (T, T); to left_of it only says the type.
    edges: (threads, *EDGE_SHAPE).
    """

    scores: Any
    d_weights: Any
    tile: Any
    weights: Any
    d_scores: Any
    d_mixed: Any
    keys: Any
    values: Any
    columns: Any
    transposed: Any
    edges: Any


def lay_out(n_positions: int, head_dim: int, n_threads: int, rounded: bool, take: Take) -> AttentionSpace:
    """Return the memory for heads of T = n_positions and D = head_dim; see workspace.lay_out."""
    T, D = n_positions, head_dim
    kind = products.PAIRS if rounded else products.FLOATS

    return AttentionSpace(
        scores=take(n_threads, QUERIES, T),
        d_weights=take(n_threads, QUERIES, T),
        tile=take(n_threads, QUERIES, D),
        weights=take(n_threads, T, kind.width(T), dtype=kind.operand),
        d_scores=take(n_threads, T, kind.width(T), dtype=kind.operand),
        d_mixed=take(n_threads, T, kind.width(D), dtype=kind.operand),
        keys=take(n_threads, *kind.panels_shape(D, T), dtype=kind.packed),
        values=take(n_threads, *kind.panels_shape(D, T), dtype=kind.packed),
        columns=take(n_threads, *kind.panels_shape(T, D), dtype=kind.packed),
        transposed=take(n_threads, *kind.left_shape(T, T), dtype=kind.operand),
        edges=take(n_threads, *products.EDGE_SHAPE),
    )


@kernel
def attention(q: Any, k: Any, v: Any, drop: Any, mixed: Any, space: Any, team: Any) -> None:
    """Let each position attend to itself and those before it; a block is a query head of a sequence.

    Args:
        q: (B, H, T, D), an operand.
        k: (B, G, T, D), an operand.
        v: (B, G, T, D), an operand.
        drop: dropout of the weights.
        mixed: (N, H * D), the result, an operand.
        space: AttentionSpace.
        team: see threads.Team.
    """
    _, H, T, _ = q.shape
    group = H // k.shape[1]
    for block in blocks(team):
        b, h, thread = block // H, block % H, team.thread
        scores, tile, weights = space.scores[thread], space.tile[thread], space.weights[thread]
        D = tile.shape[1]
        scale = float32(1) / np.sqrt(float32(D))
        pack_head(k[b, h // group], space.keys[thread])
        products.pack_columns(v[b, h // group], space.columns[thread], 0, T)
        for first in range(0, T, QUERIES):
            end = min(first + QUERIES, T)
            multiply_keys(q[b, h, first:end], space.keys[thread], scores, end, space, thread)
            hide_future(scores, first, end)
            for t in range(first, end):
                row = scores[t - first, :end]
                soften(row, scale)
                drop_row(row, drop, (block * T + t) * T, weights[t - first])
            multiply_lower(weights[: end - first], end, tile[: end - first], space, thread)
            store_rows(tile[: end - first], mixed[b * T + first : b * T + end, h * D : (h + 1) * D])


@kernel
def attention_backward(
    d_mixed: Any, q: Any, k: Any, v: Any, drop: Any, d_q: Any, d_k: Any, d_v: Any, space: Any, team: Any
) -> None:
    """Write the gradients of q, k and v; a block is a kv head of a sequence, with all its query heads in their order.

    Args:
        d_mixed: (N, H * D).
        q: (B, H, T, D), an operand.
        k: (B, G, T, D), an operand.
        v: (B, G, T, D), an operand.
        drop: dropout of the weights.
        d_q: (B, H, T, D).
        d_k: (B, G, T, D).
        d_v: (B, G, T, D).
        space: AttentionSpace.
        team: see threads.Team.
    """
    _, H, T, D = d_q.shape
    G = k.shape[1]
    group = H // G
    for block in blocks(team):
        b, g, thread = block // G, block % G, team.thread
        pack_head(k[b, g], space.keys[thread])
        pack_head(v[b, g], space.values[thread])
        for h in range(g * group, (g + 1) * group):
            d_out, add, head = d_mixed[b * T : (b + 1) * T, h * D : (h + 1) * D], h > g * group, b * H + h
            store_rows(d_out, space.d_mixed[thread])
            products.pack_columns(k[b, g], space.columns[thread], 0, T)
            for first in range(0, T, QUERIES):
                backward_tile(q[b, h], first, drop, head, d_q[b, h], space, thread)
            products.pack_columns(q[b, h], space.columns[thread], 0, T)
            multiply_transpose(space.d_scores[thread], d_k[b, g], add, space, thread)
            products.pack_columns(d_out, space.columns[thread], 0, T)
            multiply_transpose(space.weights[thread], d_v[b, g], add, space, thread)


@inlined_kernel
def backward_tile(q: Any, first: int, drop: Any, head: int, d_q: Any, space: Any, thread: int) -> None:
    """Write the weights, the gradients of the scores and d_q, of some queries of a head; q and d_q are (T, D)."""
    T, D = d_q.shape
    end, scale = min(first + QUERIES, T), float32(1) / np.sqrt(float32(D))
    scores, d_weights = space.scores[thread], space.d_weights[thread]
    weights, d_scores = space.weights[thread], space.d_scores[thread]
    multiply_keys(q[first:end], space.keys[thread], scores, end, space, thread)
    multiply_keys(space.d_mixed[thread][first:end], space.values[thread], d_weights, end, space, thread)
    hide_future(scores, first, end)
    for t in range(first, end):
        row, d_row, index = scores[t - first, :end], d_weights[t - first, :end], (head * T + t) * T
        soften(row, scale)
        if drop.rate != 0:
            drop_row(d_row, drop, index, d_row)
        write_score_gradients(row, d_row, scale, d_scores[t])
        drop_row(row, drop, index, weights[t])
    multiply_lower(d_scores[first:end], end, d_q[first:end], space, thread)


@inner_kernel
def hide_future(scores: Any, first: int, end: int) -> None:
    """Make the products q k^T of queries first..end (QUERIES, T) with later keys, up to `end`, minus infinity."""
    for t in range(first, end):
        for s in range(t + 1, end):
            scores[t - first, s] = -np.inf


@inner_kernel
def soften(scores: Any, scale: float) -> None:
    """Replace the products q k^T of a query (n,) by its weights: softmax(q k^T * scale)."""
    factor = float32(1) / write_powers(scores, simd.largest(scores), scale, float32(1), scores)
    for s in range(len(scores)):
        scores[s] *= factor


@inner_kernel
def write_score_gradients(weights: Any, d_weights: Any, scale: float, out: Any) -> None:
    """Write the gradients of the products q k^T of a query to out, from those of its weights (n,).

    The adjoint of `soften`: weights * (d_weights - weights . d_weights) * scale.
    """
    mean = dot(d_weights, weights)
    for s in range(len(weights)):
        out[s] = stored(weights[s] * (d_weights[s] - mean) * scale, out)


@inner_kernel
def pack_head(x: Any, panels: Any) -> None:
    """Pack a head (T, D) by rows."""
    for panel in range(len(panels)):
        products.pack_rows(x, panels, panel)


@inner_kernel
def store_rows(x: Any, out: Any) -> None:
    """Write x (T, D) to out, an operand."""
    for t in range(len(x)):
        for i in range(x.shape[1]):
            out[t, i] = stored(x[t, i], out)


@inlined_kernel
def multiply_keys(left: Any, right: Any, out: Any, end: int, space: Any, thread: int) -> None:
    """Write left @ right, up to the column `end`, to the first rows of out (QUERIES, T)."""
    rows = (0, len(left))
    operand = products.left_of(left, space.transposed[thread])
    products.multiply_range(operand, right, out, False, rows, (0, end), (0, right.shape[1]), space.edges[thread])


@inlined_kernel
def multiply_lower(left: Any, end: int, out: Any, space: Any, thread: int) -> None:
    """Write left @ space.columns to out; left is some rows of a lower triangle: columns after `end` do not count."""
    operand, right = products.left_of(left, space.transposed[thread]), space.columns[thread]
    terms = products.terms_of(operand, 0, end)
    products.multiply_range(operand, right, out, False, (0, len(out)), (0, out.shape[1]), terms, space.edges[thread])


@inlined_kernel
def multiply_transpose(lower: Any, out: Any, add: bool, space: Any, thread: int) -> None:
    """Write lower^T @ space.columns to out (T, D), or add it; lower is a lower triangle (T, T)."""
    T, D = out.shape
    room, right = space.transposed[thread], space.columns[thread]
    products.prepare_transpose_of_lower(lower, room)
    left = products.transpose_of(room)
    for first in range(0, T, QUERIES):
        rows, terms = (first, min(first + QUERIES, T)), products.terms_of(left, first, T)
        products.multiply_range(left, right, out, add, rows, (0, D), terms, space.edges[thread])
