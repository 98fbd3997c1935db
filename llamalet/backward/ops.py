"""The functions of backward/reference.py as machine code, under their names there.

Each writes to memory that the caller provides, checks no shapes, and shares its blocks with a team of threads. Which
blocks there are follows from the shapes, and where blocks add up, their parts are added in the order of the blocks. So
the bits do not depend on the number of threads. N is B * T, all positions of a batch; the other shape letters are those
of backward/reference.py.

Arrays are float32. Operands of products, marked so below, may also be bfloat16, see kernels/bfloat16.py; their rows are
then longer than their numbers, filled up with zeros that nobody overwrites.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import float32, uint64

from llamalet.backward.dropout import GAMMA, MULTIPLIERS
from llamalet.kernels import bfloat16, products, simd
from llamalet.kernels.bfloat16 import stored
from llamalet.kernels.jit import inlined_kernel, inner_kernel, kernel, summing_kernel
from llamalet.kernels.ops import dot
from llamalet.kernels.powers import sum_of_powers, write_powers
from llamalet.kernels.shared import shared_kernel
from llamalet.kernels.threads import blocks

BLOCK_ROWS = 32
"""Positions in a block of the functions that treat each position by itself."""

BLOCK_COLUMNS = 32
"""Columns in a block of embed_backward."""

LOWER_ROWS = 32
"""Rows of a lower triangle that are zero up to the same column: whole tiles of every kind."""

GAMMA_64, FACTOR_1, FACTOR_2 = (np.uint64(value) for value in (GAMMA, *MULTIPLIERS))


class Drop(NamedTuple):
    """Dropout at one place: Dropout.state of it, uint64, and the rate, float32."""

    state: Any
    rate: Any


class AttentionSpace(NamedTuple):
    """Memory for attention's heads, for each thread.

    weights: (threads, T, T).
    d_weights: (threads, T, T).
    head: (threads, T, D).
    by_rows: a matrix (T, D) packed by rows, see products.panels_shape.
    by_columns: one packed by columns, likewise.
    left: room for products.left_of and products.transpose_of.
    edges: (threads, *EDGE_SHAPE).
    """

    weights: Any
    d_weights: Any
    head: Any
    by_rows: Any
    by_columns: Any
    left: Any
    edges: Any


# -- dropout ----------------------------------------------------------------------------------------------------------


@inner_kernel
def scale_of(drop: Any, index: int) -> float:
    """Return what dropout multiplies a value with; see Dropout.scales."""
    z = drop.state + (uint64(index) + uint64(1)) * GAMMA_64
    z = (z ^ (z >> uint64(30))) * FACTOR_1
    z = (z ^ (z >> uint64(27))) * FACTOR_2
    z = z ^ (z >> uint64(31))
    drawn = float32(np.int64(z >> uint64(40))) * float32(2**-24)
    return float32(0) if drawn < drop.rate else float32(1) / (float32(1) - drop.rate)


@kernel
def apply_dropout(x: Any, drop: Any, out: Any, team: Any) -> None:
    """Write x (N, C) to out, maybe an operand, with some values dropped; this is its own adjoint."""
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            drop_row(x[t], drop, t * x.shape[1], out[t])


@inner_kernel
def drop_row(x: Any, drop: Any, first: int, out: Any) -> None:
    """Write x (n,), whose first value has the index `first`, to out with some values dropped."""
    if drop.rate == 0:
        for i in range(len(x)):
            out[i] = stored(x[i], out)
    else:
        for i in range(len(x)):
            out[i] = stored(x[i] * scale_of(drop, first + i), out)


# -- products ---------------------------------------------------------------------------------------------------------


@kernel
def pack_rows(weight: Any, panels: Any, team: Any) -> None:
    """Pack a matrix (n, depth) by rows; a block is a panel."""
    for block in blocks(team):
        products.pack_rows(weight, panels, block)


@kernel
def pack_columns(x: Any, panels: Any, team: Any) -> None:
    """Pack a matrix (depth, n) by columns; a block is BLOCK_ROWS rows."""
    for block in blocks(team):
        products.pack_columns(x, panels, block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x)))


@kernel
def transpose(x: Any, out: Any, team: Any) -> None:
    """Write the transpose of a bfloat16 matrix (depth, n) to out; a block is BLOCK_ROWS rows."""
    for block in blocks(team):
        bfloat16.transpose(x, block * BLOCK_ROWS, out)


@kernel
def multiply(left: Any, panels: Any, out: Any, add: bool, product: Any, edges: Any, team: Any) -> None:
    """Compute out = left @ right, or add it to out; see products.multiply. `product` is products.blocks_of(m, n)."""
    for block in blocks(team):
        products.multiply(left, panels, out, add, product, block, edges[team.thread])


# -- one position at a time -------------------------------------------------------------------------------------------


@kernel
def embed(table: Any, tokens: Any, drop: Any, x: Any, team: Any) -> None:
    """Write the embeddings (V, C) of tokens (N,) to x (N, C)."""
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            drop_row(table[tokens[t]], drop, t * x.shape[1], x[t])


@kernel
def embed_backward(d_x: Any, tokens: Any, d_table: Any, team: Any) -> None:
    """Add d_x (N, C) to the rows of d_table (V, C) of the tokens; a block is BLOCK_COLUMNS columns, all positions."""
    for block in blocks(team):
        first, last = block * BLOCK_COLUMNS, min((block + 1) * BLOCK_COLUMNS, d_x.shape[1])
        for t in range(len(d_x)):
            row = d_table[tokens[t]]
            for i in range(first, last):
                row[i] += d_x[t, i]


@kernel
def add_dropped(x: Any, added: Any, drop: Any, out: Any, team: Any) -> None:
    """Write x + added to out, all (N, C), with some values of `added` dropped."""
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            drop_row(added[t], drop, t * x.shape[1], out[t])
            for i in range(x.shape[1]):
                out[t, i] += x[t, i]


@kernel
def rmsnorm(x: Any, weight: Any, eps: float, out: Any, team: Any) -> None:
    """Normalise each row of x (N, C) into out, an operand."""
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            factor = inverse_rms(x[t], eps)
            for i in range(len(weight)):
                out[t, i] = stored(x[t, i] * factor * weight[i], out)


@kernel
def rmsnorm_backward(d_y: Any, x: Any, weight: Any, eps: float, d_x: Any, d_weights: Any, team: Any) -> None:
    """Add the gradient of x (N, C) to d_x; write that of weight (C,), block by block, to d_weights (blocks, C)."""
    for block in blocks(team):
        d_weight = d_weights[block]
        for i in range(len(weight)):
            d_weight[i] = float32(0)
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            factor = inverse_rms(x[t], eps)
            mean = factor * dot_of_three(d_y[t], weight, x[t]) / float32(len(weight))
            for i in range(len(weight)):
                normed = x[t, i] * factor
                d_weight[i] += d_y[t, i] * normed
                d_x[t, i] += (d_y[t, i] * weight[i] - normed * mean) * factor


@kernel
def add_parts(parts: Any, add: bool, out: Any, team: Any) -> None:
    """Add up the parts (blocks, C) of a gradient in their order, into out (C,) or to it; this is one block."""
    for _ in blocks(team):
        if not add:
            for i in range(len(out)):
                out[i] = float32(0)
        for part in range(len(parts)):
            for i in range(len(out)):
                out[i] += parts[part, i]


@summing_kernel
def dot_of_three(x: Any, y: Any, z: Any) -> float:
    """Return the sum of x * y * z, all (n,)."""
    result = float32(0)
    for i in range(len(x)):
        result += x[i] * y[i] * z[i]
    return result


@inner_kernel
def inverse_rms(x: Any, eps: float) -> float:
    """Return what RMSNorm multiplies x (C,) with."""
    return float32(1) / np.sqrt(dot(x, x) / float32(len(x)) + eps)


@kernel
def swiglu(gate: Any, up: Any, hidden: Any, team: Any) -> None:
    """Write silu(gate) * up to hidden, all (N, F); hidden is an operand."""
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(gate))):
            for i in range(gate.shape[1]):
                silu = gate[t, i] / (float32(1) + simd.exp(-gate[t, i]))
                hidden[t, i] = stored(silu * up[t, i], hidden)


@kernel
def swiglu_backward(d_hidden: Any, gate: Any, up: Any, d_gate: Any, d_up: Any, team: Any) -> None:
    """Write the gradients of gate and up (N, F) to d_gate and d_up, operands."""
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(gate))):
            for i in range(gate.shape[1]):
                x, d = gate[t, i], d_hidden[t, i]
                s = float32(1) / (float32(1) + simd.exp(-x))
                d_gate[t, i] = stored(d * up[t, i] * (s + x * s * (float32(1) - s)), d_gate)
                d_up[t, i] = stored(d * x * s, d_up)


@kernel
def rope(x: Any, cos: Any, sin: Any, heads: Any, team: Any) -> None:
    """Turn all heads of x (N, n * D) by the angles (T, D / 2), and write them to heads (B, n, T, D), an operand."""
    _, n, T, _ = heads.shape
    D = 2 * cos.shape[1]
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            for h in range(n):
                turn(x[t, h * D : (h + 1) * D], cos[t % T], sin[t % T], float32(1), heads[t // T, h, t % T])


@kernel
def rope_backward(d_heads: Any, cos: Any, sin: Any, d_x: Any, team: Any) -> None:
    """Turn the heads (B, n, T, D) back, and write them to d_x (N, n * D), an operand."""
    _, n, T, D = d_heads.shape
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(d_x))):
            for h in range(n):
                turn(d_heads[t // T, h, t % T], cos[t % T], sin[t % T], float32(-1), d_x[t, h * D : (h + 1) * D])


@inner_kernel
def turn(x: Any, cos: Any, sin: Any, sign: float, out: Any) -> None:
    """Turn each pair of x (D,) by its angle (D / 2,), forth or back, into out."""
    for i in range(len(cos)):
        even, odd = x[2 * i], x[2 * i + 1]
        out[2 * i] = stored(even * cos[i] - odd * (sign * sin[i]), out)
        out[2 * i + 1] = stored(even * (sign * sin[i]) + odd * cos[i], out)


@kernel
def split_heads(x: Any, heads: Any, team: Any) -> None:
    """Write x (N, n * D) to heads (B, n, T, D), an operand."""
    _, n, T, _ = heads.shape
    D = x.shape[1] // n
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            for h in range(n):
                for i in range(D):
                    heads[t // T, h, t % T, i] = stored(x[t, h * D + i], heads)


@kernel
def join_heads(heads: Any, x: Any, team: Any) -> None:
    """Write heads (B, n, T, D) to x (N, n * D), an operand."""
    _, n, T, D = heads.shape
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            for h in range(n):
                for i in range(D):
                    x[t, h * D + i] = stored(heads[t // T, h, t % T, i], x)


# -- attention --------------------------------------------------------------------------------------------------------


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
    per_group = H // k.shape[1]
    for block in blocks(team):
        b, h, thread = block // H, block % H, team.thread
        weights, head, edge, by_columns = (
            space.weights[thread], space.head[thread], space.edges[thread], space.by_columns[thread]
        )  # fmt: skip
        attention_weights(q[b, h], k[b, h // per_group], space, thread)
        drop_weights(weights, drop, block)
        products.pack_columns(v[b, h // per_group], by_columns, 0, T)
        prepare_lower(weights, space.left[thread])
        multiply_lower(products.left_of(weights, space.left[thread]), by_columns, head, False, edge)
        D = head.shape[1]
        for t in range(T):
            row = mixed[b * T + t, h * D : (h + 1) * D]
            for i in range(D):
                row[i] = stored(head[t, i], row)


@shared_kernel
def attention_weights(q: Any, k: Any, space: Any, thread: int) -> None:
    """Write a head's attention weights (T, T); those of the future are zero up to `end_of_tile`. q and k are (T, D)."""
    weights, by_rows = space.weights[thread], space.by_rows[thread]
    T, D = space.head[thread].shape
    pack_head(k, by_rows)
    scores_of(products.left_of(q, space.left[thread]), by_rows, weights, space.edges[thread])
    scale = float32(1) / np.sqrt(float32(D))
    for t in range(T):
        row = weights[t]
        largest = simd.largest(row[: t + 1])
        seen = row[: t + 1]
        write_powers(seen, largest, scale, float32(1) / sum_of_powers(seen, largest, scale), seen)
        for s in range(t + 1, end_of_tile(t, T)):
            row[s] = float32(0)


@inlined_kernel
def end_of_tile(t: int, T: int) -> int:
    """Return up to where row t of a lower triangle has to be zero: products take some rows, and all their terms."""
    return min((t // LOWER_ROWS + 1) * LOWER_ROWS, T)


@inlined_kernel
def prepare_lower(x: Any, room: Any) -> None:
    """Do what products.prepare_left does, for the lower triangle of x (T, T) alone."""
    T = len(x)
    for first in range(0, T, LOWER_ROWS):
        end = min(first + LOWER_ROWS, T)
        products.prepare_left(x[first:end, :end], room[first:end])


@inlined_kernel
def scores_of(left: Any, by_rows: Any, scores: Any, edge: Any) -> None:
    """Write left @ right to scores (T, T): at least its lower triangle, tile by tile."""
    T = len(scores)
    tile_rows, _, _ = products.tile_shape(left)
    for row in range(0, T, tile_rows):
        end = min(row + tile_rows, T)
        products.multiply_range(left, by_rows, scores, False, (row, end), (0, end), (0, by_rows.shape[1]), edge)


@inlined_kernel
def multiply_lower(left: Any, right: Any, out: Any, add: bool, edge: Any) -> None:
    """Write left @ right to out (T, D), or add it; left is a lower triangle."""
    T, D = out.shape
    tile_rows, _, _ = products.tile_shape(left)
    for row in range(0, T, tile_rows):
        end = min(row + tile_rows, T)
        terms = products.terms_of(left, 0, end)
        products.multiply_range(left, right, out, add, (row, end), (0, D), terms, edge)


@inlined_kernel
def multiply_upper(left: Any, right: Any, out: Any, add: bool, edge: Any) -> None:
    """Write left @ right to out (T, D), or add it; left is the transpose of a lower triangle."""
    T, D = out.shape
    tile_rows, _, _ = products.tile_shape(left)
    for row in range(0, T, tile_rows):
        rows, terms = (row, min(row + tile_rows, T)), products.terms_of(left, row, T)
        products.multiply_range(left, right, out, add, rows, (0, D), terms, edge)


@inlined_kernel
def pack_head(x: Any, panels: Any) -> None:
    """Pack a head (T, D) by rows."""
    for panel in range(len(panels)):
        products.pack_rows(x, panels, panel)


@inner_kernel
def drop_weights(weights: Any, drop: Any, head: int) -> None:
    """Drop some of the weights (T, T) of a head, numbered through all sequences."""
    T = len(weights)
    if drop.rate != 0:
        for t in range(T):
            drop_row(weights[t, : t + 1], drop, (head * T + t) * T, weights[t])


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
    for block in blocks(team):
        b, g = block // G, block % G
        for h in range(g * (H // G), (g + 1) * (H // G)):
            d_out, add = d_mixed[b * T : (b + 1) * T, h * D : (h + 1) * D], h > g * (H // G)
            head_backward(
                d_out, q[b, h], k[b, g], v[b, g], drop, b * H + h, d_q[b, h], d_k[b, g], d_v[b, g], add, space,
                team.thread,
            )  # fmt: skip


@inlined_kernel
def head_backward(
    d_out: Any, q: Any, k: Any, v: Any, drop: Any, head: int, d_q: Any, d_k: Any, d_v: Any, add: bool, space: Any,
    thread: int,
) -> None:  # fmt: skip
    """Write the gradients of one query head, all (T, D), or add to those of k and v."""
    T = len(d_q)
    weights, d_weights, edge = space.weights[thread], space.d_weights[thread], space.edges[thread]
    by_rows, by_columns, room = space.by_rows[thread], space.by_columns[thread], space.left[thread]
    attention_weights(q, k, space, thread)  # computed again: they would be the largest activations

    pack_head(v, by_rows)
    products.prepare_left(d_out, room)
    scores_of(products.left_of(d_out, room), by_rows, d_weights, edge)  # d_weights = d_out @ v.T
    drop_weights(d_weights, drop, head)
    scale = float32(1) / np.sqrt(float32(d_q.shape[1]))
    for t in range(T):  # d_weights becomes the gradient of the scores
        d_row, row = d_weights[t], weights[t]
        mean = dot(d_row[: t + 1], row[: t + 1])
        for s in range(t + 1):
            d_row[s] = row[s] * (d_row[s] - mean) * scale
        for s in range(t + 1, end_of_tile(t, T)):
            d_row[s] = float32(0)

    products.pack_columns(k, by_columns, 0, T)
    prepare_lower(d_weights, room)
    multiply_lower(products.left_of(d_weights, room), by_columns, d_q, False, edge)  # d_q = d_scores @ k
    products.pack_columns(q, by_columns, 0, T)
    products.prepare_transpose_of_lower(d_weights, room)
    multiply_upper(products.transpose_of(room), by_columns, d_k, add, edge)  # d_k = d_scores.T @ q
    drop_weights(weights, drop, head)
    products.pack_columns(d_out, by_columns, 0, T)
    products.prepare_transpose_of_lower(weights, room)
    multiply_upper(products.transpose_of(room), by_columns, d_v, add, edge)  # d_v = weights.T @ d_out
