"""The memory of a training step: what it holds follows from the model's shape and the batch's, and is taken once.

N is B * T, all positions of a batch; the other shape letters are those of backward/reference.py.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from llamalet.backward.memory import Take, allocate, bytes_of
from llamalet.backward.ops import BLOCK_ROWS, AttentionSpace
from llamalet.backward.reference import LayerActivations
from llamalet.config import ModelConfig
from llamalet.errors import ConfigError
from llamalet.kernels.layers import FLOAT_BYTES
from llamalet.kernels.products import EDGE_SHAPE, panels_shape
from llamalet.kernels.threads import BLOCK_MASK
from llamalet.model_file.tensors import tensor_specs

LOGITS_BYTES = 1 << 25
"""The logits of so many positions are computed at a time as fit into this many bytes."""


@dataclass
class TrainingWorkspace:
    """The arrays of a step, float32.

    weights, gradients: the checkpoint's tensors by name, without ".weight".
    layers: the activations of each layer, as backward/reference.py names them; q, k and v by heads.
    x: the last layer's output (N, C).
    normed: (N, C), after the last norm.
    logits: those of some positions (R, V), then their gradient.
    losses: (N,).
    projected: what attention or feed-forward adds to x, or its gradient (N, C).
    q, k, v: (N, H * D), (N, G * D), (N, G * D): the products before the heads are split, or their gradients.
    d_x: gradient of the residual stream (N, C).
    d_normed: (N, C).
    d_mixed: (N, H * D).
    d_q, d_k, d_v: gradients by heads.
    d_hidden: (N, F).
    d_norms: gradients of a norm's weight, block by block (blocks, C).
    packed_right: the packed right side of a product: a flat array for the largest.
    packed_left: a packed left side, likewise.
    output_by_rows: the output matrix packed by rows, while `packed_right` has it by columns.
    normed_by_columns: some positions (R, C) of normed, packed by columns.
    attention: see ops.AttentionSpace; all products use its edges.
    """

    weights: dict[str, Any]
    gradients: dict[str, Any]
    layers: list[LayerActivations]
    x: Any
    normed: Any
    logits: Any
    losses: Any
    projected: Any
    q: Any
    k: Any
    v: Any
    d_x: Any
    d_normed: Any
    d_mixed: Any
    d_q: Any
    d_k: Any
    d_v: Any
    d_hidden: Any
    d_norms: Any
    packed_right: Any
    packed_left: Any
    output_by_rows: Any
    normed_by_columns: Any
    attention: AttentionSpace


def new_workspace(config: ModelConfig, batch_size: int, n_positions: int, n_threads: int) -> TrainingWorkspace:
    """Return the memory of a step.

    Args:
        config: the model's shape.
        batch_size: sequences in a batch (B).
        n_positions: positions of each (T).
        n_threads: threads that share the work.

    Raises:
        ConfigError: if the batch is empty, or larger than the threads' counters.
        MemoryError: if there is not as much memory.
    """
    if batch_size < 1 or n_positions < 1 or batch_size * config.n_heads > BLOCK_MASK:
        most = BLOCK_MASK // config.n_heads
        raise ConfigError(f"batch_size={batch_size} of {n_positions} tokens: must be from 1 to {most} sequences")
    return allocate(partial(lay_out, config, batch_size, n_positions, n_threads))


def n_bytes(config: ModelConfig, batch_size: int, n_positions: int, n_threads: int) -> int:
    """Return the bytes of `new_workspace` with these arguments."""
    return bytes_of(partial(lay_out, config, batch_size, n_positions, n_threads))


def lay_out(config: ModelConfig, batch_size: int, n_positions: int, n_threads: int, take: Take) -> TrainingWorkspace:
    """Return a workspace of arrays that `take(*shape)` returns; the other arguments are new_workspace's."""
    B, T, C, F, V, D = batch_size, n_positions, config.dim, config.hidden_dim, config.vocab_size, config.head_dim
    N, H, G = B * T, config.n_heads, config.n_kv_heads
    R = min(N, max(1, LOGITS_BYTES // (FLOAT_BYTES * V)), BLOCK_MASK)  # a block of the loss is a row
    tensors = {spec.name: spec.shape for spec in tensor_specs(1, config)}
    matrices = [shape for shape in tensors.values() if len(shape) == 2]
    # A weight is packed by rows in the forward pass and by columns in the backward pass, activations by columns.
    right = [panels_shape(cols, rows) for rows, cols in matrices] + [
        panels_shape(rows, cols) for rows, cols in matrices
    ]
    activations = [panels_shape(N, width) for width in (C, H * D, F)]
    return TrainingWorkspace(
        weights={name: take(*shape) for name, shape in tensors.items()},
        gradients={name: take(*shape) for name, shape in tensors.items()},
        layers=[
            LayerActivations(
                x=take(N, C),
                attention_normed=take(N, C),
                q=take(B, H, T, D),
                k=take(B, G, T, D),
                v=take(B, G, T, D),
                mixed=take(N, H * D),
                middle=take(N, C),
                ffn_normed=take(N, C),
                gate=take(N, F),
                up=take(N, F),
                hidden=take(N, F),
            )
            for _ in range(config.n_layers)
        ],
        x=take(N, C),
        normed=take(N, C),
        logits=take(R, V),
        losses=take(N),
        projected=take(N, C),
        q=take(N, H * D),
        k=take(N, G * D),
        v=take(N, G * D),
        d_x=take(N, C),
        d_normed=take(N, C),
        d_mixed=take(N, H * D),
        d_q=take(B, H, T, D),
        d_k=take(B, G, T, D),
        d_v=take(B, G, T, D),
        d_hidden=take(N, F),
        d_norms=take(-(-N // BLOCK_ROWS), C),
        packed_right=take(max(math.prod(shape) for shape in [*right, *activations])),
        packed_left=take(max(math.prod(shape) for shape in [*activations, panels_shape(R, V)])),
        output_by_rows=take(math.prod(panels_shape(C, V))),
        normed_by_columns=take(math.prod(panels_shape(R, C))),
        attention=AttentionSpace(
            weights=take(n_threads, T, T),
            d_weights=take(n_threads, T, T),
            by_rows=take(n_threads, *panels_shape(D, T)),
            by_columns=take(n_threads, *panels_shape(T, D)),
            edges=take(n_threads, *EDGE_SHAPE),
        ),
    )
