"""Every gradient of the model in plain numpy: the version to learn from, and to test every kernel against.

The gradient of an array x, called d_x, has the shape of x and says how fast the loss changes with each number in x. A
function y = f(x) has an adjoint, called f_backward: it takes d_y and returns d_x. Run the adjoints of the model's
functions from the loss back to the embeddings, and you have the gradients of all weights. By the chain rule that is
all of backpropagation.

Read `loss_and_gradients` first, then `forward` and `backward`, which mirror each other line by line. Each adjoint above
them belongs to the function of that name in llamalet/reference.py. Shape letters: B batch, T positions, C dim, H query
heads, G kv heads, D head_dim, F hidden_dim, V vocab, L layers. Arrays are float32, or all float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet.backward.dropout import NO_DROPOUT, Dropout
from llamalet.config import IGNORED, ModelConfig, rope_frequencies
from llamalet.reference import LAYER_TENSORS, attention_weights, mix, rmsnorm, rope, softmax, swiglu

Array = NDArray[Any]
Ids = NDArray[np.integer[Any]]
Weights = Mapping[str, Array]
Gradients = dict[str, Array]
"""Weights, or their gradients, by the checkpoint's names without ".weight"."""


def matmul_backward(d_y: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """Return the gradients of x (..., cols) and weight (rows, cols), where y = x weight^T and d_y is (..., rows).

    y[n, r] is the sum of x[n, c] weight[r, c] over c. So x[n, c] reaches each y[n, r] with the factor weight[r, c], and
    weight[r, c] reaches y[n, r] at each position n with the factor x[n, c].
    """
    rows, cols = weight.shape
    return d_y @ weight, d_y.reshape(-1, rows).T @ x.reshape(-1, cols)


def embed_backward(d_x: Array, tokens: Ids, vocab_size: int) -> Array:
    """Return the gradient of the embeddings (V, C): each token's row adds up d_x (..., C) wherever the token stands."""
    d_weight = np.zeros((vocab_size, d_x.shape[-1]), d_x.dtype)
    np.add.at(d_weight, tokens, d_x)
    return d_weight


def rmsnorm_backward(d_y: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """Return the gradients of x (..., C) and weight (C,), where y = x / r * weight and r = sqrt(mean(x^2) + eps).

    With n = x / r: d_weight sums d_y * n over all vectors. x counts twice, directly and through r. For g = d_y * weight
    the direct way gives g / r; through r, which has the derivative x / (C r), it gives -n * mean(g * n) / r.
    """
    r = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    normed, g = x / r, d_y * weight
    d_x = (g - normed * np.mean(g * normed, axis=-1, keepdims=True)) / r
    return d_x, (d_y * normed).reshape(-1, len(weight)).sum(axis=0)


def rope_backward(d_y: Array, cos: Array, sin: Array) -> Array:
    """Return the gradient of x (..., T, D). The adjoint of a rotation is the rotation back, by minus the angle."""
    return rope(d_y, cos, -sin)


def softmax_backward(d_weights: Array, weights: Array) -> Array:
    """Return the gradient of the scores, where weights = softmax(scores), all (..., S).

    Raising score i raises weight i by weight i, and the sum that all are divided by likewise:
    d weight j / d score i = weight j * ((i == j) - weight i).
    """
    return weights * (d_weights - np.sum(d_weights * weights, axis=-1, keepdims=True))


def mix_backward(d_mixed: Array, weights: Array, values: Array) -> tuple[Array, Array]:
    """Return the gradients of the attention weights (B, G, H / G, T, T) and values (B, G, T, D).

    A mixed vector (B, T, H * D) is the weighted sum of the values. All query heads of a group add to its values.
    """
    B, G, per_group, T, _ = weights.shape
    d_heads = d_mixed.reshape(B, T, G, per_group, -1).transpose(0, 2, 3, 1, 4)  # (B, G, H / G, T, D)
    d_weights = d_heads @ values[:, :, None].swapaxes(-1, -2)
    d_values = (weights.swapaxes(-1, -2) @ d_heads).sum(axis=2)
    return d_weights, d_values


def attention_weights_backward(d_weights: Array, weights: Array, q: Array, keys: Array) -> tuple[Array, Array]:
    """Return the gradients of queries (B, H, T, D) and keys (B, G, T, D), where a score is q . k / sqrt(D).

    Positions in the future have weight 0, so the softmax's adjoint gives their scores the gradient 0.
    """
    (B, H, T, D), G = q.shape, keys.shape[1]
    d_scores = softmax_backward(d_weights, weights) / np.float32(np.sqrt(D))  # (B, G, H / G, T, T)
    d_q = d_scores @ keys[:, :, None]
    d_keys = (d_scores.swapaxes(-1, -2) @ q.reshape(B, G, H // G, T, D)).sum(axis=2)
    return d_q.reshape(q.shape), d_keys


def swiglu_backward(d_hidden: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """Return the gradients of gate and up, where hidden = silu(gate) * up and silu(x) = x s for s = 1 / (1 + exp(-x)).

    The derivative of s is s (1 - s), so silu's is s + x s (1 - s).
    """
    with np.errstate(over="ignore"):  # where exp(-x) is infinite, s is its limit 0
        s = 1 / (1 + np.exp(-gate))
    return d_hidden * up * (s + gate * s * (1 - s)), d_hidden * gate * s


def cross_entropy(logits: Array, targets: Ids) -> float:
    """Return the mean of -log(softmax(logits)[target]) in nats; NaN if no target counts.

    Args:
        logits: (B, T, V).
        targets: (B, T); IGNORED ones do not count.
    """
    counted = targets != IGNORED
    logits, targets = logits[counted], targets[counted]  # (n, V), (n,)
    if not len(targets):
        return float("nan")
    largest = logits.max(axis=-1)
    log_sums = np.log(np.exp(logits - largest[:, None]).sum(axis=-1)) + largest
    return float(np.mean(log_sums - logits[np.arange(len(targets)), targets]))


def cross_entropy_backward(logits: Array, targets: Ids) -> Array:
    """Return the gradient of the logits (B, T, V): (softmax(logits) - 1 at the target) / n, 0 where none counts."""
    counted = targets != IGNORED
    d_logits = np.zeros_like(logits)
    n = np.count_nonzero(counted)
    if n:
        probabilities = softmax(logits[counted])
        probabilities[np.arange(n), targets[counted]] -= 1
        d_logits[counted] = probabilities / logits.dtype.type(n)
    return d_logits


@dataclass
class LayerActivations:
    """What a layer's backward pass needs of its forward pass."""

    x: Array  # (B, T, C), what went in
    attention_normed: Array  # (B, T, C)
    q: Array  # (B, H, T, D), rotated
    k: Array  # (B, G, T, D), rotated
    v: Array  # (B, G, T, D)
    mixed: Array  # (B, T, H * D)
    middle: Array  # (B, T, C), between attention and feed-forward
    ffn_normed: Array  # (B, T, C)
    gate: Array  # (B, T, F)
    up: Array  # (B, T, F)
    hidden: Array  # (B, T, F)


@dataclass
class Activations:
    """What the backward pass needs of the forward pass."""

    layers: list[LayerActivations]
    x: Array  # (B, T, C), before the last norm
    normed: Array  # (B, T, C)
    logits: Array  # (B, T, V)


class Sites:
    """Where dropout acts: a number for each place, so that each draws for itself."""

    EMBEDDINGS = 0

    @staticmethod
    def of_layer(layer: int) -> tuple[int, int, int]:
        """Return the sites of a layer: its attention weights, and what attention and feed-forward add."""
        return 3 * layer + 1, 3 * layer + 2, 3 * layer + 3


def loss_and_gradients(
    weights: Weights, config: ModelConfig, tokens: Ids, targets: Ids, dropout: Dropout = NO_DROPOUT
) -> tuple[float, Gradients]:
    """Return the loss of a batch, and how fast it changes with every weight.

    Args:
        weights: the checkpoint's tensors by name, without ".weight".
        config: the model's shape.
        tokens: ids (B, T).
        targets: the ids that follow (B, T); IGNORED ones do not count.
        dropout: which activations are dropped.

    Returns:
        The mean cross-entropy in nats, and the gradients by the names of the weights.
    """
    activations = forward(weights, config, tokens, dropout)
    loss = cross_entropy(activations.logits, targets)
    d_logits = cross_entropy_backward(activations.logits, targets)
    return loss, backward(weights, config, tokens, activations, d_logits, dropout)


def forward(weights: Weights, config: ModelConfig, tokens: Ids, dropout: Dropout = NO_DROPOUT) -> Activations:
    """Run the model as llamalet.reference does, but keep what the backward pass needs; arguments as above."""
    cos, sin = angles(config, tokens.shape[1], weights)
    x = weights["tok_embeddings"][tokens]  # (B, T, C)
    x = x * dropout.scales(Sites.EMBEDDINGS, x.shape)
    layers = []
    for layer in range(config.n_layers):
        w = {name: weights[f"layers.{layer}.{name}"] for name in LAYER_TENSORS}
        at_weights, at_attention, at_ffn = Sites.of_layer(layer)

        attention_normed = rmsnorm(x, w["attention_norm"], config.norm_eps)
        q = rope(heads(attention_normed @ w["attention.wq"].T, config), cos, sin)  # (B, H, T, D)
        k = rope(heads(attention_normed @ w["attention.wk"].T, config), cos, sin)  # (B, G, T, D)
        v = heads(attention_normed @ w["attention.wv"].T, config)  # (B, G, T, D)
        attended = attention_weights(q, k)  # (B, G, H / G, T, T)
        mixed = mix(attended * dropout.scales(at_weights, attended.shape), v)  # (B, T, H * D)
        middle = x + (mixed @ w["attention.wo"].T) * dropout.scales(at_attention, x.shape)

        ffn_normed = rmsnorm(middle, w["ffn_norm"], config.norm_eps)
        gate, up = ffn_normed @ w["feed_forward.w1"].T, ffn_normed @ w["feed_forward.w3"].T  # (B, T, F)
        hidden = swiglu(gate, up)
        layers.append(LayerActivations(x, attention_normed, q, k, v, mixed, middle, ffn_normed, gate, up, hidden))
        x = middle + (hidden @ w["feed_forward.w2"].T) * dropout.scales(at_ffn, x.shape)
    normed = rmsnorm(x, weights["norm"], config.norm_eps)
    return Activations(layers, x, normed, normed @ output_of(weights).T)


def backward(
    weights: Weights,
    config: ModelConfig,
    tokens: Ids,
    activations: Activations,
    d_logits: Array,
    dropout: Dropout = NO_DROPOUT,
) -> Gradients:
    """Return the gradients of all weights: `forward` read from its last line to its first.

    Args:
        weights: as above.
        config: as above.
        tokens: as above.
        activations: what `forward` returned.
        d_logits: the gradient of the logits (B, T, V).
        dropout: as in the forward pass.
    """
    cos, sin = angles(config, tokens.shape[1], weights)
    gradients: Gradients = {}
    d_normed, d_output = matmul_backward(d_logits, activations.normed, output_of(weights))
    d_x, gradients["norm"] = rmsnorm_backward(d_normed, activations.x, weights["norm"], config.norm_eps)
    for layer in reversed(range(config.n_layers)):
        w = {name: weights[f"layers.{layer}.{name}"] for name in LAYER_TENSORS}
        at_weights, at_attention, at_ffn = Sites.of_layer(layer)
        a, d_w = activations.layers[layer], {}

        # x = middle + ...: the gradient of a sum goes to both of its terms.
        d_hidden, d_w["feed_forward.w2"] = matmul_backward(
            d_x * dropout.scales(at_ffn, d_x.shape), a.hidden, w["feed_forward.w2"]
        )
        d_gate, d_up = swiglu_backward(d_hidden, a.gate, a.up)
        d_from_gate, d_w["feed_forward.w1"] = matmul_backward(d_gate, a.ffn_normed, w["feed_forward.w1"])
        d_from_up, d_w["feed_forward.w3"] = matmul_backward(d_up, a.ffn_normed, w["feed_forward.w3"])
        d_from_ffn, d_w["ffn_norm"] = rmsnorm_backward(
            d_from_gate + d_from_up, a.middle, w["ffn_norm"], config.norm_eps
        )
        d_middle = d_x + d_from_ffn

        d_mixed, d_w["attention.wo"] = matmul_backward(
            d_middle * dropout.scales(at_attention, d_x.shape), a.mixed, w["attention.wo"]
        )
        attended = attention_weights(a.q, a.k)  # computed again: they would be the largest activations
        scales = dropout.scales(at_weights, attended.shape)
        d_kept, d_v = mix_backward(d_mixed, attended * scales, a.v)
        d_q, d_k = attention_weights_backward(d_kept * scales, attended, a.q, a.k)
        d_normed = np.zeros_like(d_x)
        for name, d_heads in (("wq", rope_backward(d_q, cos, sin)), ("wk", rope_backward(d_k, cos, sin)), ("wv", d_v)):
            weight = w[f"attention.{name}"]
            d_from_heads, d_w[f"attention.{name}"] = matmul_backward(joined(d_heads), a.attention_normed, weight)
            d_normed += d_from_heads
        d_from_attention, d_w["attention_norm"] = rmsnorm_backward(d_normed, a.x, w["attention_norm"], config.norm_eps)
        d_x = d_middle + d_from_attention
        gradients |= {f"layers.{layer}.{name}": d_weight for name, d_weight in d_w.items()}

    d_x = d_x * dropout.scales(Sites.EMBEDDINGS, d_x.shape)
    gradients["tok_embeddings"] = embed_backward(d_x, tokens, config.vocab_size)
    if config.tied:  # one matrix that is used twice
        gradients["tok_embeddings"] += d_output
    else:
        gradients["output"] = d_output
    return gradients


def output_of(weights: Weights) -> Array:
    """Return the output matrix (V, C): a tied model uses its embeddings."""
    return weights.get("output", weights["tok_embeddings"])


def angles(config: ModelConfig, n_positions: int, weights: Weights) -> tuple[Array, Array]:
    """Return cos and sin of RoPE's angles, each (T, D / 2), in the type of the weights."""
    turns = np.outer(np.arange(n_positions), rope_frequencies(config))
    dtype = weights["norm"].dtype
    return np.cos(turns).astype(dtype), np.sin(turns).astype(dtype)


def heads(x: Array, config: ModelConfig) -> Array:
    """Split (B, T, n * D) into heads: (B, n, T, D)."""
    B, T, _ = x.shape
    return x.reshape(B, T, -1, config.head_dim).swapaxes(1, 2)


def joined(x: Array) -> Array:
    """Invert `heads`, which is its own adjoint: (B, n, T, D) to (B, T, n * D)."""
    B, n, T, D = x.shape
    return x.swapaxes(1, 2).reshape(B, T, n * D)
