"""The memory of a training step: what it holds follows from the model's shape and the batch's, and is taken once.

N is B * T, all positions of a batch; the other shape letters are those of backward/reference.py. Operands of products
are float32 like the rest, or bfloat16, their rows filled up: see kernels/bfloat16.py.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llamalet.backward import attention, head
from llamalet.backward.attention import AttentionSpace
from llamalet.backward.head import HeadSpace
from llamalet.backward.memory import Take, allocate, bytes_of
from llamalet.backward.ops import BLOCK_ROWS
from llamalet.backward.reference import LayerActivations
from llamalet.config import ModelConfig
from llamalet.errors import ConfigError
from llamalet.kernels import products
from llamalet.kernels.threads import BLOCK_MASK
from llamalet.model_file.tensors import tensor_specs
from llamalet.reference import LAYER_TENSORS


@dataclass
class TrainingWorkspace:
    """The arrays of a step.

    weights, gradients: the checkpoint's tensors by name, without ".weight".
    layers: the activations of each layer, as backward/reference.py names them; q, k and v by heads. x, middle, gate and
        up are float32, the rest are operands.
    x: the last layer's output (N, C).
    normed: (N, C), after the last norm, an operand.
    losses: (N,).
    projected: what attention or feed-forward adds to x (N, C).
    d_projected: its gradient, an operand.
    q, k, v: (N, H * D), (N, G * D), (N, G * D): the products before the heads are split.
    d_q, d_k, d_v: their gradients, operands.
    d_x: gradient of the residual stream (N, C).
    d_normed: (N, C).
    d_mixed: (N, H * D).
    d_q_heads, d_k_heads, d_v_heads: gradients by heads, as LayerActivations' q, k and v.
    d_hidden: (N, F).
    d_gate, d_up: (N, F), operands.
    d_norms: gradients of a norm's weight, block by block (blocks, C).
    packed_right: the packed right side of a product: a flat array for the largest.
    packed_left: the left side of a product if it has to be packed or transposed, likewise.
    output_by_rows: the output matrix packed by rows.
    normed_by_columns: positions of normed, as many as the head takes at a time, packed by columns.
    head: see head.HeadSpace.
    attention: see attention.AttentionSpace; all products of whole matrices use its edges.
    """

    weights: dict[str, Any]
    gradients: dict[str, Any]
    layers: list[LayerActivations]
    x: Any
    normed: Any
    losses: Any
    projected: Any
    d_projected: Any
    q: Any
    k: Any
    v: Any
    d_q: Any
    d_k: Any
    d_v: Any
    d_x: Any
    d_normed: Any
    d_mixed: Any
    d_q_heads: Any
    d_k_heads: Any
    d_v_heads: Any
    d_hidden: Any
    d_gate: Any
    d_up: Any
    d_norms: Any
    packed_right: Any
    packed_left: Any
    output_by_rows: Any
    normed_by_columns: Any
    head: HeadSpace
    attention: AttentionSpace


def new_workspace(
    config: ModelConfig, batch_size: int, n_positions: int, n_threads: int, *, rounded: bool
) -> TrainingWorkspace:
    """Return the memory of a step.

    Args:
        config: the model's shape.
        batch_size: sequences in a batch (B).
        n_positions: positions of each (T).
        n_threads: threads that share the work.
        rounded: whether products multiply bfloat16.

    Raises:
        ConfigError: if the batch is empty, or larger than the threads' counters.
        MemoryError: if there is not as much memory.
    """
    if batch_size < 1 or n_positions < 1 or batch_size * config.n_heads > BLOCK_MASK:
        most = BLOCK_MASK // config.n_heads
        raise ConfigError(f"batch_size={batch_size} of {n_positions} tokens: must be from 1 to {most} sequences")
    return allocate(partial(lay_out, config, batch_size, n_positions, n_threads, rounded))


def n_bytes(config: ModelConfig, batch_size: int, n_positions: int, n_threads: int, *, rounded: bool) -> int:
    """Return the bytes of `new_workspace` with these arguments."""
    return bytes_of(partial(lay_out, config, batch_size, n_positions, n_threads, rounded))


def lay_out(
    config: ModelConfig, batch_size: int, n_positions: int, n_threads: int, rounded: bool, take: Take
) -> TrainingWorkspace:
    """Return a workspace of arrays that `take(*shape, dtype=)` returns; the other arguments are new_workspace's."""
    B, T, C, F, V, D = batch_size, n_positions, config.dim, config.hidden_dim, config.vocab_size, config.head_dim
    N, H, G = B * T, config.n_heads, config.n_kv_heads
    tensors = {spec.name: spec.shape for spec in tensor_specs(1, config)}
    kind = products.PAIRS if rounded else products.FLOATS
    panels_shape, left_shape = kind.panels_shape, kind.left_shape

    def operand(*shape: int) -> Any:
        """Take an operand."""
        return take(*shape[:-1], kind.width(shape[-1]), dtype=kind.operand)

    def flat(*shapes: tuple[int, ...], dtype: type[np.generic] = kind.packed) -> Any:
        """Take a flat array, large enough for each shape."""
        return take(max(math.prod(shape) for shape in shapes), dtype=dtype)

    # A weight is packed by rows in the forward pass and by columns in the backward pass, activations by columns.
    in_layer = [tensors[f"layers.0.{name}"] for name in LAYER_TENSORS if not name.endswith("norm")]
    rights = [panels_shape(*pair) for rows, cols in in_layer for pair in ((cols, rows), (rows, cols))]
    widths = [kind.width(width) for width in (C, H * D, F)]
    weights, gradients = ({name: take(*shape) for name, shape in tensors.items()} for _ in range(2))
    layers = [
        LayerActivations(
            x=take(N, C),
            attention_normed=operand(N, C),
            q=operand(B, H, T, D),
            k=operand(B, G, T, D),
            v=operand(B, G, T, D),
            mixed=operand(N, H * D),
            middle=take(N, C),
            ffn_normed=operand(N, C),
            gate=take(N, F),
            up=take(N, F),
            hidden=operand(N, F),
        )
        for _ in range(config.n_layers)
    ]
    return TrainingWorkspace(
        weights=weights,
        gradients=gradients,
        layers=layers,
        x=take(N, C),
        normed=operand(N, C),
        losses=take(N),
        projected=take(N, C),
        d_projected=operand(N, C),
        q=take(N, H * D),
        k=take(N, G * D),
        v=take(N, G * D),
        d_q=operand(N, H * D),
        d_k=operand(N, G * D),
        d_v=operand(N, G * D),
        d_x=take(N, C),
        d_normed=take(N, C),
        d_mixed=take(N, H * D),
        d_q_heads=take(B, H, T, D),
        d_k_heads=take(B, G, T, D),
        d_v_heads=take(B, G, T, D),
        d_hidden=take(N, F),
        d_gate=operand(N, F),
        d_up=operand(N, F),
        d_norms=take(-(-N // BLOCK_ROWS), C),
        packed_right=flat(
            *rights, panels_shape(min(V, head.GROUP * head.COLUMNS), C), *(panels_shape(N, width) for width in widths)
        ),
        packed_left=flat(*(left_shape(N, width) for width in widths), dtype=kind.operand),
        output_by_rows=flat(panels_shape(C, V)),
        normed_by_columns=flat(panels_shape(head.rows_at_once(N, V, rounded=rounded), widths[0])),
        head=head.lay_out(N, V, n_threads, rounded, take),
        attention=attention.lay_out(T, D, n_threads, rounded, take),
    )
