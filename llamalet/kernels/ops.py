"""The forward pass as machine code: the functions of reference.py under their names there, and `work`, which runs all.

Numba compiles this once for each kind of weights: one forward pass, in which only `embed`, `prepare` and `matmul`
differ. It works in memory that transformer.py allots, on T new positions at a time: one for decoding, many of one
sequence for a prompt, or one of each of many sequences. Shape letters are those of reference.py.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import float32, njit, types
from numba.extending import overload

from llamalet.kernels import threads
from llamalet.kernels.simd import (
    BLOCK_ROWS,
    BYTES_OF_8_BITS,
    CHUNK_COLS,
    FLOAT_BYTES,
    combine_lanes,
    dot_rows,
    exp,
    float_of_bits,
    floats_at,
    layer_of,
    magnitude_bits,
    multiply_blocks,
    rows_to_lanes,
    softmax_lanes,
)

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

# The stages of a layer. After the last one come its successor's NORM, as the final one, and LOGITS. Those with an even
# number work on single positions, the others multiply by matrices or attend.
NORM, QKV, ROPE, ATTENTION, ATTENDED, PROJECTION, FFN_NORM, GATE, GATED, DOWN, LOGITS = range(11)
STAGES_PER_LAYER = 10

# The matrices in Weights.matrices, in the order of the stages that multiply by them, and the first one of each stage.
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w3", "w2", "output", "tok_embeddings")
TOK_EMBEDDINGS = MATRICES.index("tok_embeddings")
FIRST_MATRIX = (-1, 0, -1, -1, -1, 3, -1, 4, -1, 6, 7)

# The words of Workspace.job: T, whether all positions are of one sequence, how many of the last positions get logits,
# the address of these (N, V); then the number of blocks of each stage.
COUNT, ONE_SEQUENCE, N_LOGITS, LOGITS_AT, N_BLOCKS, JOB_WORDS = 0, 1, 2, 3, 4, 15

# The words of a row of Workspace.places: the addresses of the sequence's keys and values, its cache's capacity, and the
# new position.
KEYS, VALUES, CAPACITY, POSITION, PLACE_WORDS = range(5)

# So many queries of a prompt look at the keys together, one in each lane.
QUERY_LANES = 16


class PackedMatrix(NamedTuple):
    """A quantize.Packed matrix: simd.chunk_dtype (blocks, chunks) and simd.scales_dtype (blocks, groups), or Stacks."""

    values: Any
    scales: Any


class QuantizedRows(NamedTuple):
    """Quantized vectors (T, cols): simd.group_dtype, float32 scales and int32 starts, all (T, groups).

    zero: what the matrix added to its weights to make them unsigned; a start is minus the group's sum times that.
    """

    values: Any
    scales: Any
    starts: Any
    zero: Any


class Weights(NamedTuple):
    """A model.

    matrices: MATRICES as Stacks of float32 or bfloat16 (rows, cols), or PackedMatrix; the vocabulary's have one layer.
    attention_norm: float32 (L, C).
    ffn_norm: float32 (L, C).
    norm: float32 (C,).
    norm_eps: float32.
    group_size: columns that share a scale of a PackedMatrix; 0 for floats.
    """

    matrices: Any
    attention_norm: Any
    ffn_norm: Any
    norm: Any
    norm_eps: Any
    group_size: Any


class Workspace(NamedTuple):
    """The memory of a pass over T new positions; float32 unless said otherwise.

    tokens: int64 (T,).
    places: int64 (T, PLACE_WORDS), where each position's keys and values are.
    x: the residual stream (T, C).
    normed: (T, C).
    queries: the output of wq once more, as (T * H, D).
    attended: (T, H * D).
    scores: (H, capacity).
    lane_scores: scores of QUERY_LANES queries (H, capacity, QUERY_LANES).
    lane_queries: those queries and what they see (H, D, QUERY_LANES).
    scratch: for each thread, a block of a matrix of floats (threads, cols, BLOCK_ROWS).
    operands: what the matrices of the odd stages multiply: float32 (T, cols) or QuantizedRows.
    outputs: what the matrices make: q, k, v, projected (T, C), gate, up, projected, (0, V) for logits.
    job: int64, the words above.
    """

    tokens: Any
    places: Any
    x: Any
    normed: Any
    queries: Any
    attended: Any
    scores: Any
    lane_scores: Any
    lane_queries: Any
    scratch: Any
    operands: Any
    outputs: Any
    job: Any


class Angles(NamedTuple):
    """The cosines and sines of RoPE's angles at every position (capacity, D / 2)."""

    cos: Any
    sin: Any


def embed(matrix: Any, token: int, x: Any, group_size: int) -> None:
    """Write the embedding of a token, a row of the matrix (V, C), to x (C,)."""


@overload(embed, jit_options=OPTIONS, strict=False)
def _embed(matrix: Any, token: Any, x: Any, group_size: Any) -> Any:
    if isinstance(matrix, types.Array):
        return lambda matrix, token, x, group_size: widen(matrix[token], x)
    if matrix.types[0].dtype.size == BYTES_OF_8_BITS:
        return lambda matrix, token, x, group_size: unpack(matrix, token, x, group_size, 64, 0, 255, 128)
    return lambda matrix, token, x, group_size: unpack(matrix, token, x, group_size, 0, 4, 15, 8)


@kernel
def unpack(
    matrix: Any, row: int, x: Any, group_size: int, half_bytes: int, half_bits: int, mask: int, zero: int
) -> None:
    """Write a row of a PackedMatrix (rows, cols) to x (cols,).

    Args:
        matrix: see quantize.Packed for its layout.
        row: which.
        x: float32, the result.
        group_size: columns that share a scale.
        half_bytes: how many bytes after a chunk's first 4 columns its last 4 are,
        half_bits: and how many bits higher.
        mask: the bits of a weight.
        zero: what was added to it.
    """
    block, lane = row // BLOCK_ROWS, row % BLOCK_ROWS
    for first in range(0, len(x), 4):
        chunk, half = first // CHUNK_COLS, first % CHUNK_COLS // 4
        scale = as_float(matrix.scales[block, first // group_size].values[lane])
        for i in range(first, min(first + 4, len(x))):
            value = matrix.values[block, chunk].values[half_bytes * half + 4 * lane + i - first]
            x[i] = float32((np.int32(value) >> (half_bits * half) & mask) - zero) * scale


@kernel
def widen(x: Any, out: Any) -> None:
    """Copy x (n,), float32 or bfloat16, to out (n,)."""
    for i in range(len(out)):
        out[i] = as_float(x[i])


def as_float(x: Any) -> float:
    """Return a float32 as it is; of a uint16, the bits of a bfloat16, the float32 whose upper half they are."""
    return float((np.uint32(x) << np.uint32(16)).view(np.float32) if isinstance(x, np.uint16) else x)


@overload(as_float, jit_options=OPTIONS, strict=False)
def _as_float(x: Any) -> Any:
    if isinstance(x, types.Float):
        return lambda x: x
    return lambda x: float_of_bits(np.int32(np.uint32(x) << np.uint32(16)))


def prepare(x: Any, operand: Any, first: int, last: int) -> None:
    """Make x[first:last] (T, cols) into what a matrix multiplies: itself, or QuantizedRows."""


@overload(prepare, jit_options=OPTIONS, strict=False)
def _prepare(x: Any, operand: Any, first: Any, last: Any) -> Any:
    if isinstance(operand, types.Array):
        return lambda x, operand, first, last: None
    return lambda x, operand, first, last: quantize_rows(x, operand, first, last)


@kernel
def quantize_rows(x: Any, rows: Any, first: int, last: int) -> None:
    """Quantize x[first:last] (T, cols); as in reference.py a NaN or an infinity spoils its group's scale.

    The last group may have fewer columns than the others; its values after them stay what they are, zeros.
    """
    for t in range(first, last):
        for g in range(rows.scales.shape[1]):
            values = rows.values[t, g].values
            group = x[t, g * len(values) : min((g + 1) * len(values), x.shape[1])]
            bits = np.int32(0)
            for i in range(len(group)):
                bits = max(bits, magnitude_bits(group[i]))
            largest = float_of_bits(bits)
            rows.scales[t, g] = largest / float32(127)
            inverse = float32(127) / largest
            if not inverse < np.inf:  # a group of zeros, or of numbers too small to invert, or a NaN
                inverse = float32(0)
            total = np.int32(0)
            for i in range(len(group)):
                value = np.int32(np.rint(group[i] * inverse))
                values[i] = value
                total += value
            rows.starts[t, g] = -rows.zero * total


def matmul(matrix: Any, operand: Any, first_t: int, count: int, out: Any, first: int, last: int, scratch: Any) -> None:
    """Multiply blocks first..last, of 16 rows each, of a matrix with `count` vectors from first_t on.

    Args:
        matrix: (rows, cols), float32 or bfloat16, or PackedMatrix.
        operand: the vectors (T, cols), float32, or QuantizedRows.
        first_t: the first vector.
        count: how many vectors.
        out: (T, rows); its first `count` rows are written.
        first: the first block.
        last: the block after the last; that one may have fewer than 16 rows.
        scratch: float32 (cols or more, 16) for the positions of one sequence, (0, 16) for those of several; theirs are
            summed in the order of a single vector.
    """


@overload(matmul, jit_options=OPTIONS, strict=False)
def _matmul(matrix: Any, operand: Any, first_t: Any, count: Any, out: Any, first: Any, last: Any, scratch: Any) -> Any:
    if not isinstance(matrix, types.Array):
        return lambda matrix, operand, first_t, count, out, first, last, scratch: matmul_blocks(
            matrix, operand, first_t, count, out, first, last
        )

    def multiply(
        matrix: Any, operand: Any, first_t: int, count: int, out: Any, first: int, last: int, scratch: Any
    ) -> None:
        if count > 1 and len(scratch):
            matmul_lanes(matrix, operand, first_t, count, out, first, last, scratch)
        else:
            n_rows = out.shape[1]
            matmul_rows(matrix, operand, first_t, count, out, first * BLOCK_ROWS, min(last * BLOCK_ROWS, n_rows))

    return multiply


@kernel
def matmul_lanes(
    matrix: Any, operand: Any, first_t: int, count: int, out: Any, first: int, last: int, scratch: Any
) -> None:
    """Multiply blocks of a matrix of floats, each of which is turned so that its rows are lanes."""
    vectors, cols = operand[first_t:], operand.shape[1]
    for block in range(first, last):
        rows_to_lanes(matrix, block * BLOCK_ROWS, out.shape[1] - 1, scratch)
        for t in range(0, count, 8):
            combine_lanes(vectors, eight(t, count), cols, 1, scratch, cols, out, block * BLOCK_ROWS)


@kernel
def matmul_rows(matrix: Any, operand: Any, first_t: int, count: int, out: Any, first: int, last: int) -> None:
    """Multiply rows first..last of a matrix of floats.

    One vector is multiplied with four rows at a time, which lie a quarter of all these rows apart: the processor reads
    ahead best in a few places where one address follows the other for long. Many vectors are multiplied by tiles of 4
    rows and 4 vectors.
    """
    vectors = operand[first_t:]
    if count == 1:
        n = (last - first + 3) // 4
        for i in range(first, first + n):
            j, k, m = min(i + n, last - 1), min(i + 2 * n, last - 1), min(i + 3 * n, last - 1)
            out[0, i], out[0, j], out[0, k], out[0, m] = dot_rows(matrix, (i, j, k, m), vectors, (0,))
        return
    for i in range(first, last, 4):
        rows = four(i, last)
        for t in range(0, count, 4):
            ts = four(t, count)
            products = dot_rows(matrix, rows, vectors, ts)
            for r in range(4):
                for v in range(4):
                    out[ts[v], rows[r]] = products[4 * r + v]


@kernel
def matmul_blocks(matrix: Any, operand: Any, first_t: int, count: int, out: Any, first: int, last: int) -> None:
    """Multiply blocks first..last of a PackedMatrix, as `matmul_rows`: one vector with 2 blocks, many by tiles."""
    if count == 1:
        n = (last - first + 1) // 2
        for i in range(first, first + n):
            multiply_blocks(matrix, (i, min(i + n, last - 1)), operand, (first_t,), out, first_t)
        return
    for i in range(first, last, 2):
        blocks = (i, min(i + 1, last - 1))
        for t in range(first_t, first_t + count, 4):
            multiply_blocks(matrix, blocks, operand, four(t, first_t + count), out, first_t)


@kernel
def four(first: int, end: int) -> Any:
    """Return 4 numbers from `first` on; where there are less before `end`, the last one more than once."""
    return first, min(first + 1, end - 1), min(first + 2, end - 1), min(first + 3, end - 1)


@kernel
def eight(first: int, end: int) -> Any:
    """Return 8 numbers from `first` on, as `four`."""
    return four(first, end) + four(min(first + 4, end - 1), end)


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
def attention_of_lanes(
    queries: Any, first: int, step: int, count: int, start: int, keys: Any, values: Any, scores: Any, lanes: Any,
    out: Any, column: int,
) -> None:  # fmt: skip
    """Let up to QUERY_LANES queries of neighbouring positions look at their head's cache, each in a lane.

    Args:
        queries: all queries (n, D).
        first: the number of the first.
        step: from one to the next.
        count: how many.
        start: the position of the first.
        keys: (capacity, D).
        values: (capacity, D).
        scores: (capacity, QUERY_LANES), overwritten.
        lanes: (D, QUERY_LANES), overwritten.
        out: (count, H * D).
        column: where the results begin in each row of out.
    """
    head_dim, length = keys.shape[1], start + count
    lanes[:] = float32(0)
    for t in range(count):
        for i in range(head_dim):
            lanes[i, t] = queries[first + t * step, i]
    for s in range(0, length, 8):
        combine_lanes(keys, eight(s, length), head_dim, 1, lanes, head_dim, scores, 0)
    for s in range(start + 1, length):  # what is in the future of a query has no weight
        for t in range(s - start):
            scores[s, t] = -np.inf
    softmax_lanes(scores, length, float32(1) / np.sqrt(float32(head_dim)))
    for i in range(0, head_dim, 8):
        combine_lanes(values, eight(i, head_dim), 1, head_dim, scores, length, lanes, 0)
    for t in range(count):
        for i in range(head_dim):
            out[t, column + i] = lanes[i, t]


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
def work(weights: Any, space: Any, angles: Any, shared: Any, binding: int, member: int) -> None:
    """Run the model over the new positions of space.job, together with other threads; see threads.py.

    Args:
        weights: Weights.
        space: Workspace; its tokens, places and job say what is to be done.
        angles: Angles of all positions.
        shared: the team's words.
        binding: the number under which the team passed these arguments.
        member: the thread's number; the caller's, 0, opens the job, and returns when it is done.
    """
    helping = member > 0
    if not helping:
        threads.open_job(shared)
    last_stage = STAGES_PER_LAYER * weights.attention_norm.shape[0] + 1
    stage = looks = 0
    while not helping or stage <= last_stage or looks < threads.LOOKS:
        ticket = threads.atomic_load(shared, threads.TICKET)
        if threads.atomic_load(shared, threads.BINDING) != binding:
            return
        stage, block = threads.stage_of(ticket), threads.block_of(ticket)
        if stage > last_stage and not helping:
            return
        n_blocks = count_blocks(space.job, stage, last_stage)
        if block >= n_blocks:
            threads.wait(looks)
            looks += 1
        elif threads.take(shared, ticket):
            looks, goes_on = 0, True
            while goes_on:
                if stage % 2:
                    run_block(weights, space, stage, last_stage, block, member)
                else:
                    run_positions(weights, space, angles, stage, block)
                goes_on = False
                if threads.complete(shared, n_blocks):
                    stage, block = stage + 1, 0
                    n_blocks = count_blocks(space.job, stage, last_stage)
                    goes_on = n_blocks == 1
                    if not goes_on:
                        threads.open_stage(shared, stage)


@kernel
def count_blocks(job: Any, stage: int, last_stage: int) -> int:
    """Return the number of blocks of a stage."""
    if stage > last_stage:
        return 0
    return job[N_BLOCKS + (LOGITS if stage == last_stage else stage % STAGES_PER_LAYER)]


@inlined_kernel
def run_block(weights: Any, space: Any, stage: int, last_stage: int, block: int, member: int) -> None:
    """Do one block of a stage of matrices or of attention."""
    count, layer = space.job[COUNT], stage // STAGES_PER_LAYER
    kind = LOGITS if stage == last_stage else stage % STAGES_PER_LAYER
    if kind == ATTENTION:
        attend(space, layer, block)
        return
    # A block is a share of the rows: of one of wq, wk and wv; of w1 and w3 together; of the stage's only matrix.
    share, n_shares, part, end = block, space.job[N_BLOCKS + kind], 0, 2 if kind == GATE else 1
    if kind == QKV:
        share, n_shares, part, end = block // 3, n_shares // 3, block % 3, block % 3 + 1
    n_vectors = space.job[N_LOGITS] if kind == LOGITS else count
    scratch = space.scratch[member, : space.scratch.shape[1] * space.job[ONE_SEQUENCE]]
    for number in range(FIRST_MATRIX[kind] + part, FIRST_MATRIX[kind] + end):
        out = space.outputs[number]
        if kind == LOGITS:
            out = floats_at(space.job[LOGITS_AT], n_vectors, out.shape[1])
        n = (out.shape[1] + BLOCK_ROWS - 1) // BLOCK_ROWS
        matrix = layer_of(weights.matrices[number], 0 if kind == LOGITS else layer)
        first, last = n * share // n_shares, n * (share + 1) // n_shares
        if first < last:
            matmul(matrix, space.operands[kind], count - n_vectors, n_vectors, out, first, last, scratch)
        if number == FIRST_MATRIX[GATE] + 1:
            gate = space.outputs[FIRST_MATRIX[GATE]]
            for t in range(count):
                rows = slice(first * BLOCK_ROWS, min(last * BLOCK_ROWS, out.shape[1]))
                swiglu(gate[t, rows], out[t, rows])


@inlined_kernel
def run_positions(weights: Any, space: Any, angles: Any, stage: int, block: int) -> None:
    """Do one block of a stage of work on single positions: a share of them."""
    kind, layer, n_layers = stage % STAGES_PER_LAYER, stage // STAGES_PER_LAYER, weights.attention_norm.shape[0]
    count, n_shares = space.job[COUNT], space.job[N_BLOCKS + kind]
    first, last = count * block // n_shares, count * (block + 1) // n_shares
    if kind == ROPE:
        q, k, v = space.outputs[0], space.outputs[1], space.outputs[2]
        head_dim = space.queries.shape[1]
        n_kv_heads = k.shape[1] // head_dim
        for t in range(first, last):
            place = space.places[t]
            position = place[POSITION]
            rope(q[t], angles.cos[position], angles.sin[position])
            rope(k[t], angles.cos[position], angles.sin[position])
            for g in range(n_kv_heads):
                keys, values = cached_head(place, layer * n_kv_heads + g, head_dim)
                copy(k[t, g * head_dim : (g + 1) * head_dim], keys[position])
                copy(v[t, g * head_dim : (g + 1) * head_dim], values[position])
    elif kind == ATTENDED:
        prepare(space.attended, space.operands[PROJECTION], first, last)
    elif kind == GATED:
        prepare(space.outputs[FIRST_MATRIX[GATE]], space.operands[DOWN], first, last)
    else:
        norm, projected = weights.ffn_norm[layer % n_layers], space.outputs[FIRST_MATRIX[PROJECTION]]
        if kind == NORM:
            norm = weights.norm if layer == n_layers else weights.attention_norm[layer]
        table = layer_of(weights.matrices[TOK_EMBEDDINGS], 0)
        for t in range(first, last):
            if stage == 0:
                embed(table, space.tokens[t], space.x[t], weights.group_size)
            else:
                add(space.x[t], projected[t])
            rmsnorm(space.x[t], norm, weights.norm_eps, space.normed[t])
        prepare(space.normed, space.operands[QKV], first, last)


@kernel
def attend(space: Any, layer: int, head: int) -> None:
    """Let one head of all new positions look at what its sequence has so far."""
    count, head_dim, n_heads = space.job[COUNT], space.queries.shape[1], space.scores.shape[0]
    n_kv_heads = space.outputs[1].shape[1] // head_dim
    cached, column = layer * n_kv_heads + head * n_kv_heads // n_heads, head * head_dim
    if count > 1 and space.job[ONE_SEQUENCE]:
        keys, values = cached_head(space.places[0], cached, head_dim)
        for t in range(0, count, QUERY_LANES):
            n, start = min(QUERY_LANES, count - t), space.places[t, POSITION]
            scores, lanes, out = space.lane_scores[head], space.lane_queries[head], space.attended[t : t + n]
            attention_of_lanes(
                space.queries, t * n_heads + head, n_heads, n, start, keys, values, scores, lanes, out, column
            )
        return
    for t in range(count):
        keys, values = cached_head(space.places[t], cached, head_dim)
        out = space.attended[t, column : column + head_dim]
        length = space.places[t, POSITION] + 1
        attention(space.queries, t * n_heads + head, keys, values, length, space.scores[head], out)


@kernel
def cached_head(place: Any, number: int, head_dim: int) -> Any:
    """Return the keys and the values (capacity, D) of one head of one layer, heads numbered through all layers."""
    offset = number * place[CAPACITY] * head_dim * FLOAT_BYTES
    keys = floats_at(place[KEYS] + offset, place[CAPACITY], head_dim)
    return keys, floats_at(place[VALUES] + offset, place[CAPACITY], head_dim)


@kernel
def add(x: Any, y: Any) -> None:
    """Add y (C,) to x (C,)."""
    for i in range(len(x)):
        x[i] += y[i]


@kernel
def copy(x: Any, out: Any) -> None:
    """Copy x (n,) to out (n,)."""
    for i in range(len(x)):
        out[i] = x[i]
