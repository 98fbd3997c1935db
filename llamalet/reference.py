"""The forward pass in plain numpy: the version to learn from, and to test every kernel against.

Read `hidden_states` first: it is the whole model but for the output matrix. Each function above it is one step.
kernels/ops.py has a fast version of each under the same name, and kernels/stages.py a fast `hidden_states`. Shape
letters: B batch, T new positions, S cached positions (the new ones included), C dim, H query heads, G kv heads,
D head_dim, F hidden_dim, V vocab, L layers. Everything is float32 unless noted.

A weight is a matrix (rows, cols) in any form of quantize.py: float32, the bits of bfloat16, or small integers in groups
that share a scale (`Quantized`, `Packed`). With the last two the vector is quantized too, group by group, so that
products are summed in integers as in llama2.c's runq.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet.checks import token_ids
from llamalet.config import ModelConfig, rope_frequencies
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import kind_for
from llamalet.model_file.quantize import Packed, Quantized, Weight, dequantize, dequantize_rows, unpack
from llamalet.model_file.reader import ModelFile
from llamalet.sampler import choose_token

Array = NDArray[np.float32]
Tokens = Sequence[int] | NDArray[np.integer[Any]]

# NumpyTransformer reads a prompt in chunks of this many positions: enough for efficient matrix products, few enough to
# keep the attention scores, (H, T, S), small.
PREFILL_CHUNK = 256

LAYER_TENSORS = (
    "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
    "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
)  # fmt: skip


def rmsnorm(x: Array, weight: Array, eps: float) -> Array:
    """Scale each vector of x (..., C) to a root mean square of one, then each component by `weight` (C,).

    Source: https://arxiv.org/abs/1910.07467
    """
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + np.float32(eps)) * weight


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate each pair of neighbouring components by its position's angle.

    Args:
        x: (..., T, D).
        cos: (T, D / 2), the cosines of the angles of each position.
        sin: (T, D / 2).

    Source: https://arxiv.org/abs/2104.09864, with pairs (2i, 2i + 1) as in Meta's Llama.
    """
    even, odd = x[..., 0::2], x[..., 1::2]  # (..., T, D / 2) each
    rotated = np.empty_like(x)
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated


def attention(q: Array, keys: Array, values: Array) -> Array:
    """Let each new position attend to itself and all positions before it.

    Args:
        q: queries of the last T positions (B, H, T, D); H / G query heads share each kv head.
        keys: keys of all S positions (B, G, S, D).
        values: (B, G, S, D).

    Returns:
        The weighted means of the values (B, T, H * D).

    Source: https://arxiv.org/abs/1706.03762; shared kv heads: https://arxiv.org/abs/2305.13245
    """
    return mix(attention_weights(q, keys), values)


def attention_weights(q: Array, keys: Array) -> Array:
    """Return how much each new position looks at each position: (B, G, H / G, T, S); arguments as above."""
    (B, H, T, D), (_, G, S, _) = q.shape, keys.shape
    q = q.reshape(B, G, H // G, T, D)
    scores = q @ keys[:, :, None].swapaxes(-1, -2) / np.float32(np.sqrt(D))
    future = np.triu(np.full((T, S), -np.inf, np.float32), k=S - T + 1)
    return softmax(scores + future)


def mix(weights: Array, values: Array) -> Array:
    """Return the means of the values (B, G, S, D) with weights (B, G, H / G, T, S): (B, T, H * D)."""
    B, G, per_group, T, _ = weights.shape
    mixed = weights @ values[:, :, None]  # (B, G, H / G, T, D)
    return mixed.reshape(B, G * per_group, T, -1).swapaxes(1, 2).reshape(B, T, -1)


def softmax(x: Array) -> Array:
    """Turn the scores of the last axis into weights that sum to one."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def losses(logits: Array, targets: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return -log softmax(logits)[target] for each row of (n, V), in nats: (n,); NaN if a logit is NaN or infinite."""
    with np.errstate(invalid="ignore", over="ignore"):  # infinite less infinite, or a difference that is
        peaks = logits.max(axis=1)
        sums = np.exp(logits - peaks[:, None]).sum(axis=1, dtype=np.float64)
        nats = np.log(sums) + peaks - logits[np.arange(len(targets)), targets]
    return np.where(np.isfinite(logits).all(axis=1), nats, np.nan)


def swiglu(gate: Array, up: Array) -> Array:
    """Return silu(gate) * up, where silu(x) = x / (1 + exp(-x)).

    Source: https://arxiv.org/abs/2002.05202
    """
    with np.errstate(over="ignore"):  # where exp(-x) is infinite, the result is its limit 0
        return gate / (1 + np.exp(-gate)) * up


def quantize_rows(x: Array, group_size: int) -> Quantized:
    """Round each group of each vector to int8 with its own scale.

    Args:
        x: (..., cols).
        group_size: neighbouring components that share a scale; if it does not divide cols, the last group is shorter.

    Returns:
        int8 values (..., cols) and float32 scales (..., groups). A group with a NaN or an infinity gets a
        scale that is not finite, so no result computed from it is finite.

    Source: llama2.c, `quantize` in runq.c.
    """
    groups = in_groups(x, group_size)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        largest = np.abs(groups).max(axis=-1)  # NaN if any component is
        largest = largest + np.float32(0) * largest  # and NaN if any is infinite
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
        # Groups so small that the inverse overflows are rounded to zero.
        rounded = np.rint(groups * np.where(np.isfinite(inverse), inverse, 0)[..., None])
        values = np.nan_to_num(rounded).astype(np.int8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return Quantized(values, (largest / np.float32(127)).astype(np.float32))


def in_groups(x: NDArray[Any], group_size: int) -> NDArray[Any]:
    """Split the last axis into groups, the last one padded with zeros: (..., groups, group_size)."""
    if missing := -x.shape[-1] % group_size:
        x = np.concatenate([x, np.zeros((*x.shape[:-1], missing), x.dtype)], axis=-1)
    return x.reshape(*x.shape[:-1], -1, group_size)


def matmul(x: Array, weight: Weight) -> Array:
    """Multiply vectors x (..., cols) by a weight (rows, cols): (..., rows)."""
    if isinstance(weight, Quantized | Packed):
        return int8_matmul(quantize_rows(x, weight.group_size), weight)
    return x @ dequantize(weight).T


def int8_matmul(x: Quantized, weight: Quantized | Packed) -> Array:
    """Multiply quantized vectors (..., cols) by a quantized weight (rows, cols): float32 (..., rows).

    Within a group the products of int8 are summed exactly; the two scales then turn the sum into float32. The sums are
    computed in float32, which numpy multiplies much faster than integers: it holds a group's sum exactly, since that is
    below 2^24 for groups up to 1024.
    """
    values, scales = unpack(weight) if isinstance(weight, Packed) else weight
    rows, groups, group = len(values), scales.shape[1], weight.group_size
    left = (
        in_groups(x.values.reshape(-1, x.values.shape[-1]), group).astype(np.float32).swapaxes(0, 1)
    )  # (groups, n, group)
    right = in_groups(values, group).astype(np.float32).transpose(1, 2, 0)  # (groups, group, rows)
    sums = left @ right  # (groups, n, rows)
    x_scales = x.scales.reshape(-1, groups).T[:, :, None]  # (groups, n, 1)
    scaled = sums * x_scales * scales.T[:, None, :]
    return scaled.sum(axis=0).reshape(*x.values.shape[:-1], rows)


def embed(weight: Weight, tokens: NDArray[np.integer[Any]]) -> Array:
    """Return the embeddings of tokens (...): (..., C)."""
    if isinstance(weight, Packed):
        rows = dequantize_rows(weight, tokens.reshape(-1))
    elif isinstance(weight, Quantized):
        rows = dequantize(Quantized(*(part[tokens.reshape(-1)] for part in weight)))
    else:
        rows = dequantize(weight[tokens.reshape(-1)])
    return rows.reshape(*tokens.shape, -1)


def hidden_states(
    weights: Mapping[str, Any],
    config: ModelConfig,
    tokens: NDArray[np.integer[Any]],
    cache: KVCache | None = None,
    seen: list[Array] | None = None,
) -> Array:
    """Return the last layer's normalised output for each token, which the output matrix turns into logits: (B, T, C).

    Args:
        weights: the checkpoint's tensors by name, without ".weight".
        config: the model's shape.
        tokens: ids (B, T).
        cache: keys and values of earlier positions; the new ones are appended. With a cache B must be 1.
        seen: the attention weights of each layer, (B, G, H / G, T, S), are appended to it.
    """
    B, T = tokens.shape
    D = config.head_dim
    start = 0 if cache is None else cache.length
    end = start + T
    angles = np.outer(np.arange(start, end), rope_frequencies(config))  # (T, D / 2)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def heads(x: Array) -> Array:
        """Split (B, T, n * D) into heads: (B, n, T, D)."""
        return x.reshape(B, T, -1, D).swapaxes(1, 2)

    if cache is not None:
        cache.reserve(end)
    x = embed(weights["tok_embeddings"], tokens)  # (B, T, C)
    for layer in range(config.n_layers):
        w = {name: weights[f"layers.{layer}.{name}"] for name in LAYER_TENSORS}

        normed = rmsnorm(x, w["attention_norm"], config.norm_eps)
        q = rope(heads(matmul(normed, w["attention.wq"])), cos, sin)  # (B, H, T, D)
        k = rope(heads(matmul(normed, w["attention.wk"])), cos, sin)  # (B, G, T, D)
        v = heads(matmul(normed, w["attention.wv"]))  # (B, G, T, D)
        if cache is not None:
            cache.write(layer, start, k[0], v[0])
            k, v = (x[None] for x in cache.read(layer, 0, end))  # (1, G, S, D)
        attended = attention_weights(q, k)
        if seen is not None:
            seen.append(attended)
        x = x + matmul(mix(attended, v), w["attention.wo"])

        normed = rmsnorm(x, w["ffn_norm"], config.norm_eps)
        hidden = swiglu(matmul(normed, w["feed_forward.w1"]), matmul(normed, w["feed_forward.w3"]))  # (B, T, F)
        x = x + matmul(hidden, w["feed_forward.w2"])
    if cache is not None:
        cache.length = end
    return rmsnorm(x, weights["norm"], config.norm_eps)


def forward(weights: Mapping[str, Any], config: ModelConfig, tokens: NDArray[np.integer[Any]]) -> Array:
    """Return the logits after each token, given that token and those before it.

    Args:
        weights: the checkpoint's tensors by name, without ".weight".
        config: the model's shape.
        tokens: ids (B, T).

    Returns:
        float32 (B, T, V).
    """
    return matmul(hidden_states(weights, config, tokens), output_weight(weights))


def output_weight(weights: Mapping[str, Any]) -> Weight:
    """Return the matrix that makes the logits: a tied model uses its embeddings."""
    return weights.get("output", weights["tok_embeddings"])


class NumpyTransformer:
    """A model file with a KV cache, in numpy alone: slow, but without a compiler.

    Args:
        file: the model.
        kv: the kind of its KV caches, a name of KINDS; see `kv_kinds.kind_for`.
    """

    def __init__(self, file: ModelFile, kv: str | None = None) -> None:
        self.config = file.config
        self.kv = kind_for(file.tensors["tok_embeddings"], kv)
        self.choose, self.losses = choose_token, losses
        self.tensors: Mapping[str, Any] = file.tensors

    def new_cache(self, capacity: int = 0) -> KVCache:
        """Return an empty KV cache with memory for `capacity` positions; it grows when they are used up."""
        return KVCache(self.config, capacity, self.kv)

    def decode(self, cache: KVCache, token: int) -> Array:
        """Append one token to the cache; return the logits after it: float32 (V,)."""
        return self.prefill(cache, [token])

    def decode_batch(self, caches: Sequence[KVCache], tokens: Sequence[int]) -> Array:
        """Append one token to each of B caches; return the logits after each: float32 (B, V)."""
        return np.stack([self.decode(cache, token) for cache, token in zip(caches, tokens, strict=True)])

    def extend_batch(self, caches: Sequence[KVCache], pieces: Sequence[Tokens]) -> list[Array]:
        """Append some tokens to each of B caches; return the logits after the last of each: float32 (V,)."""
        return [self.prefill(cache, piece) for cache, piece in zip(caches, pieces, strict=True)]

    def prefill(self, cache: KVCache, tokens: Tokens) -> Array:
        """Append tokens (T,), at least one, to the cache; return the logits after the last one: float32 (V,).

        Raises:
            UsageError: if there are no tokens, one is not in the vocabulary, or they are more than the context holds.
        """
        return matmul(self._hidden_states(cache, tokens)[-1], output_weight(self.tensors))

    def logits(self, tokens: Tokens) -> Array:
        """Return the logits after each of the tokens (T,), computed from an empty cache: float32 (T, V).

        Raises:
            UsageError: as prefill.
        """
        ids = token_ids(tokens, self.config.vocab_size)
        return matmul(self._hidden_states(self.new_cache(len(ids)), ids), output_weight(self.tensors))

    def extend(self, cache: KVCache, tokens: Tokens) -> Array:
        """Append tokens (T,), at least one; return the logits after each, those that `decode` gives: float32 (T, V).

        numpy's products of many vectors round otherwise than those of one, so the tokens are decoded one by one.

        Raises:
            UsageError: as prefill.
        """
        ids = token_ids(tokens, self.config.vocab_size)
        cache.reserve(cache.length + len(ids))
        return np.stack([self.decode(cache, token) for token in ids.tolist()])

    def _hidden_states(self, cache: KVCache, tokens: Tokens) -> Array:
        """Append tokens to the cache, a chunk at a time; return their hidden states (T, C)."""
        ids = token_ids(tokens, self.config.vocab_size)
        cache.reserve(cache.length + len(ids))
        chunks = [ids[start : start + PREFILL_CHUNK] for start in range(0, len(ids), PREFILL_CHUNK)]
        return np.concatenate([hidden_states(self.tensors, self.config, chunk[None], cache)[0] for chunk in chunks])
