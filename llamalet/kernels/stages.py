"""The forward pass as stages, in the order of `hidden_states` in reference.py, and `work`, the loop over them.

    reference.py                                       stage
    x = embed(tokens)                                  attention_norm of the first layer
    for layer in range(n_layers):
        normed = rmsnorm(x, attention_norm)            attention_norm
        q, k, v = matmul(normed, wq | wk | wv)         qkv
        q, k = rope(q), rope(k); cache k, v            rope_and_cache; attend, of single positions
        attention(q, k, v)                             attend, prepare_attended
        x = x + matmul(.., wo)                         attention_output; ffn_norm adds
        normed = rmsnorm(x, ffn_norm)                  ffn_norm
        hidden = swiglu(matmul(.., w1), matmul(.., w3))  gate_up, prepare_hidden
        x = x + matmul(hidden, w2)                     down; the next attention_norm or final_norm adds
    rmsnorm(x, norm)                                   final_norm
    matmul(.., output)                                 logits

A stage needs the results of the one before it. It is cut into blocks that threads run at the same time: shares of the
positions, of a matrix's rows, or the heads. A pass handles T new positions: one when decoding, many of one sequence for
a prompt, one of each of many sequences, or some of each. Numba compiles `work` once for each kind of weights.
"""

from typing import Any, NamedTuple

import numpy as np

from llamalet.kernels import attention, kv_slots, ops, threads
from llamalet.kernels.by_address import by_address
from llamalet.kernels.jit import inner_kernel, kernel
from llamalet.kernels.layers import floats_at, layer_of
from llamalet.model_file.quantize import ROW_BLOCK

# The stages of a layer, in order, and the two after the last layer.
(
    ATTENTION_NORM, QKV, ROPE_AND_CACHE, ATTEND, PREPARE_ATTENDED, ATTENTION_OUTPUT,
    FFN_NORM, GATE_UP, PREPARE_HIDDEN, DOWN, FINAL_NORM, LOGITS,
) = range(12)  # fmt: skip
STAGES_PER_LAYER = FINAL_NORM

# A pass: T, the number of runs, for how many of the last positions logits are wanted, and the address of these, float32
# (N, V).
JOB = np.dtype([(name, np.int64) for name in ("count", "n_runs", "n_logits", "logits")])


class Workspace(NamedTuple):
    """The memory of a pass over T new positions; float32 unless said otherwise.

    job: JOB (1,).
    n_blocks: int64 (stages + 1,), the blocks of each stage of all layers; 0 after the last.
    tokens: int64 (T,).
    cache_slots: kv_slots.CACHE_SLOT (T,).
    runs: int64 (T + 1,), where runs of neighbouring positions begin; see attention.attend.
    x: the residual stream (T, C).
    normed: (T, C).
    q: (T, H * D).
    q_heads: q once more, as (T * H, D).
    k: (T, G * D).
    v: (T, G * D).
    attended: (T, H * D).
    projected: the result of wo or w2, not yet added to x: (T, C).
    gate: (T, F), and after swiglu the hidden activations.
    up: (T, F).
    normed_activations: normed as matrices multiply it: itself, or SplitRows, or ops.QuantizedRows.
    attended_activations: the same of attended.
    hidden_activations: the same of gate.
    context: attention.ContextSpace.
    scratch: memory of products for each thread, as split_rows.new_scratch makes it.
    """

    job: Any
    n_blocks: Any
    tokens: Any
    cache_slots: Any
    runs: Any
    x: Any
    normed: Any
    q: Any
    q_heads: Any
    k: Any
    v: Any
    attended: Any
    projected: Any
    gate: Any
    up: Any
    normed_activations: Any
    attended_activations: Any
    hidden_activations: Any
    context: Any
    scratch: Any


class RopeTables(NamedTuple):
    """The cosines and sines of RoPE's angles at every position (capacity, D / 2)."""

    cos: Any
    sin: Any


@kernel
def work(weights: Any, space: Any, rope_tables: Any, shared: Any, generation: int, thread: int) -> None:
    """Run the model over the new positions of space.job, together with other threads; see threads.py.

    Args:
        weights: layers.Weights.
        space: Workspace; its job, tokens, cache_slots and runs describe the pass.
        rope_tables: RopeTables of all positions.
        shared: the team's words.
        generation: the number under which the team passed these arguments.
        thread: the thread's number. Thread 0, the caller's, opens the job and returns when it is done.
    """
    model, memory, n_blocks = by_address(weights), by_address(space), space.n_blocks
    if thread == 0:
        threads.open_job(shared)
    stage = -1
    while True:
        stage, block = threads.next_block(shared, n_blocks, generation, thread, stage)
        if stage < 0:
            return
        run_block(model, memory, rope_tables, stage, block, thread)


@inner_kernel
def run_block(weights: Any, space: Any, rope_tables: Any, stage: int, block: int, thread: int) -> None:
    """Run one block of a stage."""
    layer = min(stage // STAGES_PER_LAYER, weights.attention_norm.shape[0] - 1)
    kind, n_blocks = stage - layer * STAGES_PER_LAYER, space.n_blocks[stage]
    if kind == ATTENTION_NORM:
        attention_norm(weights, space, layer, block, n_blocks)
    elif kind == QKV:
        qkv(weights, space, layer, block, n_blocks, thread)
    elif kind == ROPE_AND_CACHE:
        rope_and_cache(space, rope_tables, layer, block, n_blocks, thread)
    elif kind == ATTEND:
        attend(space, layer, block, n_blocks, thread)
    elif kind == PREPARE_ATTENDED:
        prepare_attended(space, block, n_blocks)
    elif kind == ATTENTION_OUTPUT:
        attention_output(weights, space, layer, block, n_blocks, thread)
    elif kind == FFN_NORM:
        ffn_norm(weights, space, layer, block, n_blocks)
    elif kind == GATE_UP:
        gate_up(weights, space, layer, block, n_blocks, thread)
    elif kind == PREPARE_HIDDEN:
        prepare_hidden(space, block, n_blocks)
    elif kind == DOWN:
        down(weights, space, layer, block, n_blocks, thread)
    elif kind == FINAL_NORM:
        final_norm(weights, space, block, n_blocks)
    else:
        logits(weights, space, block, n_blocks, thread)


# -- the stages -------------------------------------------------------------------------------------------------------


@inner_kernel
def attention_norm(weights: Any, space: Any, layer: int, block: int, n_blocks: int) -> None:
    """Embed the tokens, or finish the layer before; then normalise a share of the positions for attention."""
    first, last = share_of_positions(space, block, n_blocks)
    if layer == 0:
        table = layer_of(weights.tok_embeddings, 0)
        for t in range(first, last):
            ops.embed(table, space.tokens[t], space.x[t], weights.group_size)
    else:
        add_rows(space.x, space.projected, first, last)
    norm, normed = weights.attention_norm[layer], space.normed
    norm_rows(space.x, norm, weights.norm_eps, normed, space.normed_activations, first, last)


@inner_kernel
def qkv(weights: Any, space: Any, layer: int, block: int, n_blocks: int, thread: int) -> None:
    """Multiply by a share of the rows of wq, wk or wv: three blocks in a row take the same share of each."""
    matrix = (weights.wq, weights.wk, weights.wv)[block % 3]
    out = (space.q, space.k, space.v)[block % 3]
    activations = space.normed_activations
    multiply(space, layer_of(matrix, layer), activations, space.job[0].count, out, block // 3, n_blocks // 3, thread)


@inner_kernel
def rope_and_cache(space: Any, rope_tables: Any, layer: int, block: int, n_blocks: int, thread: int) -> None:
    """Turn queries and keys of a share of the key-value heads; write the keys and values of runs to their caches.

    The keys of neighbouring positions share cache lines, so the positions are not cut. `attend` puts those of single
    positions there.
    """
    head_dim = space.q_heads.shape[1]
    n_heads, n_kv_heads = space.q.shape[1] // head_dim, space.k.shape[1] // head_dim
    group, (first, last) = n_heads // n_kv_heads, share_of(n_kv_heads, block, n_blocks)
    columns, q_columns = (
        slice(first * head_dim, last * head_dim),
        slice(first * group * head_dim, last * group * head_dim),
    )
    job = space.job[0]
    for t in range(job.count):
        position = space.cache_slots[t].position
        cos, sin = rope_tables.cos[position], rope_tables.sin[position]
        ops.rope(space.q[t, q_columns], cos, sin)
        ops.rope(space.k[t, columns], cos, sin)
    for i in range(job.n_runs):
        kv_slots.keep_prompt(
            space.cache_slots, space.runs[i], space.runs[i + 1], layer * n_kv_heads, space.k, space.v, first, last,
            head_dim, space.context.keys[thread],
        )  # fmt: skip


@inner_kernel
def attend(space: Any, layer: int, block: int, n_blocks: int, thread: int) -> None:
    """Let the new positions attend to their sequences so far: a share of the heads, positions and pieces of these."""
    job, head_dim = space.job[0], space.q_heads.shape[1]
    attention.attend(
        space.q_heads, space.k, space.v, space.cache_slots, job.count, space.runs, job.n_runs, layer,
        space.q.shape[1] // head_dim, space.context, block, n_blocks, thread,
    )  # fmt: skip


@inner_kernel
def prepare_attended(space: Any, block: int, n_blocks: int) -> None:
    """Join what was computed for a share of the positions, and write it as wo multiplies it."""
    first, last = share_of_positions(space, block, n_blocks)
    head_dim, job = space.q_heads.shape[1], space.job[0]
    n_heads = space.q.shape[1] // head_dim
    attention.finish(space.cache_slots, job.count, n_heads, head_dim, space.context, space.attended, first, last)
    ops.prepare_activations(space.attended, space.attended_activations, first, last)


@inner_kernel
def attention_output(weights: Any, space: Any, layer: int, block: int, n_blocks: int, thread: int) -> None:
    """Multiply by a share of the rows of wo."""
    matrix, activations = layer_of(weights.wo, layer), space.attended_activations
    multiply(space, matrix, activations, space.job[0].count, space.projected, block, n_blocks, thread)


@inner_kernel
def ffn_norm(weights: Any, space: Any, layer: int, block: int, n_blocks: int) -> None:
    """Add attention's output and normalise a share of the positions for the feed-forward network."""
    first, last = share_of_positions(space, block, n_blocks)
    add_rows(space.x, space.projected, first, last)
    norm_rows(space.x, weights.ffn_norm[layer], weights.norm_eps, space.normed, space.normed_activations, first, last)


@inner_kernel
def gate_up(weights: Any, space: Any, layer: int, block: int, n_blocks: int, thread: int) -> None:
    """Multiply by the same share of the rows of w1 and w3, and join the results by swiglu."""
    count, activations = space.job[0].count, space.normed_activations
    multiply(space, layer_of(weights.w1, layer), activations, count, space.gate, block, n_blocks, thread)
    rows = multiply(space, layer_of(weights.w3, layer), activations, count, space.up, block, n_blocks, thread)
    for t in range(count):
        ops.swiglu(space.gate[t, rows], space.up[t, rows])


@inner_kernel
def prepare_hidden(space: Any, block: int, n_blocks: int) -> None:
    """Write a share of the positions' hidden activations as w2 multiplies them."""
    first, last = share_of_positions(space, block, n_blocks)
    ops.prepare_activations(space.gate, space.hidden_activations, first, last)


@inner_kernel
def down(weights: Any, space: Any, layer: int, block: int, n_blocks: int, thread: int) -> None:
    """Multiply by a share of the rows of w2."""
    matrix, activations = layer_of(weights.w2, layer), space.hidden_activations
    multiply(space, matrix, activations, space.job[0].count, space.projected, block, n_blocks, thread)


@inner_kernel
def final_norm(weights: Any, space: Any, block: int, n_blocks: int) -> None:
    """Add the last layer's output and normalise a share of the positions for the logits."""
    first, last = share_of_positions(space, block, n_blocks)
    add_rows(space.x, space.projected, first, last)
    norm_rows(space.x, weights.norm, weights.norm_eps, space.normed, space.normed_activations, first, last)


@inner_kernel
def logits(weights: Any, space: Any, block: int, n_blocks: int, thread: int) -> None:
    """Multiply the last positions by a share of the rows of the output matrix."""
    n_logits = space.job[0].n_logits
    out = floats_at(space.job[0].logits, n_logits, weights.vocab_size)
    multiply(space, layer_of(weights.output, 0), space.normed_activations, n_logits, out, block, n_blocks, thread)


# -- parts of the stages ----------------------------------------------------------------------------------------------


@inner_kernel
def share_of(n: int, block: int, n_blocks: int) -> Any:
    """Return the first of a block's share of n things, and the one after its last."""
    return n * block // n_blocks, n * (block + 1) // n_blocks


@inner_kernel
def share_of_positions(space: Any, block: int, n_blocks: int) -> Any:
    """Return a block's share of the positions, as share_of; those that are prepared together stay together."""
    count, lanes = space.job[0].count, ops.lanes_of(space.normed_activations)
    first, last = share_of((count + lanes - 1) // lanes, block, n_blocks)
    return first * lanes, min(last * lanes, count)


@inner_kernel
def multiply(
    space: Any, matrix: Any, activations: Any, n_vectors: int, out: Any, block: int, n_blocks: int, thread: int
) -> Any:
    """Multiply the last n_vectors positions by a block's share of a matrix's rows; return these rows as a slice."""
    job, n_rows = space.job[0], out.shape[1]
    first, last = share_of((n_rows + ROW_BLOCK - 1) // ROW_BLOCK, block, n_blocks)
    scratch = space.scratch[thread]
    ops.matmul(matrix, activations, job.count - n_vectors, n_vectors, out, first, last, scratch)
    return slice(first * ROW_BLOCK, min(last * ROW_BLOCK, n_rows))


@inner_kernel
def add_rows(x: Any, y: Any, first: int, last: int) -> None:
    """Add y[first:last] to x[first:last], both (T, C)."""
    for t in range(first, last):
        for i in range(x.shape[1]):
            x[t, i] += y[t, i]


@inner_kernel
def norm_rows(x: Any, weight: Any, eps: float, normed: Any, activations: Any, first: int, last: int) -> None:
    """Normalise x[first:last] (T, C), and write the result as the next matrix multiplies it."""
    for t in range(first, last):
        ops.rmsnorm(x[t], weight, eps, normed[t])
    ops.prepare_activations(normed, activations, first, last)
