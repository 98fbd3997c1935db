"""The functions of backward/reference.py as machine code, under their names there. Attention has its own: attention.py.

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
from llamalet.kernels.jit import inner_kernel, kernel, summing_kernel
from llamalet.kernels.ops import dot
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
