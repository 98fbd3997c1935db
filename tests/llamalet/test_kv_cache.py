import copy
import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SMALL_MODELS, random_tensors

from llamalet.aligned import address_of
from llamalet.config import LinearScaling, Llama3Scaling, ModelConfig, RopeDivisors, rope_frequencies
from llamalet.errors import OutOfMemoryError, UsageError
from llamalet.kv_cache import ROLL_ERROR, KVCache, free_memory
from llamalet.kv_kinds import KINDS, STEP, cache_bytes
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


def filled(config: ModelConfig, n: int, kind: str = "f32") -> tuple[KVCache, np.ndarray]:
    """A cache of n positions whose values are their numbers, and its keys before RoPE: float64 (L, G, n, D / 2)."""
    rng = np.random.default_rng(0)
    cache = KVCache(config, kind=kind)
    cache.reserve(n)
    shape = (config.n_layers, config.n_kv_heads, n, config.head_dim // 2)
    raw = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    keys = turned(config, raw, np.arange(n)).astype(np.complex64).view(np.float32)
    for layer, rows in enumerate(keys):
        cache.write(layer, 0, rows, numbers(config, np.arange(n)))
    cache.length = n
    return cache, raw


def numbers(config: ModelConfig, positions: np.ndarray) -> np.ndarray:
    """Values of positions: their numbers, in all components (G, n, D)."""
    shape = (config.n_kv_heads, len(positions), config.head_dim)
    return np.broadcast_to(positions[:, None].astype(np.float32), shape)


def turned(config: ModelConfig, raw: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys at their positions, exact to float64."""
    return raw * np.exp(1j * np.outer(positions, rope_frequencies(config)))


def pairs(cache: KVCache) -> np.ndarray:
    """The keys of all layers as complex numbers (L, G, n, D / 2)."""
    return keys(cache).view(np.complex64).astype(np.complex128)


def keys(cache: KVCache) -> np.ndarray:
    return np.stack([np.ascontiguousarray(cache.read(layer, 0, cache.length)[0]) for layer in range(len(cache.keys))])


def values(cache: KVCache) -> np.ndarray:
    return np.stack([cache.read(layer, 0, cache.length)[1] for layer in range(len(cache.keys))])


def error_of(kind: str, pairs: np.ndarray, rotation: float) -> np.ndarray:
    """The largest error of pairs (..., D / 2) that were kept, rotated with this error, and kept again."""
    error, sizes = 2**0.5 * KINDS[kind].error, np.abs(pairs)
    if KINDS[kind].scaled:  # the largest component of a key is at most its largest pair
        sizes = np.broadcast_to(sizes.max(axis=-1, keepdims=True), sizes.shape)
    return (2.02 * error + rotation + 2.0**-24) * sizes


@given(st.sampled_from(list(KINDS)), st.integers(1, 90), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_what_is_written_is_read(kind, first, n, seed):
    """Within the kind's error, wherever it begins, without touching its neighbours."""
    rng = np.random.default_rng(seed)
    cache = KVCache(SCALED, 140, kind)
    shape = (SCALED.n_kv_heads, 140, SCALED.head_dim)
    before, after = (rng.normal(size=(2, *shape)).astype(np.float32) for _ in range(2))
    cache.write(1, 0, *before)
    cache.length = 140
    untouched = [keys(cache)[[0, 2]], values(cache)[[0, 2]]]
    old = cache.read(1, 0, 140)
    part = slice(first, min(first + n, 140))
    cache.write(1, first, *(x[:, part] for x in after))
    for found, was, new in zip(cache.read(1, 0, 140), old, after, strict=True):
        scale = np.abs(new).max(axis=2, keepdims=True) if KINDS[kind].scaled else np.abs(new)
        assert (np.abs(found - new) <= KINDS[kind].error * scale)[:, part].all()
        np.testing.assert_array_equal(np.delete(found, part, axis=1), np.delete(was, part, axis=1))
    for found, was in zip((keys(cache)[[0, 2]], values(cache)[[0, 2]]), untouched, strict=True):
        np.testing.assert_array_equal(found, was)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_keeps_what_is_not_finite_visible(bad):
    cache, x = KVCache(CONFIG, 10, "q8"), np.ones((CONFIG.n_kv_heads, 3, CONFIG.head_dim), np.float32)
    x[0, 1, 2] = bad
    cache.write(0, 2, x, x)
    for found in cache.read(0, 2, 5):
        assert not np.isfinite(found[0, 1]).any() and np.isfinite(found[0, [0, 2]]).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*SMALL_MODELS.values(), SCALED, LINEAR, DIVIDED]), st.sampled_from(list(KINDS)), st.data())
def test_rolled_keys_are_those_of_their_new_positions(config, kind, data):
    n = data.draw(st.integers(0, min(config.max_seq_len, 300)))
    keep = data.draw(st.integers(0, n))
    drop = data.draw(st.integers(0, n - keep))
    cache, raw = filled(config, n, kind)
    cache.roll(keep, drop)
    survivors = np.r_[0:keep, keep + drop : n]
    assert cache.length == len(survivors)
    exact = turned(config, raw[:, :, survivors], np.arange(len(survivors)))
    # The keys had been rounded to float32 once before they were rolled, and kept in this kind once or twice.
    assert (np.abs(pairs(cache) - exact) <= error_of(kind, exact, ROLL_ERROR)).all()
    for found in values(cache):
        np.testing.assert_allclose(found, numbers(config, survivors), rtol=1.01 * KINDS[kind].error)


def test_the_kept_keys_are_not_touched():
    cache, _ = filled(CONFIG, 32)
    before = keys(cache)
    cache.roll(5, 13)
    assert (keys(cache)[:, :, :5] == before[:, :, :5]).all()


def test_what_many_rolls_cost_is_the_sum_of_what_each_may_cost():
    n, left = 700, 8
    cache, raw = filled(SCALED, n)
    for rolls in range(1, n - left + 1):
        cache.roll(0, 1)
        if cache.length <= left or rolls % 100 == 0:
            exact = turned(SCALED, raw[:, :, rolls:], np.arange(n - rolls))
            assert (np.abs(pairs(cache) - exact) <= (rolls * ROLL_ERROR + 2.0**-24) * np.abs(exact)).all()
    assert (values(cache) == np.arange(n - left, n)[:, None]).all()


def test_a_cache_that_rolls_stays_where_it_is():
    cache, _ = filled(CONFIG, 32)
    arrays = cache.keys, cache.values
    for _ in range(1000):
        cache.roll(4, 14)
        cache.reserve(cache.length + 14)
        cache.length += 14
        assert cache.length == 32 and cache.capacity == STEP
    assert cache.keys is arrays[0] and cache.values is arrays[1]


def test_rolling_is_recomputing_where_nothing_but_the_place_has_changed():
    """In the first layer keys depend on their own token and position only: recompute them without the dropped ones."""
    weights = random_tensors(CONFIG)
    tokens = np.random.default_rng(1).integers(0, 300, 32)
    cache, anew = KVCache(CONFIG), KVCache(CONFIG)
    hidden_states(weights, CONFIG, tokens[None], cache)
    cache.roll(4, 14)
    hidden_states(weights, CONFIG, np.r_[tokens[:4], tokens[18:]][None], anew)
    assert cache.length == anew.length == 18
    np.testing.assert_allclose(keys(cache)[0], keys(anew)[0], atol=3e-6)
    # numpy's products may round otherwise for another number of tokens.
    np.testing.assert_allclose(values(cache)[0], values(anew)[0], atol=3e-6)


@pytest.mark.parametrize(("keep", "drop"), [(-1, 4), (4, -1), (10, 11), (21, 0), (0, 21)])
def test_a_roll_of_positions_that_are_not_there_is_refused(keep, drop):
    cache, _ = filled(CONFIG, 20)
    with pytest.raises(UsageError, match=f"cannot keep {keep} and drop {drop} of a cache of 20 positions"):
        cache.roll(keep, drop)
    assert cache.length == 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_its_own_way(kind):
    cache, _ = filled(SCALED, 100, kind)
    before, numbers_before = keys(cache), values(cache)
    twin = cache.copy()
    assert (twin.length, twin.capacity) == (100, 2 * STEP)
    np.testing.assert_array_equal(keys(twin), before)
    twin.roll(0, 3)
    twin.reserve(250)
    for layer in range(3):
        twin.write(layer, 20, *np.full((2, SCALED.n_kv_heads, 30, SCALED.head_dim), 7, np.float32))
    np.testing.assert_array_equal(keys(cache), before)
    np.testing.assert_array_equal(values(cache), numbers_before)


def test_the_cache_ends_at_the_context():
    cache = KVCache(CONFIG)
    with pytest.raises(UsageError, match="33 positions: the model's context is 32"):
        cache.reserve(33)
    cache.reserve(32)
    assert cache.capacity == STEP


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_does_not_fit_into_memory_is_refused(monkeypatch, kind):
    cache, _ = filled(SCALED, 100, kind)
    arrays = cache.keys, cache.values, cache.key_scales, cache.value_scales
    assert cache_bytes(SCALED, cache.capacity, kind) == sum(array.nbytes for array in arrays)
    monkeypatch.setattr("llamalet.kv_cache.free_memory", lambda: cache_bytes(SCALED, 1000, kind) - 1)
    with pytest.raises(
        OutOfMemoryError, match=r"a KV cache of 1000 positions takes \d MB, and \d MB of memory are free"
    ):
        cache.reserve(1000)
    assert cache.capacity == 2 * STEP
    cache.reserve(900)


def test_free_memory_is_found(monkeypatch):
    measured = free_memory()
    assert 1 << 20 < measured < 1 << 50
    monkeypatch.setattr("llamalet.kv_cache.MEMINFO", Path("missing"))
    assert measured <= free_memory() < 1 << 50
    monkeypatch.delattr("os.sysconf")
    assert free_memory() == 1 << 62


@pytest.mark.parametrize("kind", KINDS)
def test_every_copy_knows_where_its_arrays_are(kind):
    cache, _ = filled(CONFIG, 20, kind)
    for made in (cache, cache.copy(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        arrays = made.keys, made.values, made.key_scales, made.value_scales
        assert made.addresses == tuple(map(address_of, arrays))
    assert copy.deepcopy(cache).addresses != cache.addresses
