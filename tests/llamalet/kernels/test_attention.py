import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalet import reference
from llamalet.config import ModelConfig
from llamalet.kernels import attention, kv_slots
from llamalet.kernels.jit import kernel
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import KINDS

FULL = 700  # positions: two whole pieces and a part

# Two orders of summing float32 products differ by a few roundings of the sum of their absolute values.
SUM_ROUNDINGS = EXP_ROUNDINGS = 1e-6

seeds = st.integers(0, 2**32 - 1)


def floats(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@kernel
def work(q_heads, k, v, slots, one_sequence, layer, n_heads, space, n_blocks, out):
    """All blocks of a pass on one thread, in an order that no thread would take."""
    count, head_dim = len(slots), q_heads.shape[1]
    if one_sequence and count > 1:
        n_kv_heads = k.shape[1] // head_dim
        kv_slots.keep_prompt(slots, count, layer * n_kv_heads, k, v, 0, n_kv_heads, head_dim)
    for block in range(n_blocks - 1, -1, -1):
        attention.attend(q_heads, k, v, slots, count, one_sequence, layer, n_heads, space, block, n_blocks, 0)
    attention.finish(slots, count, n_heads, head_dim, space, out, 0, count)


def attend(caches, layer, q, k, v, n_blocks=3):
    """Let queries (T, H, D) of one cache, or of one position each of several, attend; return (T, H * D)."""
    (T, H, D), longest = q.shape, max(cache.capacity for cache in caches)
    slots = np.zeros(T, kv_slots.CACHE_SLOT)
    slots[:] = [kv_slots.slot_of(cache) for cache in caches]
    if len(caches) == 1:
        slots["position"] += np.arange(T)
    space, out = attention.new_context_space(T, H, D, longest, 1), np.full((T, H * D), 7, np.float32)
    for array in (space.mixed, space.sums, space.keys, space.values, space.scores, space.tile):
        array[:] = np.nan  # nothing may be read that was not written
    rows = [x.reshape(T, -1) for x in (k, v)]
    work(q.reshape(-1, D), *rows, slots, len(caches) == 1, layer, H, space, n_blocks, out)
    return out


def config_of(n_kv_heads, group, head_dim):
    return ModelConfig.create(
        dim=16, n_layers=2, n_heads=n_kv_heads * group, n_kv_heads=n_kv_heads, hidden_dim=8, vocab_size=9,
        max_seq_len=FULL, head_dim=2 * head_dim,
    )  # fmt: skip


class Sequence:
    """Queries, keys and values of FULL positions in layer 1 of a cache."""

    def __init__(self, config, kind, seed, spread=1.0):
        H, G, D = config.n_heads, config.n_kv_heads, config.head_dim
        self.config, self.kind = config, kind
        self.q, self.k, self.v = (
            spread * floats(seed, FULL, H, D),
            floats(seed + 1, FULL, G, D),
            floats(seed + 2, FULL, G, D),
        )

    def cache(self, n):
        """A cache with the first n positions, and NaN wherever nothing has been written."""
        cache = KVCache(self.config, FULL, self.kind)
        if self.kind != "q8":
            for array in (cache.keys, cache.values):
                array.view(f"u{array.itemsize}")[:] = -1 % (1 << 8 * array.itemsize)
        cache.key_scales[:] = cache.value_scales[:] = np.nan
        for layer in range(2):
            cache.write(layer, 0, self.k[:n].swapaxes(0, 1), self.v[:n].swapaxes(0, 1))
        cache.length = n
        return cache

    def read(self, first, last, n_blocks=3, cache=None):
        """Append positions first .. last - 1 in one pass; return what they attend to."""
        part = slice(first, last)
        return attend([cache or self.cache(first)], 1, self.q[part], self.k[part], self.v[part], n_blocks)

    def expected(self, first, last):
        keys, values = self.cache(last).read(1, 0, last)
        q = self.q[None, first:last].swapaxes(1, 2)
        return reference.attention(q, keys[None], values[None])[0]


shapes = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 9]), st.integers(1, 40))


@pytest.mark.simd_path
@given(shapes, st.sampled_from(list(KINDS)), st.integers(0, FULL - 1), st.integers(1, 70), st.floats(0.1, 20), seeds)
@settings(deadline=None, max_examples=80)
def test_equals_the_reference(shape, kind, first, n, spread, seed):
    sequence, last = Sequence(config_of(*shape), kind, seed, spread), min(first + n, FULL)
    found, expected = sequence.read(first, last), sequence.expected(first, last)
    reach = np.abs(sequence.q[first:last]).max() * np.abs(sequence.k[:last]).sum(axis=2).max()
    bound = (EXP_ROUNDINGS + SUM_ROUNDINGS * reach) * np.abs(sequence.v[:last]).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


@given(shapes, st.sampled_from(list(KINDS)), st.data(), seeds)
@settings(deadline=None, max_examples=80)
def test_a_position_has_the_same_bits_however_it_is_read(shape, kind, data, seed):
    """Decoded; in a prompt cut anywhere; in a batch; with any number of blocks."""
    sequence = Sequence(config_of(*shape), kind, seed)
    position = data.draw(st.integers(0, FULL - 1))
    alone = sequence.read(position, position + 1, n_blocks=1)
    first = data.draw(st.integers(max(0, position - 60), position))
    last = data.draw(st.integers(position + 1, min(FULL, position + 30)))
    np.testing.assert_array_equal(sequence.read(first, last, n_blocks=7)[position - first], alone[0])
    others = data.draw(st.lists(st.integers(0, FULL - 1), max_size=24))
    t = [*others, position]
    caches = [sequence.cache(n) for n in t]
    batch = attend(caches, 1, sequence.q[t], sequence.k[t], sequence.v[t], n_blocks=5)
    np.testing.assert_array_equal(batch[-1], alone[0])


@given(shapes, st.sampled_from(list(KINDS)), st.integers(0, FULL - 40), st.integers(1, 40), seeds)
@settings(deadline=None, max_examples=40)
def test_the_cache_gets_what_numpy_writes(shape, kind, first, n, seed):
    sequence = Sequence(config_of(*shape), kind, seed)
    found, expected = sequence.cache(first), sequence.cache(first + n)
    sequence.read(first, first + n, cache=found)
    for name in ("keys", "values", "key_scales", "value_scales"):
        np.testing.assert_array_equal(getattr(found, name)[1], getattr(expected, name)[1])


@pytest.mark.simd_path
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "bad"), [("k", np.nan), ("v", np.nan), ("v", np.inf)])
@pytest.mark.parametrize("n", [1, 20])
def test_a_number_that_is_not_finite_is_seen_by_later_positions_only(kind, name, bad, n):
    """Positions before it are as if it was not there: what was proposed and dropped never happened."""
    clean, sequence = (Sequence(config_of(1, 2, 10), kind, 0) for _ in range(2))
    getattr(sequence, name)[300 + n - 1, 0, 3] = bad
    found = sequence.read(300, 300 + n)
    np.testing.assert_array_equal(found[:-1], clean.read(300, 300 + n)[:-1])
    assert not np.isfinite(found[-1]).all()
