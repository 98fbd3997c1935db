"""The forward pass as machine code: each function of reference.py under its name there, and `work`, which runs a model.

Numba compiles these functions for the kind of weights that a model has, float32 or int8: one forward pass, of which
only `prepare`, `dot`, `dot_pair` and `embed` differ. Everything works in memory that transformer.py allotted, for T new
positions at a time; decoding is T = 1. Shape letters as in reference.py.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import float32, njit, types
from numba.extending import overload

from llamalet import team
from llamalet.simd import add_scaled, int8_dot, layer_of, sum_lanes, zero_lanes

# What may be done to float arithmetic: another order of sums, fused multiply-add, approximate functions. Not: assuming
# that there are no NaNs and infinities, which would hide a broken model (fastmath=True does).
FAST_MATH = {"reassoc", "contract", "arcp", "nsz", "afn"}

# Without reference counting: the kernels own nothing, and counting would stop the threads at every row.
KERNEL_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": FAST_MATH, "_nrt": False}
kernel = njit(**KERNEL_OPTIONS)
exact_kernel = njit(nogil=True, _nrt=False)


class Int8Matrix(NamedTuple):
    """The int8 weights of all layers (L, rows, cols), or of one (rows, cols).

    values: simd.group_dtype (..., rows, groups).
    scales: float32 (..., rows, groups).
    """

    values: Any
    scales: Any


class Int8Rows(NamedTuple):
    """Quantized activations (T, cols).

    values: simd.group_dtype (T, groups).
    scales: float32 (T, groups).
    starts: simd.starts_dtype (T, groups); see simd.
    """

    values: Any
    scales: Any
    starts: Any


class Weights(NamedTuple):
    """All weights. A matrix is float32 (L, rows, cols) or Int8Matrix; the two of the vocabulary have L = 1."""

    tok_embeddings: Any
    attention_norm: Any
    wq: Any
    wk: Any
    wv: Any
    wo: Any
    ffn_norm: Any
    w1: Any
    w2: Any
    w3: Any
    norm: Any
    output: Any
    norm_eps: Any


class Workspace(NamedTuple):
    """The memory that a pass over T positions works in, float32 unless said otherwise.

    The operands are what the matrices multiply: the array before it, or its Int8Rows.
    """

    tokens: Any  # int64 (T,)
    x: Any  # (T, C)
    normed: Any  # (T, C)
    normed_operand: Any
    q: Any  # (T, H * D)
    k: Any  # (T, G * D)
    v: Any  # (T, G * D)
    scores: Any  # (H, capacity)
    attended: Any  # (T, H * D)
    attended_operand: Any
    projected: Any  # (T, C)
    gate: Any  # (T, F)
    up: Any  # (T, F)
    hidden: Any  # (T, F)
    hidden_operand: Any
    logits: Any  # (T, V)
    job: Any  # int64, see the indices below


class Past(NamedTuple):
    """The KV cache (L, G, capacity, D) and the angles of its positions (capacity, D / 2)."""

    keys: Any
    values: Any
    cos: Any
    sin: Any


# The words of Workspace.job: the first new position, T, how many of the last positions get logits; then, for each
# stage, how many rows of a matrix are one block.
START, COUNT, N_LOGITS, BLOCK_ROWS, JOB_WORDS = 0, 1, 2, 3, 9

# The stages of a layer; LOGITS comes once, after all layers.
QKV, ATTENTION, PROJECTION, GATE, DOWN, LOGITS = 0, 1, 2, 3, 4, 5
STAGES_PER_LAYER = 5


def n_rows(matrix: Any) -> int:
    """Return the number of rows of a matrix (L, rows, cols)."""


def embed(matrix: Any, token: int, x: Any) -> None:
    """Write the embedding of a token, a row of the matrix (V, C), to x (C,)."""


def prepare(x: Any, operand: Any, count: int) -> None:
    """Make x[:count] (T, cols) into what a matrix multiplies: itself, or quantized."""


def dot_pair(matrix: Any, first: int, second: int, operand: Any, t: int) -> tuple[float, float]:
    """Return the dot products of two rows of a matrix (rows, cols) with vector t of an operand.

    Two at a time because every load of the vector then serves twice; rows that lie apart, as memory is read best.
    """


@overload(n_rows, jit_options=KERNEL_OPTIONS, strict=False)
def _n_rows(matrix: Any) -> Any:
    if isinstance(matrix, types.Array):
        return lambda matrix: matrix.shape[1]
    return lambda matrix: matrix.scales.shape[1]


@overload(embed, jit_options=KERNEL_OPTIONS, strict=False)
def _embed(matrix: Any, token: Any, x: Any) -> Any:
    if isinstance(matrix, types.Array):

        def copy(matrix: Any, token: Any, x: Any) -> None:
            for i in range(len(x)):
                x[i] = matrix[token, i]

        return copy

    def dequantize(matrix: Any, token: Any, x: Any) -> None:
        size = len(matrix.values[token, 0].values)
        for g in range(matrix.scales.shape[1]):
            group, scale = matrix.values[token, g].values, matrix.scales[token, g]
            for i in range(size):
                x[g * size + i] = group[i] * scale

    return dequantize


@overload(prepare, jit_options=KERNEL_OPTIONS, strict=False)
def _prepare(x: Any, operand: Any, count: Any) -> Any:
    if isinstance(operand, types.Array):
        return lambda x, operand, count: None
    return lambda x, operand, count: quantize_rows(x, operand, count)


@overload(dot_pair, jit_options=KERNEL_OPTIONS, strict=False)
def _dot_pair(matrix: Any, first: Any, second: Any, operand: Any, t: Any) -> Any:
    if isinstance(matrix, types.Array):

        def float_dot_pair(matrix: Any, first: Any, second: Any, operand: Any, t: Any) -> tuple[float, float]:
            a = b = float32(0)
            for i in range(matrix.shape[1]):
                a += matrix[first, i] * operand[t, i]
                b += matrix[second, i] * operand[t, i]
            return a, b

        return float_dot_pair

    def int8_dot_pair(matrix: Any, first: Any, second: Any, operand: Any, t: Any) -> tuple[float, float]:
        a = b = zero_lanes(matrix.values[first, 0])
        for g in range(operand.scales.shape[1]):
            x, scale, starts = operand.values[t, g], operand.scales[t, g], operand.starts[t, g]
            a = add_scaled(a, int8_dot(matrix.values[first, g], x, starts), scale, matrix.scales[first, g])
            b = add_scaled(b, int8_dot(matrix.values[second, g], x, starts), scale, matrix.scales[second, g])
        return sum_lanes(a), sum_lanes(b)

    return int8_dot_pair


@exact_kernel
def quantize_rows(x: Any, rows: Any, count: int) -> None:
    """Quantize x[:count] (T, cols) into Int8Rows; as in reference.py a NaN or infinity spoils its group's scale."""
    size = len(rows.values[0, 0].values)
    for t in range(count):
        for g in range(rows.scales.shape[1]):
            values, starts = rows.values[t, g].values, rows.starts[t, g].values
            largest = spoilt = float32(0)
            for i in range(size):
                value = x[t, g * size + i]
                largest = max(largest, abs(value))
                spoilt += value * float32(0)
            inverse = float32(127) / largest if largest > 0 else float32(0)
            if not inverse < np.inf:
                inverse = float32(0)
            for i in range(size):
                value = np.rint(x[t, g * size + i] * inverse)
                values[i] = np.int8(np.int32(value if value > -127 else float32(-127)))
            for i in range(size // 4):
                starts[i] = -128 * (np.int32(values[4 * i]) + values[4 * i + 1] + values[4 * i + 2] + values[4 * i + 3])
            rows.scales[t, g] = largest / float32(127) + spoilt


@kernel
def matmul(matrix: Any, operand: Any, first_t: int, count: int, out: Any, first: int, last: int) -> None:
    """Multiply rows first..last of a matrix (rows, cols) with `count` vectors from first_t on into out (T, rows)."""
    half = (last - first) // 2
    for row in range(first, first + half):
        for t in range(count):
            out[t, row], out[t, row + half] = dot_pair(matrix, row, row + half, operand, first_t + t)
    if 2 * half < last - first:
        for t in range(count):
            out[t, last - 1], _ = dot_pair(matrix, last - 1, last - 1, operand, first_t + t)


@kernel
def rmsnorm(x: Any, weight: Any, eps: float, out: Any) -> None:
    """Normalise x (C,) into out (C,)."""
    squares = float32(0)
    for i in range(len(x)):
        squares += x[i] * x[i]
    factor = float32(1) / np.sqrt(squares / float32(len(x)) + eps)
    for i in range(len(x)):
        out[i] = x[i] * factor * weight[i]


@kernel
def rope(x: Any, cos: Any, sin: Any) -> None:
    """Turn all heads of x (n * D,) in place by the angles (D / 2,) of its position."""
    half = len(cos)
    for start in range(0, len(x), 2 * half):
        for i in range(half):
            even, odd = x[start + 2 * i], x[start + 2 * i + 1]
            x[start + 2 * i] = even * cos[i] - odd * sin[i]
            x[start + 2 * i + 1] = even * sin[i] + odd * cos[i]


@kernel
def attention(q: Any, keys: Any, values: Any, length: int, scores: Any, out: Any) -> None:
    """Let one head's query (D,) look at `length` positions of its keys and values (capacity, D); out is (D,)."""
    scale = float32(1) / np.sqrt(float32(len(q)))
    largest = float32(-np.inf)
    for s in range(length):
        score = float32(0)
        for i in range(len(q)):
            score += q[i] * keys[s, i]
        scores[s] = score * scale
        largest = max(largest, scores[s])
    total = float32(0)
    for s in range(length):
        scores[s] = math.exp(scores[s] - largest)
        total += scores[s]
    for i in range(len(out)):
        out[i] = float32(0)
    for s in range(length):
        weight = scores[s] / total
        for i in range(len(out)):
            out[i] += weight * values[s, i]


@kernel
def swiglu(gate: Any, up: Any, out: Any, first: int, last: int) -> None:
    """Write silu(gate) * up to out, from column first to last of all three (F,)."""
    for i in range(first, last):
        out[i] = gate[i] / (float32(1) + math.exp(-gate[i])) * up[i]


@kernel
def add(x: Any, y: Any) -> None:
    """Add y (C,) to x (C,)."""
    for i in range(len(x)):
        x[i] += y[i]


@kernel
def work(weights: Any, space: Any, past: Any, shared: Any, binding: int, helping: bool) -> None:
    """Run the model over the new positions of space.job, together with other threads; see team.py.

    Args:
        weights: Weights.
        space: Workspace; its tokens and job say what is to be done, its logits receive the result.
        past: Past, with room for the new positions.
        shared: the team's words.
        binding: the number under which the team passed these arguments.
        helping: whether this thread is a helper; the caller's thread begins the job, and returns when it is done.
    """
    n_stages = STAGES_PER_LAYER * weights.attention_norm.shape[0] + 1
    if not helping:
        begin(weights, space)
        team.open_job(shared)
    looks = 0
    while not helping or looks < team.SPINS + team.LOOKS:
        ticket = team.atomic_load(shared, team.TICKET)
        if team.atomic_load(shared, team.BINDING) != binding:
            return
        stage, block = team.stage_of(ticket), team.block_of(ticket)
        if stage == n_stages and not helping:
            return
        n_blocks = count_blocks(weights, space, stage) if stage < n_stages else 0
        if block < n_blocks and team.take(shared, ticket):
            run_block(weights, space, past, stage, block)
            if team.complete(shared, n_blocks):
                finish_stage(weights, space, past, stage)
                team.open_next_stage(shared)
            looks = 0
        elif block >= n_blocks:
            team.wait(looks)
            looks += 1


@kernel
def kind_of(weights: Any, stage: int) -> int:
    """Return the kind of a stage: QKV, ..., LOGITS."""
    return LOGITS if stage == STAGES_PER_LAYER * weights.attention_norm.shape[0] else stage % STAGES_PER_LAYER


@kernel
def count_blocks(weights: Any, space: Any, stage: int) -> int:
    """Return the number of blocks of a stage."""
    kind = kind_of(weights, stage)
    if kind == ATTENTION:
        return space.scores.shape[0]
    if kind == QKV:
        rows = n_rows(weights.wq) + n_rows(weights.wk) + n_rows(weights.wv)
    elif kind == GATE:
        rows = n_rows(weights.w1)
    elif kind == LOGITS:
        rows = n_rows(weights.output)
    else:
        rows = n_rows(weights.wo)
    return -(-rows // space.job[BLOCK_ROWS + kind])


@kernel
def begin(weights: Any, space: Any) -> None:
    """Do what comes before the first stage."""
    table = layer_of(weights.tok_embeddings, 0)
    for t in range(space.job[COUNT]):
        embed(table, space.tokens[t], space.x[t])
    normalise(weights, space, layer_of(weights.attention_norm, 0))


@kernel
def normalise(weights: Any, space: Any, norm: Any) -> None:
    """Make the residual stream into the operand of the next matrices."""
    for t in range(space.job[COUNT]):
        rmsnorm(space.x[t], norm, weights.norm_eps, space.normed[t])
    prepare(space.normed, space.normed_operand, space.job[COUNT])


@kernel
def run_block(weights: Any, space: Any, past: Any, stage: int, block: int) -> None:
    """Do one block of a stage."""
    index, kind, count = stage // STAGES_PER_LAYER, kind_of(weights, stage), space.job[COUNT]
    if kind == ATTENTION:
        n_groups, head_dim = past.keys.shape[1], past.keys.shape[3]
        group = block // (space.scores.shape[0] // n_groups)
        keys, values = layer_of(layer_of(past.keys, index), group), layer_of(layer_of(past.values, index), group)
        head = slice(block * head_dim, (block + 1) * head_dim)
        for t in range(count):
            length = space.job[START] + t + 1
            attention(space.q[t, head], keys, values, length, space.scores[block], space.attended[t, head])
        return
    first = block * space.job[BLOCK_ROWS + kind]
    last = first + space.job[BLOCK_ROWS + kind]
    if kind == QKV:
        wq, wk, wv = layer_of(weights.wq, index), layer_of(weights.wk, index), layer_of(weights.wv, index)
        n_q, n_k = n_rows(weights.wq), n_rows(weights.wk)
        operand = space.normed_operand
        matmul(wq, operand, 0, count, space.q, min(first, n_q), min(last, n_q))
        matmul(wk, operand, 0, count, space.k, clip(first - n_q, n_k), clip(last - n_q, n_k))
        matmul(wv, operand, 0, count, space.v, clip(first - n_q - n_k, n_k), clip(last - n_q - n_k, n_k))
    elif kind == GATE:
        last = min(last, n_rows(weights.w1))
        matmul(layer_of(weights.w1, index), space.normed_operand, 0, count, space.gate, first, last)
        matmul(layer_of(weights.w3, index), space.normed_operand, 0, count, space.up, first, last)
        for t in range(count):
            swiglu(space.gate[t], space.up[t], space.hidden[t], first, last)
    elif kind == LOGITS:
        last, n_logits = min(last, n_rows(weights.output)), space.job[N_LOGITS]
        operand = space.normed_operand
        matmul(layer_of(weights.output, 0), operand, count - n_logits, n_logits, space.logits, first, last)
    elif kind == PROJECTION:
        last = min(last, n_rows(weights.wo))
        matmul(layer_of(weights.wo, index), space.attended_operand, 0, count, space.projected, first, last)
    else:
        last = min(last, n_rows(weights.w2))
        matmul(layer_of(weights.w2, index), space.hidden_operand, 0, count, space.projected, first, last)


@kernel
def clip(row: int, n: int) -> int:
    """Return `row` within 0..n."""
    return min(max(row, 0), n)


@kernel
def finish_stage(weights: Any, space: Any, past: Any, stage: int) -> None:
    """Do what comes between a stage and the next; one thread does it."""
    index, kind, count = stage // STAGES_PER_LAYER, kind_of(weights, stage), space.job[COUNT]
    if kind == QKV:
        keys, values = layer_of(past.keys, index), layer_of(past.values, index)
        for t in range(count):
            position = space.job[START] + t
            rope(space.q[t], past.cos[position], past.sin[position])
            rope(space.k[t], past.cos[position], past.sin[position])
            store(space.k[t], keys, position)
            store(space.v[t], values, position)
    elif kind == ATTENTION:
        prepare(space.attended, space.attended_operand, count)
    elif kind == GATE:
        prepare(space.hidden, space.hidden_operand, count)
    elif kind != LOGITS:
        for t in range(count):
            add(space.x[t], space.projected[t])
        if kind == PROJECTION:
            normalise(weights, space, layer_of(weights.ffn_norm, index))
        elif index + 1 < weights.attention_norm.shape[0]:
            normalise(weights, space, layer_of(weights.attention_norm, index + 1))
        else:
            normalise(weights, space, weights.norm)


@kernel
def store(x: Any, cached: Any, position: int) -> None:
    """Write all heads of x (G * D,) to their places in one layer of a cache (G, capacity, D)."""
    head_dim = cached.shape[2]
    for g in range(cached.shape[0]):
        for i in range(head_dim):
            cached[g, position, i] = x[g * head_dim + i]
