"""Rounding that watches what it does: q8 and q4 chosen on text, so that a model's outputs change least.

Plain rounding makes each weight's error small. But a layer multiplies its weights by inputs that are correlated, so the
error of one weight can be made good by the next ones. GPTQ does that: it rounds a matrix column by column, and after
each it changes the columns that are left so that the outputs on some text stay as close as they can be.

Two models read the text side by side: the original one, and the one whose matrices are rounded so far. Each matrix is
chosen to turn the second one's inputs into the first one's outputs; what is added to the residual stream also makes
good the difference there. Read `calibrate` last, `gptq` first. Letters as in reference.py; N is the positions of all
texts together. Source: https://arxiv.org/abs/2210.17323; inputs of the rounded model and outputs of the original one:
https://arxiv.org/abs/2504.02692.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig, rope_frequencies
from llamalet.errors import note
from llamalet.model_file.quantize import (
    ENCODINGS,
    Packed,
    dequantize,
    from_bfloat16,
    pack_values,
    round_q4,
    round_q8,
    to_bfloat16,
)
from llamalet.model_file.tensors import BinTensor, Rows, row_blocks
from llamalet.reference import LAYER_TENSORS, attention, hidden_states, rmsnorm, rope, softmax, swiglu

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.integer[Any]]
Weights = Mapping[str, Array]
Layer = dict[str, Array]

WINDOW = 256  # positions of a text: attention costs their square
N_WINDOWS = 128  # with half as many, 4 bits cost a model of 0.26 M parameters 3.0 % instead of 2.8 %
MIN_TOKENS = 1024

# What is added to a Hessian's diagonal, as a share of its mean: without it, directions that the text hardly uses are
# filled with the errors of all others.
DAMPING = 0.2
# Passes of `refine`.
REFINEMENTS = 3
# Integers of each dtype, and the function that chooses a group's scale.
LIMITS = {"q8": (-127, 127), "q4": (-8, 7)}
DTYPES = tuple(LIMITS)
ROUND_GROUPS = {"q8": round_q8, "q4": round_q4}

# Logits whose p (1 - p) is below this do not count, so that only the likely tokens of each position cost time.
LEAST_SPREAD = 1e-3
# The embeddings get a Hessian per row if that takes at most this many multiplications.
MAX_ROW_WORK = 2e12
# What a row of the embeddings costs at least, as a share of the average.
UNSEEN = 0.1
PROBE_NOISE = 0.1  # of the embeddings' root mean square
TOKENS_AT_ONCE = 512  # whose logits are in memory

REPORT_AFTER_S = 2.0


def gptq(weights: Doubles, hessian: Doubles, dtype: str) -> Packed:
    """Round a matrix column by column, and correct the columns that are left for the error of each.

    If column j is off by e, the others lose least when column k changes by -e * inverse[j, k] / inverse[j, j], with the
    inverse of the Hessian of the columns that are left. All those inverses are in one Cholesky factor. A group's scale
    is chosen when its first column is reached, for the corrected weights. `refine` has the last word.

    Args:
        weights: (rows, cols).
        hessian: (cols, cols), the sum of x x^T over the inputs; or (rows, cols, cols), one for each row.
        dtype: q8 or q4.

    Source: https://arxiv.org/abs/2210.17323, algorithm 1.
    """
    (rows, cols), group_size = weights.shape, _group_size(dtype)
    hessian = damped(hessian)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).swapaxes(-1, -2)  # upper; factor^T factor is the inverse
    # What the error of a column costs after the best correction of those behind it, relative to the average column.
    costs = np.diagonal(factor, axis1=-2, axis2=-1) ** -2.0  # (cols,) or (rows, cols)
    costs = (costs / costs.mean(axis=-1, keepdims=True)).astype(np.float32)
    left, values = weights.copy(), np.empty_like(weights)
    scales = np.empty((rows, -(-cols // group_size)))
    for start in range(0, cols, group_size):
        end = min(start + group_size, cols)
        group, errors = left[:, start:end], np.empty((rows, end - start))
        _, bits = ROUND_GROUPS[dtype](group.astype(np.float32), costs[..., start:end])
        scales[:, start // group_size] = scale = from_bfloat16(bits).astype(np.float64)
        for i, j in enumerate(range(start, end)):
            values[:, j] = _nearest(group[:, i], scale, dtype)
            errors[:, i] = (group[:, i] - values[:, j] * scale) / factor[..., j, j]
            group[:, i + 1 :] -= errors[:, i, None] * factor[..., j, j + 1 : end]
        left[:, end:] -= _times(errors, factor[..., start:end, end:])
    for _ in range(REFINEMENTS):
        refine(weights, values, scales, hessian, dtype)
    bits = to_bfloat16(scales.astype(np.float32))
    return pack_values(values.astype(np.int8), bits, ENCODINGS[dtype].bits, group_size)


def refine(weights: Doubles, values: Doubles, scales: Doubles, hessian: Doubles, dtype: str) -> None:
    """Lower the cost of the errors by changing one scale or one column of integers at a time, in place.

    The cost of errors e is e^T hessian e for each row. In one variable it is a parabola, whose lowest point is known;
    what is nearest to it and can be stored is taken.

    Args:
        weights: (rows, cols), what was rounded.
        values: the integers (rows, cols).
        scales: bfloat16 numbers (rows, groups).
        hessian: as in `gptq`.
        dtype: q8 or q4.
    """
    group_size = _group_size(dtype)
    slopes = _times(weights - values * np.repeat(scales, group_size, axis=1)[:, : weights.shape[1]], hessian)
    for g, scale in enumerate(scales.T):
        part = slice(g * group_size, min((g + 1) * group_size, weights.shape[1]))
        h, q = hessian[..., part, part], values[:, part]
        before = q * scale[:, None]
        slope, curvature = np.sum(slopes[:, part] * q, axis=1), np.sum(_times(q, h) * q, axis=1)
        wanted = scale + slope / np.where(curvature > 0, curvature, np.inf)
        step = from_bfloat16(to_bfloat16(wanted.astype(np.float32))) - scale
        scale += np.where(step * (step * curvature - 2 * slope) < 0, step, 0)
        near = slopes[:, part] - _times(q * scale[:, None] - before, h)
        for i in range(q.shape[1]):
            wanted = q[:, i] * scale + near[:, i] / h[..., i, i]
            change = _nearest(wanted, scale, dtype) - q[:, i]
            q[:, i] += change
            near -= (change * scale)[:, None] * h[..., i, :]
        slopes -= _times(q * scale[:, None] - before, hessian[..., part, :])


def _group_size(dtype: str) -> int:
    """Return the number of columns that share a scale."""
    group_size = ENCODINGS[dtype].group_size
    assert group_size is not None
    return group_size


def _nearest(x: Doubles, scale: Doubles, dtype: str) -> Doubles:
    """Return the integers nearest to x / scale that a dtype has; 0 for a scale of 0."""
    return np.clip(np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)), *LIMITS[dtype])


def _times(x: Doubles, matrix: Doubles) -> Doubles:
    """Multiply vectors (rows, n) by a matrix (n, m), or each by its own (rows, n, m): (rows, m)."""
    return x @ matrix if matrix.ndim == 2 else (x[:, None] @ matrix)[:, 0]


def damped(hessian: Doubles) -> Doubles:
    """Return Hessians (..., cols, cols) with DAMPING of their mean diagonal added to it; one of zeros becomes 1."""
    cols = hessian.shape[-1]
    mean = np.trace(hessian, axis1=-2, axis2=-1) / cols
    added = np.where(mean > 0, DAMPING * mean, 1)
    return hessian + added[..., None, None] * np.eye(cols)


def fit(weight: Array, inputs: Array, wanted: Array, dtype: str) -> Packed:
    """Round a matrix so that it turns inputs into wanted outputs.

    Before rounding, the matrix becomes the best one for that: the least squares solution, which damping holds near the
    original one.

    Args:
        weight: float32 (rows, cols).
        inputs: (..., cols), of the rounded model.
        wanted: (..., rows).
        dtype: q8 or q4.
    """
    inputs, wanted = inputs.reshape(-1, inputs.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    hessian = (inputs.T @ inputs).astype(np.float64)
    missing = wanted - inputs @ weight.T  # (N, rows)
    change = np.linalg.solve(damped(hessian), (inputs.T @ missing).astype(np.float64))
    return gptq(weight + change.T, hessian, dtype)


# -- the embeddings ---------------------------------------------------------------------------------------------------


def output_hessian(normed: Array, output: Array, *, per_row: bool) -> Doubles:
    """Return how much errors of the output matrix cost: (V, C, C), or (C, C), the sum over its rows.

    To second order, an error d of token v's logit costs p (1 - p) d^2 / 2 nats, with the probability p of v there. So
    only positions where v is one possibility among others count.

    Args:
        normed: what the output matrix is applied to (N, C).
        output: float32 (V, C).
        per_row: whether to keep the rows apart.
    """
    at, tokens, spreads = [], [], []
    for start in range(0, len(normed), TOKENS_AT_ONCE):
        p = softmax(normed[start : start + TOKENS_AT_ONCE] @ output.T)
        spread = p * (1 - p)
        position, token = np.nonzero(spread > LEAST_SPREAD)
        at.append(position + start)
        tokens.append(token)
        spreads.append(spread[position, token])
    position, token, weight = np.concatenate(at), np.concatenate(tokens), np.concatenate(spreads)
    if not per_row:
        total = np.bincount(position, weight, len(normed)).astype(np.float32)  # (N,)
        return ((normed * total[:, None]).T @ normed).astype(np.float64)
    vocab_size = len(output)
    order = np.argsort(token, kind="stable")
    cuts = np.searchsorted(token[order], np.arange(vocab_size + 1))
    hessian = np.zeros((vocab_size, normed.shape[1], normed.shape[1]))
    for v in range(vocab_size):
        mine = order[cuts[v] : cuts[v + 1]]
        x = normed[position[mine]]
        hessian[v] = (x * weight[mine, None]).T @ x
    return hessian


def lookup_cost(weights: Weights, config: ModelConfig, tokens: Ids, normed: Array) -> float:
    """Return how much errors of the embeddings cost where they are looked up: nats per token, for d^2 / 2.

    It is measured: noise is added to the embeddings that the model reads, and the divergence of its predictions from
    those without noise is divided by the noise's energy.

    Args:
        weights: the model.
        config: its shape.
        tokens: ids (B, T).
        normed: the hidden states without noise (N, C).
    """
    embeddings, output = weights["tok_embeddings"], weights.get("output", weights["tok_embeddings"])
    noise = np.random.default_rng(0).standard_normal((tokens.size, config.dim), np.float32)
    noise *= np.float32(PROBE_NOISE * np.sqrt(np.mean(embeddings * embeddings)))
    noisy = {**weights, "tok_embeddings": embeddings[tokens.reshape(-1)] + noise}
    moved = read_texts(noisy, config, np.arange(tokens.size).reshape(tokens.shape))
    nats = 0.0
    for start in range(0, len(normed), TOKENS_AT_ONCE):
        p, q = (softmax(x[start : start + TOKENS_AT_ONCE] @ output.T) for x in (normed, moved))
        tiny = np.finfo(np.float32).tiny
        nats += float(np.sum(p * np.log((p + tiny) / (q + tiny)), dtype=np.float64))
    return 2 * max(nats, 0.0) / float(np.vdot(noise, noise))


def round_embeddings(weights: Weights, config: ModelConfig, tokens: Ids, normed: Array, dtype: str) -> Packed:
    """Round the embeddings for where they are looked up and, in a tied model, for the logits too; arguments as above.

    The two costs are in the same unit, so they are added. Rows that the text does not use get a share of what the
    others cost on average.
    """
    c = config
    counts = np.bincount(tokens.reshape(-1), minlength=c.vocab_size).astype(np.float64)
    lookup = lookup_cost(weights, c, tokens, normed) * np.eye(c.dim)
    per_row = c.tied and c.vocab_size * c.dim**3 <= MAX_ROW_WORK
    hessian = tokens.size * lookup
    if c.tied:
        hessian = hessian + (output_hessian(normed, weights["tok_embeddings"], per_row=False))
    if per_row:
        average = hessian / c.vocab_size
        hessian = counts[:, None, None] * lookup + UNSEEN * average
        hessian += output_hessian(normed, weights["tok_embeddings"], per_row=True)
    return gptq(weights["tok_embeddings"].astype(np.float64), hessian, dtype)


# -- a model ----------------------------------------------------------------------------------------------------------


def calibrate(config: ModelConfig, tensors: Mapping[str, Rows], dtype: str, tokens: Ids) -> dict[str, Rows]:
    """Round a model's matrices for some text; the whole model is in memory in float32.

    Args:
        config: the model's shape.
        tensors: its tensors by their checkpoint names.
        dtype: q8 or q4.
        tokens: windows of the text, ids (B, T).

    Returns:
        The tensors, with every matrix packed as version 3 stores it.

    Raises:
        NonFiniteError: if a weight is NaN or infinite.
    """
    weights = {name: np.concatenate(list(row_blocks(name, tensor))) for name, tensor in tensors.items()}
    result: dict[str, Rows] = dict(weights)
    progress = Progress(len([w for w in weights.values() if w.ndim == 2]))
    eps = config.norm_eps

    def put(name: str, packed: Packed) -> Array:
        """Keep a rounded matrix; return it as float32."""
        result[name] = BinTensor(packed)
        progress.step(name)
        return dequantize(packed)

    normed = read_texts(weights, config, tokens)
    rounded = put("tok_embeddings", round_embeddings(weights, config, tokens, normed, dtype))
    x, y = weights["tok_embeddings"][tokens], rounded[tokens]  # (B, T, C) in the original model and the rounded one
    for layer in range(config.n_layers):
        w = {name: weights[f"layers.{layer}.{name}"] for name in LAYER_TENSORS}
        r = dict(w)

        def fit_to(name: str, inputs: Array, wanted: Array, w: Layer = w, r: Layer = r, layer: int = layer) -> None:
            """Round a matrix of this layer."""
            r[name] = put(f"layers.{layer}.{name}", fit(w[name], inputs, wanted, dtype))

        a, b = rmsnorm(x, w["attention_norm"], eps), rmsnorm(y, w["attention_norm"], eps)
        for name in ("attention.wq", "attention.wk", "attention.wv"):
            fit_to(name, b, a @ w[name].T)
        a, b = attend(a, w, config), attend(b, r, config)  # (B, T, H * D)
        x = x + a @ w["attention.wo"].T
        fit_to("attention.wo", b, x - y)
        y = y + b @ r["attention.wo"].T

        a, b = rmsnorm(x, w["ffn_norm"], eps), rmsnorm(y, w["ffn_norm"], eps)
        for name in ("feed_forward.w1", "feed_forward.w3"):
            fit_to(name, b, a @ w[name].T)
        a, b = (swiglu(z @ m["feed_forward.w1"].T, z @ m["feed_forward.w3"].T) for z, m in ((a, w), (b, r)))
        x = x + a @ w["feed_forward.w2"].T
        fit_to("feed_forward.w2", b, x - y)
        y = y + b @ r["feed_forward.w2"].T
    if not config.tied:
        b = rmsnorm(y, weights["norm"], eps).reshape(normed.shape)
        put("output", fit(weights["output"], b, normed @ weights["output"].T, dtype))
    return result


def read_texts(weights: Weights, config: ModelConfig, tokens: Ids) -> Array:
    """Return the hidden states of a model, one text (T,) after the other: (N, C)."""
    return np.concatenate([hidden_states(weights, config, text[None])[0] for text in tokens])


def attend(normed: Array, w: Weights, config: ModelConfig) -> Array:
    """Return what a layer's attention mixes, before wo: (B, T, H * D).

    Args:
        normed: (B, T, C).
        w: the layer's weights.
        config: the model's shape.
    """
    _, T, _ = normed.shape
    angles = np.outer(np.arange(T), rope_frequencies(config))  # (T, D / 2)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def heads(x: Array) -> Array:
        """Split one text's (T, n * D) into heads: (1, n, T, D)."""
        return x.reshape(1, T, -1, config.head_dim).swapaxes(1, 2)

    mixed = []
    for text in normed:  # one at a time: the scores (1, H, T, T) are the largest arrays
        q, k, v = (heads(text @ w[f"attention.{name}"].T) for name in ("wq", "wk", "wv"))
        mixed.append(attention(rope(q, cos, sin), rope(k, cos, sin), v)[0])
    return np.stack(mixed)


class Progress:
    """Reports on stderr, every other second, how many matrices are rounded."""

    def __init__(self, n_matrices: int) -> None:
        self._n, self._done, self._reported = n_matrices, 0, time.perf_counter()

    def step(self, name: str) -> None:
        """Count a matrix."""
        self._done += 1
        if time.perf_counter() - self._reported > REPORT_AFTER_S:
            self._reported = time.perf_counter()
            note(f"  calibrated {self._done} of {self._n} matrices ({name})")
