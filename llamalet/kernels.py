"""The forward pass as machine code: the functions of reference.py under their names there, and `work`, which runs all.

Numba compiles this once for float32 weights and once for int8 weights of each group size: one forward pass, in which
only `embed`, `prepare` and simd's `dot_rows` differ. It works in memory that transformer.py allots, on T new positions
at a time; decoding is T = 1. Shape letters are those of reference.py.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import float32, njit, types
from numba.extending import overload

from llamalet import team
from llamalet.simd import dot_rows, exp, float_of_bits, layer_of, magnitude_bits, sum_quads

# What may be done to float arithmetic where a sum is formed: another order, fused multiply-add, approximate functions.
# Not: assuming that there are no NaNs and infinities, which would hide a broken model (fastmath=True does). All else is
# exact: LLVM makes two versions of a loop that stores, for arrays that are close and that are not, and both must agree.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz", "afn"}

# No reference counting: the kernels own nothing, and counting would stop the threads at every row. A compiled function
# inherits its caller's options, so that each is set here even where it is the default.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "fastmath": False,
    "error_model": "numpy",  # x / 0 is infinite; Python's, an error, would keep loops from becoming vector code
    "no_cfunc_wrapper": True,
    "_nrt": False,
}
kernel = njit(**OPTIONS)
summing_kernel = njit(**OPTIONS | {"fastmath": FAST_MATH})
# For functions that take all weights or all of the workspace: as a call, numba would copy hundreds of words for each.
inlined_kernel = njit(inline="always", **OPTIONS)

# The stages of a layer; LOGITS comes once, after all layers.
QKV, ATTENTION, PROJECTION, GATE, DOWN, LOGITS = range(6)
STAGES_PER_LAYER = 5

# The matrices in Weights.matrices, in the order of the stages that multiply by them, and the first one of each stage.
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w3", "w2", "output", "tok_embeddings")
TOK_EMBEDDINGS = MATRICES.index("tok_embeddings")
FIRST_MATRIX = (0, -1, 3, 4, 6, 7)

# The words of Workspace.job: the first new position, T, how many of the last positions get logits; then the number of
# blocks of each stage.
START, COUNT, N_LOGITS, N_BLOCKS, JOB_WORDS = 0, 1, 2, 3, 9


class Int8Matrix(NamedTuple):
    """A quantized matrix (rows, cols): simd.group_dtype and float32, both (rows, groups), or Stacks of these."""

    values: Any
    scales: Any


class Int8Rows(NamedTuple):
    """Quantized vectors (T, cols): simd.group_dtype, float32 and simd.starts_dtype, all (T, groups)."""

    values: Any
    scales: Any
    starts: Any


class Weights(NamedTuple):
    """A model.

    matrices: MATRICES as Stacks of float32 (rows, cols), or Int8Matrix; those of the vocabulary have one layer.
    attention_norm: float32 (L, C).
    ffn_norm: float32 (L, C).
    norm: float32 (C,).
    norm_eps: float32.
    """

    matrices: Any
    attention_norm: Any
    ffn_norm: Any
    norm: Any
    norm_eps: Any


class Workspace(NamedTuple):
    """The memory of a pass over T new positions; float32 unless said otherwise.

    tokens: int64 (T,).
    x: the residual stream (T, C).
    normed: (T, C).
    queries: the output of wq once more, as (T * H, D).
    attended: (T, H * D).
    scores: (H, capacity).
    operands: what the matrices of each stage multiply: normed, (nothing), attended, normed, gate, normed, or Int8Rows.
    outputs: what the matrices make: q, k, v, projected (T, C), gate, up, projected, logits.
    job: int64, the words above.
    """

    tokens: Any
    x: Any
    normed: Any
    queries: Any
    attended: Any
    scores: Any
    operands: Any
    outputs: Any
    job: Any


class Past(NamedTuple):
    """The KV cache (L, G, capacity, D) and the angles of its positions (capacity, D / 2)."""

    keys: Any
    values: Any
    cos: Any
    sin: Any


def embed(matrix: Any, token: int, x: Any) -> None:
    """Write the embedding of a token, a row of the matrix (V, C), to x (C,)."""


@overload(embed, jit_options=OPTIONS, strict=False)
def _embed(matrix: Any, token: Any, x: Any) -> Any:
    if isinstance(matrix, types.Array):

        def copy(matrix: Any, token: Any, x: Any) -> None:
            for i in range(len(x)):
                x[i] = matrix[token, i]

        return copy

    def dequantize(matrix: Any, token: Any, x: Any) -> None:
        for g in range(matrix.scales.shape[1]):
            group, scale = matrix.values[token, g].values, matrix.scales[token, g]
            for i in range(len(group)):
                x[g * len(group) + i] = group[i] * scale

    return dequantize


def prepare(x: Any, operand: Any, count: int) -> None:
    """Make x[:count] (T, cols) into what a matrix multiplies: itself, or Int8Rows."""


@overload(prepare, jit_options=OPTIONS, strict=False)
def _prepare(x: Any, operand: Any, count: Any) -> Any:
    if isinstance(operand, types.Array):
        return lambda x, operand, count: None
    return lambda x, operand, count: quantize_rows(x, operand, count)


@kernel
def quantize_rows(x: Any, rows: Any, count: int) -> None:
    """Quantize x[:count] (T, cols) into Int8Rows; as in reference.py a NaN or infinity spoils its group's scale."""
    for t in range(count):
        for g in range(rows.scales.shape[1]):
            values = rows.values[t, g].values
            group = x[t, g * len(values) : (g + 1) * len(values)]
            bits = np.int32(0)
            for i in range(len(values)):
                bits = max(bits, magnitude_bits(group[i]))
            largest = float_of_bits(bits)
            rows.scales[t, g] = largest / float32(127)
            inverse = float32(127) / largest
            if not inverse < np.inf:  # a group of zeros, or of numbers too small to invert, or a NaN
                inverse = float32(0)
            for i in range(len(values)):
                values[i] = np.int32(np.rint(group[i] * inverse))
            sum_quads(rows.values[t, g], rows.starts[t, g])


@kernel
def matmul(matrix: Any, operand: Any, first_t: int, count: int, out: Any, first: int, last: int) -> None:
    """Multiply rows first..last of a matrix (rows, cols) with `count` vectors from first_t on into out (T, rows).

    Four rows are computed together, which lie a quarter of all these rows apart: the processor reads ahead best in a
    few places where one address follows the other for long.
    """
    n = (last - first) // 4
    for i in range(first, first + n):
        j, k, m = i + n, i + 2 * n, i + 3 * n
        for t in range(0, count - 1, 2):
            u = t + 1
            out[t, i], out[u, i], out[t, j], out[u, j], out[t, k], out[u, k], out[t, m], out[u, m] = dot_rows(
                matrix, (i, j, k, m), operand, (first_t + t, first_t + u)
            )
        if count % 2:
            t = count - 1
            out[t, i], out[t, j], out[t, k], out[t, m] = dot_rows(matrix, (i, j, k, m), operand, (first_t + t,))
    for i in range(first + 4 * n, last):
        for t in range(count):
            out[t, i] = dot_rows(matrix, (i,), operand, (first_t + t,))[0]


@kernel
def rmsnorm(x: Any, weight: Any, eps: float, out: Any) -> None:
    """Normalise x (C,) into out (C,)."""
    factor = float32(1) / np.sqrt(dot(x, x) / float32(len(x)) + eps)
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
def attention(queries: Any, index: int, keys: Any, values: Any, length: int, scores: Any, out: Any) -> None:
    """Let one query, a row of queries (n, D), look at `length` positions of its head's cache.

    Args:
        queries: all queries (n, D).
        index: which of them.
        keys: (capacity, D).
        values: (capacity, D).
        length: how many positions it sees.
        scores: (capacity,), overwritten.
        out: (D,), the result.
    """
    whole = length - length % 4
    for s in range(0, whole, 4):
        rows = (s, s + 1, s + 2, s + 3)
        scores[s], scores[s + 1], scores[s + 2], scores[s + 3] = dot_rows(keys, rows, queries, (index,))
    for s in range(whole, length):
        scores[s] = dot_rows(keys, (s,), queries, (index,))[0]
    softmax(scores[:length], float32(1) / np.sqrt(float32(len(out))))
    out[:] = float32(0)
    for s in range(0, whole, 4):
        a, b, c, d = scores[s], scores[s + 1], scores[s + 2], scores[s + 3]
        for i in range(len(out)):
            out[i] += a * values[s, i] + b * values[s + 1, i] + (c * values[s + 2, i] + d * values[s + 3, i])
    for s in range(whole, length):
        for i in range(len(out)):
            out[i] += scores[s] * values[s, i]


@kernel
def softmax(x: Any, scale: float) -> None:
    """Turn scores x (n,), times a positive scale, into weights that sum to one."""
    largest = x[0]
    for i in range(len(x)):
        largest = max(largest, x[i])
    for i in range(len(x)):
        x[i] = exp((x[i] - largest) * scale)
    factor = float32(1) / total(x)
    for i in range(len(x)):
        x[i] *= factor


@summing_kernel
def dot(x: Any, y: Any) -> float:
    """Return the dot product of x (n,) and y (n,)."""
    result = float32(0)
    for i in range(len(x)):
        result += x[i] * y[i]
    return result


@summing_kernel
def total(x: Any) -> float:
    """Return the sum of x (n,)."""
    result = float32(0)
    for i in range(len(x)):
        result += x[i]
    return result


@kernel
def swiglu(gate: Any, up: Any) -> None:
    """Make gate (n,) into silu(gate) * up."""
    for i in range(len(gate)):
        gate[i] = gate[i] / (float32(1) + exp(-gate[i])) * up[i]


@kernel
def work(weights: Any, space: Any, past: Any, shared: Any, binding: int, helping: bool) -> None:
    """Run the model over the new positions of space.job, together with other threads; see team.py.

    Args:
        weights: Weights.
        space: Workspace; its tokens and job say what is to be done.
        past: Past, with room for the new positions.
        shared: the team's words.
        binding: the number under which the team passed these arguments.
        helping: whether this thread is a helper; the caller's thread begins the job, and returns when it is done.
    """
    if not helping:
        begin(weights, space)
        team.open_job(shared)
    last_stage = STAGES_PER_LAYER * weights.attention_norm.shape[0]
    looks = 0
    while not helping or looks < team.LOOKS:
        ticket = team.atomic_load(shared, team.TICKET)
        if team.atomic_load(shared, team.BINDING) != binding:
            return
        stage, block = team.stage_of(ticket), team.block_of(ticket)
        if stage > last_stage and not helping:
            return
        kind = LOGITS if stage == last_stage else stage % STAGES_PER_LAYER
        n_blocks = space.job[N_BLOCKS + kind] if stage <= last_stage else 0
        if block >= n_blocks:
            team.wait(looks)
            looks += 1
        elif team.take(shared, ticket):
            run_block(weights, space, past, kind, stage // STAGES_PER_LAYER, block)
            if team.complete(shared, n_blocks):
                finish_stage(weights, space, past, kind, stage // STAGES_PER_LAYER)
                team.open_next_stage(shared)
            looks = 0


@inlined_kernel
def begin(weights: Any, space: Any) -> None:
    """Do what comes before the first stage."""
    table = layer_of(weights.matrices[TOK_EMBEDDINGS], 0)
    for t in range(space.job[COUNT]):
        embed(table, space.tokens[t], space.x[t])
        rmsnorm(space.x[t], weights.attention_norm[0], weights.norm_eps, space.normed[t])
    prepare(space.normed, space.operands[QKV], space.job[COUNT])


@inlined_kernel
def run_block(weights: Any, space: Any, past: Any, kind: int, layer: int, block: int) -> None:
    """Do one block of a stage."""
    count = space.job[COUNT]
    if kind == ATTENTION:
        # One head of all new positions.
        n_heads, head_dim = space.scores.shape[0], past.keys.shape[3]
        group = block * past.keys.shape[1] // n_heads
        keys, values = layer_of(layer_of(past.keys, layer), group), layer_of(layer_of(past.values, layer), group)
        for t in range(count):
            length = space.job[START] + t + 1
            out = space.attended[t, block * head_dim : (block + 1) * head_dim]
            attention(space.queries, t * n_heads + block, keys, values, length, space.scores[block], out)
        return
    # A block is a share of the rows: of one of wq, wk and wv; of w1 and w3 together; of the stage's only matrix.
    share, n_shares, part, end = block, space.job[N_BLOCKS + kind], 0, 2 if kind == GATE else 1
    if kind == QKV:
        share, n_shares, part, end = block // 3, n_shares // 3, block % 3, block % 3 + 1
    n_vectors = space.job[N_LOGITS] if kind == LOGITS else count
    first = last = 0
    for number in range(FIRST_MATRIX[kind] + part, FIRST_MATRIX[kind] + end):
        out = space.outputs[number]
        n_rows = out.shape[1]
        quads = (n_rows + 3) // 4
        first, last = 4 * (quads * share // n_shares), min(4 * (quads * (share + 1) // n_shares), n_rows)
        matrix = layer_of(weights.matrices[number], 0 if kind == LOGITS else layer)
        matmul(matrix, space.operands[kind], count - n_vectors, n_vectors, out, first, last)
    if kind == GATE:
        gate, up = space.outputs[FIRST_MATRIX[GATE]], space.outputs[FIRST_MATRIX[GATE] + 1]
        for t in range(count):
            swiglu(gate[t, first:last], up[t, first:last])


@inlined_kernel
def finish_stage(weights: Any, space: Any, past: Any, kind: int, layer: int) -> None:
    """Do what comes between a stage and the next; one thread does it."""
    count = space.job[COUNT]
    if kind == QKV:
        q, k, v = space.outputs[0], space.outputs[1], space.outputs[2]
        for t in range(count):
            position = space.job[START] + t
            rope(q[t], past.cos[position], past.sin[position])
            rope(k[t], past.cos[position], past.sin[position])
            remember(k[t], layer_of(past.keys, layer), position)
            remember(v[t], layer_of(past.values, layer), position)
    elif kind == ATTENTION:
        prepare(space.attended, space.operands[PROJECTION], count)
    elif kind == GATE:
        prepare(space.outputs[FIRST_MATRIX[GATE]], space.operands[DOWN], count)
    elif kind != LOGITS:
        norm = weights.ffn_norm[layer]
        if kind == DOWN:
            is_last = layer + 1 == weights.attention_norm.shape[0]
            norm = weights.norm if is_last else weights.attention_norm[layer + 1]
        for t in range(count):
            add(space.x[t], space.outputs[FIRST_MATRIX[kind]][t])
            rmsnorm(space.x[t], norm, weights.norm_eps, space.normed[t])
        prepare(space.normed, space.operands[QKV], count)


@kernel
def add(x: Any, y: Any) -> None:
    """Add y (C,) to x (C,)."""
    for i in range(len(x)):
        x[i] += y[i]


@kernel
def remember(x: Any, cached: Any, position: int) -> None:
    """Write all heads of x (G * D,) to their places in one layer of a cache (G, capacity, D)."""
    head_dim = cached.shape[2]
    for g in range(cached.shape[0]):
        for i in range(head_dim):
            cached[g, position, i] = x[g * head_dim + i]
