"""The functions of backward/reference.py as machine code, under their names there.

Each writes to memory that the caller provides, checks no shapes, and shares its blocks with a team of threads. Which
blocks there are follows from the shapes, and where blocks add up, their parts are added in the order of the blocks. So
the bits do not depend on the number of threads. N is B * T, all positions of a batch; the other shape letters are those
of backward/reference.py.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import float32, uint64

from llamalet.backward.dropout import GAMMA, MULTIPLIERS
from llamalet.kernels import products, simd
from llamalet.kernels.ops import dot, kernel, summing_kernel, total
from llamalet.kernels.threads import blocks

BLOCK_ROWS = 32
"""Positions in a block of the functions that treat each position by itself."""

BLOCK_COLUMNS = 32
"""Columns in a block of embed_backward."""

GAMMA_64, FACTOR_1, FACTOR_2 = (np.uint64(value) for value in (GAMMA, *MULTIPLIERS))


class Drop(NamedTuple):
    """Dropout at one place: Dropout.state of it, uint64, and the rate, float32."""

    state: Any
    rate: Any


class AttentionSpace(NamedTuple):
    """Memory for attention's heads, for each thread.

    weights: (threads, T, T).
    d_weights: (threads, T, T).
    by_rows: a matrix (T, D) packed by rows (threads, panels, D, 16).
    by_columns: one packed by columns (threads, panels, T, 16).
    edges: (threads, *EDGE_SHAPE).
    """

    weights: Any
    d_weights: Any
    by_rows: Any
    by_columns: Any
    edges: Any


# -- dropout ----------------------------------------------------------------------------------------------------------


@kernel
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
    """Write x (N, C) to out with some values dropped; this is its own adjoint."""
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            drop_row(x[t], drop, t * x.shape[1], out[t])


@kernel
def drop_row(x: Any, drop: Any, first: int, out: Any) -> None:
    """Write x (n,), whose first value has the index `first`, to out with some values dropped."""
    if drop.rate == 0:
        for i in range(len(x)):
            out[i] = x[i]
    else:
        for i in range(len(x)):
            out[i] = x[i] * scale_of(drop, first + i)


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
    """Normalise each row of x (N, C) into out."""
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            factor = inverse_rms(x[t], eps)
            for i in range(len(weight)):
                out[t, i] = x[t, i] * factor * weight[i]


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


@kernel
def inverse_rms(x: Any, eps: float) -> float:
    """Return what RMSNorm multiplies x (C,) with."""
    return float32(1) / np.sqrt(dot(x, x) / float32(len(x)) + eps)


@kernel
def swiglu(gate: Any, up: Any, hidden: Any, team: Any) -> None:
    """Write silu(gate) * up to hidden, all (N, F)."""
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(gate))):
            for i in range(gate.shape[1]):
                hidden[t, i] = gate[t, i] / (float32(1) + simd.exp(-gate[t, i])) * up[t, i]


@kernel
def swiglu_backward(d_hidden: Any, gate: Any, up: Any, team: Any) -> None:
    """Replace gate and up (N, F) by their gradients."""
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(gate))):
            for i in range(gate.shape[1]):
                x, d = gate[t, i], d_hidden[t, i]
                s = float32(1) / (float32(1) + simd.exp(-x))
                gate[t, i] = d * up[t, i] * (s + x * s * (float32(1) - s))
                up[t, i] = d * x * s


@kernel
def rope(x: Any, cos: Any, sin: Any, heads: Any, team: Any) -> None:
    """Turn all heads of x (N, n * D) by the angles (T, D / 2), and write them to heads (B, n, T, D)."""
    _, n, T, D = heads.shape
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            for h in range(n):
                turn(x[t, h * D : (h + 1) * D], cos[t % T], sin[t % T], float32(1), heads[t // T, h, t % T])


@kernel
def rope_backward(d_heads: Any, cos: Any, sin: Any, d_x: Any, team: Any) -> None:
    """Turn the heads (B, n, T, D) back, and write them to d_x (N, n * D)."""
    _, n, T, D = d_heads.shape
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(d_x))):
            for h in range(n):
                turn(d_heads[t // T, h, t % T], cos[t % T], sin[t % T], float32(-1), d_x[t, h * D : (h + 1) * D])


@kernel
def turn(x: Any, cos: Any, sin: Any, sign: float, out: Any) -> None:
    """Turn each pair of x (D,) by its angle (D / 2,), forth or back, into out."""
    for i in range(len(cos)):
        even, odd = x[2 * i], x[2 * i + 1]
        out[2 * i] = even * cos[i] - odd * (sign * sin[i])
        out[2 * i + 1] = even * (sign * sin[i]) + odd * cos[i]


@kernel
def split_heads(x: Any, heads: Any, team: Any) -> None:
    """Write x (N, n * D) to heads (B, n, T, D)."""
    _, n, T, D = heads.shape
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            for h in range(n):
                for i in range(D):
                    heads[t // T, h, t % T, i] = x[t, h * D + i]


@kernel
def join_heads(heads: Any, x: Any, team: Any) -> None:
    """Write heads (B, n, T, D) to x (N, n * D)."""
    _, n, T, D = heads.shape
    for block in blocks(team):
        for t in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(x))):
            for h in range(n):
                for i in range(D):
                    x[t, h * D + i] = heads[t // T, h, t % T, i]


@kernel
def cross_entropy(logits: Any, targets: Any, divisor: float, losses: Any, team: Any) -> None:
    """Write each row's loss to losses (R,), and replace its logits (R, V) by their gradient.

    Args:
        logits: some rows of a batch.
        targets: (R,); where one is IGNORED (negative), loss and gradient are zero.
        divisor: what gradients are divided by: the targets of the whole batch that count, float32.
        losses: float32.
        team: a block is one row.
    """
    for t in blocks(team):
        row, target = logits[t], targets[t]
        if target < 0:
            losses[t] = float32(0)
            for i in range(len(row)):
                row[i] = float32(0)
            continue
        largest, at_target = row[0], row[target]
        for i in range(len(row)):
            largest = max(largest, row[i])
        for i in range(len(row)):
            row[i] = simd.exp(row[i] - largest)
        # The target's probability minus 1 is minus that of all others. A difference would lose its digits near 1.
        power, row[target] = row[target], float32(0)
        others = total(row)
        losses[t] = np.log(others + power) + largest - at_target
        factor = float32(1) / ((others + power) * divisor)
        for i in range(len(row)):
            row[i] *= factor
        row[target] = -others * factor


# -- attention --------------------------------------------------------------------------------------------------------


@kernel
def attention(q: Any, k: Any, v: Any, drop: Any, mixed: Any, space: Any, team: Any) -> None:
    """Let each position attend to itself and those before it; a block is a query head of a sequence.

    Args:
        q: (B, H, T, D).
        k: (B, G, T, D).
        v: (B, G, T, D).
        drop: dropout of the weights.
        mixed: (N, H * D), the result.
        space: AttentionSpace.
        team: see threads.Team.
    """
    _, H, T, D = q.shape
    per_group = H // k.shape[1]
    for block in blocks(team):
        b, h = block // H, block % H
        weights, edge, by_columns = space.weights[team.thread], space.edges[team.thread], space.by_columns[team.thread]
        attention_weights(q[b, h], k[b, h // per_group], space.by_rows[team.thread], weights, edge)
        drop_weights(weights, drop, block)
        products.pack_columns(v[b, h // per_group], by_columns, 0, T)
        out = mixed[b * T : (b + 1) * T, h * D : (h + 1) * D]
        for row in range(0, T, products.TILE_ROWS):
            end = min(row + products.TILE_ROWS, T)
            products.multiply_range(weights, by_columns, out, False, (row, end), (0, D), (0, end), edge)


@kernel
def attention_weights(q: Any, k: Any, by_rows: Any, weights: Any, edge: Any) -> None:
    """Write the weights (T, T) of one head's queries and keys, (T, D) each; those of the future are zero."""
    T, D = q.shape
    pack_head(k, by_rows)
    for row in range(0, T, products.TILE_ROWS):
        end = min(row + products.TILE_ROWS, T)
        products.multiply_range(q, by_rows, weights, False, (row, end), (0, end), (0, D), edge)
    scale = float32(1) / np.sqrt(float32(D))
    for t in range(T):
        row = weights[t]
        largest = row[0]
        for s in range(t + 1):
            largest = max(largest, row[s])
        for s in range(t + 1):
            row[s] = simd.exp((row[s] - largest) * scale)
        factor = float32(1) / total(row[: t + 1])
        for s in range(t + 1):
            row[s] *= factor
        for s in range(t + 1, T):
            row[s] = float32(0)


@kernel
def pack_head(x: Any, panels: Any) -> None:
    """Pack a head (T, D) by rows."""
    for panel in range(len(panels)):
        products.pack_rows(x, panels, panel)


@kernel
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
        q: (B, H, T, D).
        k: (B, G, T, D).
        v: (B, G, T, D).
        drop: dropout of the weights.
        d_q: as q.
        d_k: as k.
        d_v: as v.
        space: AttentionSpace.
        team: see threads.Team.
    """
    _, H, T, D = q.shape
    G = k.shape[1]
    for block in blocks(team):
        b, g = block // G, block % G
        for h in range(g * (H // G), (g + 1) * (H // G)):
            d_out, add = d_mixed[b * T : (b + 1) * T, h * D : (h + 1) * D], h > g * (H // G)
            head_backward(
                d_out, q[b, h], k[b, g], v[b, g], drop, b * H + h, d_q[b, h], d_k[b, g], d_v[b, g], add, space,
                team.thread,
            )  # fmt: skip


@kernel
def head_backward(
    d_out: Any, q: Any, k: Any, v: Any, drop: Any, head: int, d_q: Any, d_k: Any, d_v: Any, add: bool, space: Any,
    thread: int,
) -> None:  # fmt: skip
    """Write the gradients of one query head, all (T, D), or add to those of k and v."""
    T, D = q.shape
    weights, d_weights, edge = space.weights[thread], space.d_weights[thread], space.edges[thread]
    by_rows, by_columns = space.by_rows[thread], space.by_columns[thread]
    attention_weights(q, k, by_rows, weights, edge)  # computed again: they would be the largest activations

    pack_head(v, by_rows)
    for row in range(0, T, products.TILE_ROWS):  # d_weights = d_out @ v.T
        end = min(row + products.TILE_ROWS, T)
        products.multiply_range(d_out, by_rows, d_weights, False, (row, end), (0, end), (0, D), edge)
    drop_weights(d_weights, drop, head)
    scale = float32(1) / np.sqrt(float32(D))
    for t in range(T):  # d_weights becomes the gradient of the scores
        d_row, row = d_weights[t], weights[t]
        mean = dot(d_row[: t + 1], row[: t + 1])
        for s in range(t + 1):
            d_row[s] = row[s] * (d_row[s] - mean) * scale
        for s in range(t + 1, T):
            d_row[s] = float32(0)

    products.pack_columns(k, by_columns, 0, T)
    for row in range(0, T, products.TILE_ROWS):  # d_q = d_scores @ k
        end = min(row + products.TILE_ROWS, T)
        products.multiply_range(d_weights, by_columns, d_q, False, (row, end), (0, D), (0, end), edge)
    products.pack_columns(q, by_columns, 0, T)
    for row in range(0, T, products.TILE_ROWS):  # d_k = d_scores.T @ q
        end = min(row + products.TILE_ROWS, T)
        products.multiply_range(d_weights.T, by_columns, d_k, add, (row, end), (0, D), (row, T), edge)
    drop_weights(weights, drop, head)
    products.pack_columns(d_out, by_columns, 0, T)
    for row in range(0, T, products.TILE_ROWS):  # d_v = weights.T @ d_out
        end = min(row + products.TILE_ROWS, T)
        products.multiply_range(weights.T, by_columns, d_v, add, (row, end), (0, D), (row, T), edge)
