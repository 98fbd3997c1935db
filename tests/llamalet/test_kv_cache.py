import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SMALL_MODELS, random_tensors

from llamalet.config import LinearScaling, Llama3Scaling, ModelConfig, RopeDivisors, rope_frequencies
from llamalet.errors import UsageError
from llamalet.kv_cache import ROLL_ERROR, KVCache, cache_bytes, free_memory
from llamalet.reference import hidden_states

CONFIG = SMALL_MODELS["gqa-tied"]  # context 32
SCALED = ModelConfig.create(
    dim=64,
    n_layers=3,
    n_heads=4,
    hidden_dim=64,
    vocab_size=300,
    max_seq_len=4096,
    rope_theta=5e5,
    rope_scaling=Llama3Scaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_seq_len=512),
)

LINEAR = dataclasses.replace(SCALED, rope_scaling=LinearScaling(factor=4))
DIVIDED = dataclasses.replace(SCALED, rope_scaling=RopeDivisors(divisors=(1, 2, 0.5, 9, 1, 70, 3, 4)))


def filled(config: ModelConfig, n: int, seed: int = 0) -> tuple[KVCache, np.ndarray]:
    """A cache of n positions whose values are their numbers, and its keys before RoPE: float64 (L, G, n, D / 2)."""
    rng = np.random.default_rng(seed)
    cache = KVCache(config)
    cache.reserve(n)
    cache.length = n
    shape = (config.n_layers, config.n_kv_heads, n, config.head_dim // 2)
    raw = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    cache.keys.view(np.complex64)[:, :, :n] = turned(config, raw, np.arange(n))
    cache.values[:, :, :n] = np.arange(n)[:, None]
    return cache, raw


def turned(config: ModelConfig, raw: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys at their positions, exact to float64."""
    return raw * np.exp(1j * np.outer(positions, rope_frequencies(config)))


def pairs(cache: KVCache) -> np.ndarray:
    return cache.keys.view(np.complex64)[:, :, : cache.length].astype(np.complex128)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*SMALL_MODELS.values(), SCALED, LINEAR, DIVIDED]), st.data())
def test_rolled_keys_are_those_of_their_new_positions(config, data):
    n = data.draw(st.integers(0, min(config.max_seq_len, 300)))
    keep = data.draw(st.integers(0, n))
    drop = data.draw(st.integers(0, n - keep))
    cache, raw = filled(config, n)
    cache.roll(keep, drop)
    survivors = np.r_[0:keep, keep + drop : n]
    assert cache.length == len(survivors)
    exact = turned(config, raw[:, :, survivors], np.arange(len(survivors)))
    # The keys had been rounded to float32 once before they were rolled.
    assert (np.abs(pairs(cache) - exact) <= (ROLL_ERROR + 2.0**-24) * np.abs(exact)).all()
    assert (cache.values[:, :, : cache.length] == survivors[:, None]).all()


def test_the_kept_keys_are_not_touched():
    cache, _ = filled(CONFIG, 32)
    before = cache.keys.copy()
    cache.roll(5, 13)
    assert (cache.keys[:, :, :5] == before[:, :, :5]).all()


def test_what_many_rolls_cost_is_the_sum_of_what_each_may_cost():
    n, left = 700, 8
    cache, raw = filled(SCALED, n)
    for rolls in range(1, n - left + 1):
        cache.roll(0, 1)
        if cache.length <= left or rolls % 100 == 0:
            exact = turned(SCALED, raw[:, :, rolls:], np.arange(n - rolls))
            assert (np.abs(pairs(cache) - exact) <= (rolls * ROLL_ERROR + 2.0**-24) * np.abs(exact)).all()
    assert (cache.values[:, :, :left] == np.arange(n - left, n)[:, None]).all()


def test_a_cache_that_rolls_stays_where_it_is():
    cache, _ = filled(CONFIG, 32)
    keys, values = cache.keys, cache.values
    for _ in range(1000):
        cache.roll(4, 14)
        cache.reserve(cache.length + 14)
        cache.length += 14
        assert cache.length == cache.capacity == 32
    assert cache.keys is keys and cache.values is values


def test_rolling_is_recomputing_where_nothing_but_the_place_has_changed():
    """In the first layer keys depend on their own token and position only: recompute them without the dropped ones."""
    weights = random_tensors(CONFIG)
    tokens = np.random.default_rng(1).integers(0, 300, 32)
    cache, anew = KVCache(CONFIG), KVCache(CONFIG)
    hidden_states(weights, CONFIG, tokens[None], cache)
    cache.roll(4, 14)
    hidden_states(weights, CONFIG, np.r_[tokens[:4], tokens[18:]][None], anew)
    assert cache.length == anew.length == 18
    np.testing.assert_allclose(cache.keys[0, :, :18], anew.keys[0, :, :18], atol=3e-6)
    np.testing.assert_array_equal(cache.values[0, :, :18], anew.values[0, :, :18])


@pytest.mark.parametrize(("keep", "drop"), [(-1, 4), (4, -1), (10, 11), (21, 0), (0, 21)])
def test_a_roll_of_positions_that_are_not_there_is_refused(keep, drop):
    cache, _ = filled(CONFIG, 20)
    with pytest.raises(UsageError, match=f"cannot keep {keep} and drop {drop} of a cache of 20 positions"):
        cache.roll(keep, drop)
    assert cache.length == 20


def test_a_copy_goes_its_own_way():
    cache, _ = filled(CONFIG, 20)
    twin = cache.copy()
    assert twin.length == 20 and twin.capacity == 20
    before = pairs(cache)
    np.testing.assert_array_equal(pairs(twin), before)
    twin.roll(0, 3)
    twin.reserve(25)
    twin.values[:] = 7
    assert cache.length == 20 and (pairs(cache) == before).all() and not (cache.values[:, :, :20] == 7).all()


def test_the_cache_ends_at_the_context():
    cache = KVCache(CONFIG)
    with pytest.raises(UsageError, match="33 positions: the model's context is 32"):
        cache.reserve(33)
    cache.reserve(32)
    assert cache.capacity == 32


def test_a_cache_that_does_not_fit_into_memory_is_refused(monkeypatch):
    cache, _ = filled(SCALED, 100)
    assert cache_bytes(SCALED, cache.capacity) == cache.keys.nbytes + cache.values.nbytes
    monkeypatch.setattr("llamalet.kv_cache.free_memory", lambda: cache_bytes(SCALED, 1000) - 1)
    with pytest.raises(UsageError, match=r"a KV cache of 1000 positions takes 2 MB, and 2 MB of memory are free"):
        cache.reserve(1000)
    assert cache.capacity == 100
    cache.reserve(999)


def test_free_memory_is_found(monkeypatch):
    measured = free_memory()
    assert 1 << 20 < measured < 1 << 50
    monkeypatch.setattr("llamalet.kv_cache.MEMINFO", Path("missing"))
    assert measured <= free_memory() < 1 << 50
    monkeypatch.delattr("os.sysconf")
    assert free_memory() == 1 << 62
