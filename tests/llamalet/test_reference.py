import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import SMALL_MODELS, random_tensors

from llamalet import model_file, reference
from llamalet.errors import UsageError
from llamalet.model_file.quantize import Packed, dequantize, pack_q4, pack_q8, quantize, to_bfloat16
from llamalet.reference import KVCache, NumpyTransformer

# Two orders of summing the same float32 products differ by a few roundings of the largest partial sum.
SUM_ROUNDINGS = 1e-5


def file_in_memory(config, version=1, seed=0):
    """A model in memory, as model_file.read would return it."""
    tensors = random_tensors(config, seed)
    if version == 2:
        tensors = {name: quantize(t, 32) if t.ndim == 2 and t.shape[1] % 32 == 0 else t for name, t in tensors.items()}
    kind = ("q8", 32) if version == 2 else ("f32", None)
    return model_file.ModelFile(None, model_file.Header(version, config, *kind), tensors)


def test_rmsnorm_gives_unit_mean_square():
    x = np.random.default_rng(0).normal(3, 5, (4, 64)).astype(np.float32)
    normed = reference.rmsnorm(x, np.ones(64, np.float32), 0.0)
    np.testing.assert_allclose(np.mean(normed**2, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(normed * 2, reference.rmsnorm(x, np.full(64, 2, np.float32), 0.0), rtol=1e-6)


def test_rope_makes_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 8)).astype(np.float32)
    angles = np.outer(np.arange(20), 100.0 ** (-np.arange(0, 8, 2) / 8))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    turned_q, turned_k = (reference.rope(np.tile(x, (20, 1)), cos, sin) for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(-10, 10):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.ptp(scores[0]) > 0.1


def test_attention_is_the_weighted_mean_of_what_came_before():
    rng = np.random.default_rng(0)
    B, H, G, T, S, D = 2, 4, 2, 3, 7, 6
    q = rng.normal(size=(B, H, T, D)).astype(np.float32)
    keys, values = rng.normal(size=(2, B, G, S, D)).astype(np.float32)
    found = reference.attention(q, keys, values)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = S - T + t + 1
                scores = keys[b, h // 2, :seen] @ q[b, h, t] / np.sqrt(D)
                weights = np.exp(scores) / np.exp(scores).sum()
                expected = weights @ values[b, h // 2, :seen]
                np.testing.assert_allclose(found[b, t, h * D : (h + 1) * D], expected, atol=1e-5)


def test_swiglu_has_its_limits_and_no_warnings():
    gate = np.array([-1e4, -1.0, 0.0, 1.0, 1e4], np.float32)
    expected = [0, -1 / (1 + np.e), 0, np.e / (1 + np.e), 1e4]
    np.testing.assert_allclose(reference.swiglu(gate, np.ones(5, np.float32)), expected, rtol=1e-6)


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([4, 16, 32, 64]), st.integers(0, 2**32 - 1))
def test_int8_matmul_sums_exactly_within_a_group(n_rows, n_groups, group, seed):
    rng = np.random.default_rng(seed)
    weight = quantize(rng.normal(size=(n_rows, n_groups * group)).astype(np.float32), group)
    x = reference.quantize_rows(rng.normal(size=(3, n_groups * group)).astype(np.float32), group)
    shape = (-1, n_groups, group)
    sums = np.einsum("tgi,rgi->trg", x.values.reshape(shape).astype(int), weight.values.reshape(shape).astype(int))
    expected = np.einsum("trg,tg,rg->tr", sums, x.scales.astype(float), weight.scales.astype(float))
    bound = SUM_ROUNDINGS * np.abs(sums * x.scales[:, None] * weight.scales).sum(-1).max()
    np.testing.assert_allclose(reference.int8_matmul(x, weight), expected, atol=bound)


@pytest.mark.parametrize("packer", [pack_q8, pack_q4])
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 150)), seed=st.integers(0, 2**32 - 1))
def test_packed_matmul_is_the_product_of_what_was_rounded(packer, size, seed):
    """Rows and columns of every number, whose last group may be short."""
    rng = np.random.default_rng(seed)
    weight: Packed = packer(rng.normal(size=size).astype(np.float32))
    x = rng.normal(size=(3, size[1])).astype(np.float32)
    rounded = reference.quantize_rows(x, weight.group_size)
    assert rounded.scales.shape == (3, -(-size[1] // weight.group_size))
    steps = np.repeat(rounded.scales, weight.group_size, axis=1)[:, : size[1]].astype(float)
    assert (np.abs(rounded.values * steps - x) <= 0.5001 * steps).all()
    left, right = rounded.values * steps, dequantize(weight).astype(float)
    bound = SUM_ROUNDINGS * (np.abs(left) @ np.abs(right).T).max()
    np.testing.assert_allclose(reference.matmul(x, weight), left @ right.T, atol=bound)


@pytest.mark.parametrize("form", [to_bfloat16, pack_q8, pack_q4, lambda w: quantize(w, 16)])
def test_embed_takes_the_rows_of_every_form(form):
    weight = form(np.random.default_rng(0).normal(size=(37, 48)).astype(np.float32))
    tokens = np.array([[36, 0, 5], [5, 20, 16]])
    np.testing.assert_array_equal(reference.embed(weight, tokens), dequantize(weight)[tokens])


def test_bfloat16_weights_multiply_float32_activations():
    rng = np.random.default_rng(0)
    weight, x = to_bfloat16(rng.normal(size=(7, 20)).astype(np.float32)), rng.normal(size=(3, 20)).astype(np.float32)
    np.testing.assert_array_equal(reference.matmul(x, weight), x @ dequantize(weight).T)


def test_a_batch_is_decoded_as_each_alone(small_config):
    model = NumpyTransformer(file_in_memory(small_config))
    prompts = [[1], [2, 3, 4], [5, 6]]
    alone, together = ([model.new_cache() for _ in prompts] for _ in range(2))
    for caches in (alone, together):
        for cache, prompt in zip(caches, prompts, strict=True):
            model.prefill(cache, prompt)
    expected = [model.decode(cache, token) for cache, token in zip(alone, (7, 8, 9), strict=True)]
    np.testing.assert_array_equal(model.decode_batch(together, (7, 8, 9)), expected)
    assert [cache.length for cache in together] == [2, 4, 3]


def test_quantize_rows_rounds_to_the_nearest_step():
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    x[1, :32] = 0
    quantized = reference.quantize_rows(x, 32)
    assert quantized.values.dtype == np.int8 and np.abs(quantized.values.astype(int)).max() == 127
    steps = np.repeat(quantized.scales, 32, axis=1)
    assert np.all(np.abs(dequantize(quantized) - x) <= 0.5001 * steps)
    assert quantized.scales[1, 0] == 0 and not quantized.values[1, :32].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_rows_lets_no_bad_value_vanish(bad):
    x = np.ones((1, 64), np.float32)
    x[0, 40] = bad
    scales = reference.quantize_rows(x, 32).scales
    assert np.isfinite(scales[0, 0]) and not np.isfinite(scales[0, 1])


def test_cached_equals_uncached_for_every_prefix_and_split(small_config):
    model = NumpyTransformer(file_in_memory(small_config))
    tokens = np.random.default_rng(1).integers(0, small_config.vocab_size, 20)
    expected = reference.forward(file_in_memory(small_config).tensors, small_config, tokens[None])[0]
    bound = SUM_ROUNDINGS * np.abs(expected).max()
    np.testing.assert_allclose(model.logits(tokens), expected, atol=bound)
    cache = model.new_cache()
    for position, token in enumerate(tokens):
        np.testing.assert_allclose(model.decode(cache, token), expected[position], atol=bound)
    cache.truncate(5)
    np.testing.assert_allclose(model.prefill(cache, tokens[5:12]), expected[11], atol=bound)
    np.testing.assert_allclose(model.prefill(cache, tokens[12:]), expected[-1], atol=bound)


def test_forward_takes_batches(small_config):
    weights = file_in_memory(small_config).tensors
    tokens = np.random.default_rng(1).integers(0, small_config.vocab_size, (3, 9))
    together = reference.forward(weights, small_config, tokens)
    for row, logits in zip(tokens, together, strict=True):
        alone = reference.forward(weights, small_config, row[None])[0]
        np.testing.assert_allclose(logits, alone, atol=SUM_ROUNDINGS * np.abs(alone).max())


def test_long_prompts_are_taken_in_chunks(monkeypatch):
    config = SMALL_MODELS["gqa-tied"]
    model = NumpyTransformer(file_in_memory(config))
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 30)
    expected = model.logits(tokens)
    monkeypatch.setattr(reference, "PREFILL_CHUNK", 7)
    np.testing.assert_allclose(model.logits(tokens), expected, atol=SUM_ROUNDINGS * np.abs(expected).max())


def test_tokens_that_extend_a_cache_get_the_logits_of_decoding():
    """Bit for bit; and a broken token leaves those before it as they are."""
    config = SMALL_MODELS["gqa-untied"]
    file = file_in_memory(config)
    file.tensors["tok_embeddings"][77] = np.nan
    model = NumpyTransformer(file)
    one_by_one, together = model.new_cache(), model.new_cache()
    expected = [model.decode(one_by_one, token) for token in (1, 5, 9, 77)]
    found = model.extend(together, [1, 5, 9, 77])
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found[:3]).all() and not np.isfinite(found[3]).any()


def test_cache_grows_with_use_and_keeps_what_it_holds():
    config = dataclasses.replace(SMALL_MODELS["gqa-tied"], max_seq_len=100)
    cache = KVCache(config)
    assert cache.capacity == 0 and cache.keys.nbytes == 0
    cache.reserve(3)
    assert cache.capacity == 64
    cache.keys[:], cache.values[:] = 1, 2
    cache.length = 3
    cache.reserve(config.max_seq_len)
    assert cache.capacity == 128
    for layer in range(config.n_layers):
        keys, values = cache.read(layer, 0, 3)
        assert (keys == 1).all() and (values == 2).all()


def test_what_a_caller_can_get_wrong_is_named():
    config = SMALL_MODELS["gqa-tied"]
    model = NumpyTransformer(file_in_memory(config))
    cache = model.new_cache()
    with pytest.raises(UsageError, match="token 300"):
        model.prefill(cache, [1, 300])
    with pytest.raises(UsageError, match="token -1"):
        model.decode(cache, -1)
    with pytest.raises(UsageError, match="at least one"):
        model.prefill(cache, [])
    with pytest.raises(UsageError, match="33 positions.*context is 32"):
        model.logits([1] * 33)
    with pytest.raises(UsageError, match="truncate"):
        cache.truncate(1)
    assert cache.length == 0
