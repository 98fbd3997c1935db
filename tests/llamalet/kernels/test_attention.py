import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import at_the_end_of_memory

from llamalet import reference
from llamalet.config import ModelConfig
from llamalet.kernels import attention, kv_slots, processor, simd
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
def work(q_heads, k, v, slots, runs, layer, n_heads, space, n_blocks, out):
    """All blocks of a pass on one thread, in an order that no thread would take."""
    count, head_dim, n_runs = len(slots), q_heads.shape[1], len(runs) - 1
    n_kv_heads = k.shape[1] // head_dim
    for i in range(n_runs):
        first, last = runs[i], runs[i + 1]
        kv_slots.keep_prompt(slots, first, last, layer * n_kv_heads, k, v, 0, n_kv_heads, head_dim, space.keys[0])
    for block in range(n_blocks - 1, -1, -1):
        attention.attend(q_heads, k, v, slots, count, runs, n_runs, layer, n_heads, space, block, n_blocks, 0)
    attention.finish(slots, count, n_heads, head_dim, space, out, 0, count)


def attend(caches, layer, q, k, v, n_blocks=3, place=np.asarray):
    """Let queries (T, H, D) attend, one of each cache but the first, which has all others; return (T, H * D).

    `place` puts the arrays elsewhere.
    """
    (T, H, D), longest = q.shape, max(cache.capacity for cache in caches)
    n_first = T - len(caches) + 1
    slots = np.zeros(T, kv_slots.CACHE_SLOT)
    slots[:n_first] = kv_slots.slot_of(caches[0])
    slots["position"][:n_first] += np.arange(n_first)
    slots[n_first:] = [kv_slots.slot_of(cache) for cache in caches[1:]]
    runs = np.array([*range(0, n_first, attention.RUN), n_first] if n_first > 1 else [0])
    space, out = attention.new_context_space(T, H, D, longest, 1), np.full((T, H * D), 7, np.float32)
    for array in (space.mixed, space.sums, space.keys, space.values, space.scores, space.tile):
        array[:] = np.nan  # nothing may be read that was not written
    space = attention.ContextSpace(*map(place, space))
    rows = [place(x.reshape(T, -1)) for x in (k, v)]
    work(place(q.reshape(-1, D)), *rows, place(slots), place(runs), layer, H, space, n_blocks, out)
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


bads = st.sampled_from([None, None, np.nan, np.inf, -np.inf])
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
    """Decoded; in a prompt cut anywhere; in a batch; in both at once; with any number of blocks."""
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
    t = [*range(first, last), *t]
    caches = [sequence.cache(first), *caches[:-1], sequence.cache(position)]
    both = attend(caches, 1, sequence.q[t], sequence.k[t], sequence.v[t], n_blocks=data.draw(st.integers(1, 9)))
    np.testing.assert_array_equal([both[position - first], both[-1]], [alone[0], alone[0]])


@pytest.mark.simd_path
@pytest.mark.parametrize("head_dim", [4, 9, 24])
@pytest.mark.parametrize("n", [1, 7, 40])
def test_nothing_beyond_the_arrays_is_touched(head_dim, n):
    """Caches end where a page must not be touched, and so does the memory of the pass."""
    sequences = [Sequence(config_of(2, 3, head_dim), kind, 0) for kind in KINDS]
    for sequence in sequences:
        # `reserve` gave room for FULL positions; now for as many as these need, a multiple of 64.
        small = sequence.cache(500)
        small._move_to(500 + n)
        for name in ("keys", "values", "key_scales", "value_scales"):
            setattr(small, name, at_the_end_of_memory(getattr(small, name)))
        small._take_addresses()
        part = slice(500, 500 + n)
        q, k, v = sequence.q[part], sequence.k[part], sequence.v[part]
        found = attend([small], 1, q, k, v, place=at_the_end_of_memory)
        np.testing.assert_array_equal(found, sequence.read(500, 500 + n))


def test_caches_of_several_kinds_and_capacities_in_a_batch():
    sequences = [Sequence(config_of(2, 3, 12), kind, seed) for seed, kind in enumerate([*KINDS] * 3)]
    lengths = [0, 3, 63, 64, 255, 256, 300, 511, 600]
    caches = [sequence.cache(n) for sequence, n in zip(sequences, lengths, strict=True)]
    for cache, n in zip(caches[::2], lengths[::2], strict=True):
        cache._move_to(n + 1)
    new = [[getattr(s, name)[n] for s, n in zip(sequences, lengths, strict=True)] for name in ("q", "k", "v")]
    found = attend(caches, 1, *map(np.stack, new))
    for row, sequence, n in zip(found, sequences, lengths, strict=True):
        np.testing.assert_array_equal(row, sequence.read(n, n + 1)[0])


@pytest.mark.filterwarnings("ignore:overflow encountered in matmul")
def test_a_piece_whose_scores_are_all_minus_infinity_weighs_nothing():
    sequence = Sequence(config_of(1, 1, 8), "f32", 0)
    sequence.q[:] = np.abs(sequence.q)
    sequence.k[:256] = -3e38  # the first piece; below the second
    found = sequence.read(600, 601)
    np.testing.assert_allclose(found, sequence.expected(600, 601), rtol=1e-5, atol=1e-6)
    assert np.isfinite(found).all()
    sequence.k[:256], sequence.k[256:512] = 1, -3e38
    np.testing.assert_allclose(sequence.read(600, 601), sequence.expected(600, 601), rtol=1e-5, atol=1e-6)


@pytest.mark.compiles
@pytest.mark.skipif("avx2" not in processor.features(), reason="needs a processor with AVX2")
def test_the_bits_are_as_equal_on_a_processor_without_avx512(tmp_path):
    """LLVM, if only allowed to fuse, fused the sums of a decoded position there, and not those of a prompt."""
    environment = os.environ | {
        "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+popcnt,+lzcnt",
        "XDG_CACHE_HOME": str(tmp_path), simd.PATH_VARIABLE: "portable",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "same_bits or finite"]
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert result.returncode == 0 and "[100%]" in result.stdout, result.stdout


@given(shapes, st.sampled_from(list(KINDS)), st.integers(0, FULL - 40), st.integers(1, 40), bads, seeds)
@settings(deadline=None, max_examples=60)
def test_the_cache_gets_what_numpy_writes(shape, kind, first, n, bad, seed):
    sequence = Sequence(config_of(*shape), kind, seed)
    if bad is not None:
        sequence.k[first, 0, 0] = sequence.v[first + n - 1, 0, -1] = bad
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
