"""Caches of texts that have ended serve those that begin, and nothing of the old texts is seen."""

import dataclasses

import numpy as np
import pytest
from toy import SMALL_MODELS, in_memory

from llamalet.engine import Ended, Engine, NewToken, Request
from llamalet.errors import OutOfMemoryError
from llamalet.kernels.transformer import Transformer
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import KINDS, cache_bytes
from llamalet.reference import NumpyTransformer
from llamalet.sampler import SamplingConfig
from llamalet.spare_caches import SpareCaches

CONFIG = dataclasses.replace(SMALL_MODELS["gqa-tied"], max_seq_len=512)


def cache_of(positions: int) -> KVCache:
    cache = KVCache(CONFIG)
    cache.reserve(positions)
    return cache


def test_the_smallest_is_taken_that_has_room_for_what_is_wanted():
    spare, caches = SpareCaches(10**9), {n: cache_of(n) for n in (64, 128, 192, 256)}
    for cache in caches.values():
        spare.give(cache)
    assert spare.take(300, 300, 10**9) is None
    assert spare.take(64, 100, caches[64].n_bytes - 1) is None
    assert spare.take(64, 130, caches[128].n_bytes) is caches[128]  # the largest with so few bytes
    assert spare.take(1, 65, 10**9) is caches[192]  # the smallest with room for all
    assert spare.take(60, 500, 10**9) is caches[256]
    assert spare.n_bytes == caches[64].n_bytes and len(spare) == 1
    twin = cache_of(64)
    spare.give(twin)
    assert spare.take(1, 1, 10**9) is twin  # used last


def test_what_is_too_much_leaves_the_oldest_first():
    caches = [cache_of(64) for _ in range(4)]
    spare = SpareCaches(3 * caches[0].n_bytes)
    for cache in caches:
        cache.length = 5
        spare.give(cache)
    assert len(spare) == 3 and spare.n_bytes == 3 * caches[0].n_bytes
    spare.give(cache_of(256))  # too large: the others stay
    assert len(spare) == 3
    spare.shrink_to(2 * caches[0].n_bytes - 1)
    assert spare.take(1, 1, 10**9) is caches[3] and caches[3].length == 0 and len(spare) == 0
    spare = SpareCaches(10**9)
    for cache in caches:
        spare.give(cache)
    spare.shrink_to(10**9, number=1)
    assert len(spare) == 1 and spare.take(1, 1, 10**9) is caches[3]


@pytest.mark.parametrize("runtime", [Transformer, NumpyTransformer])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_an_old_text_is_seen(kind, runtime):
    config = dataclasses.replace(CONFIG, dim=36, n_heads=6, n_kv_heads=3)  # heads of 6, filled up to 16
    model = runtime(in_memory(config, "f32"), kv=kind)
    ids = np.arange(40) % config.vocab_size

    def logits(cache: KVCache) -> list[np.ndarray]:
        cache.reserve(64)
        return [model.prefill(cache, ids[:21]), model.decode(cache, 7), *model.extend(cache, ids[:5])]

    old = model.new_cache()
    model.prefill(old, ids)
    for array in (old.keys, old.values[..., :6], old.key_scales, old.value_scales):
        array[...] = {"f": np.nan, "u": 0xFFFF, "i": -1}[array.dtype.kind]  # 0xFFFF: the bits of a NaN
    old.truncate(0)
    for found, expected in zip(logits(old), logits(model.new_cache()), strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(found, expected)


def texts_of(engine: Engine, requests: list[Request]) -> list[list[int]]:
    ids, tokens = [engine.add(request) for request in requests], {}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, NewToken):
                tokens.setdefault(event.id, []).append(event.token)
            assert not isinstance(event, Ended) or event.error is None
    return [tokens[id] for id in ids]


def test_texts_that_follow_others_need_no_new_memory():
    model, made = Transformer(in_memory(CONFIG, "q8"), threads=1), []
    new_cache = model.new_cache
    model.new_cache = lambda: made.append(new_cache()) or made[-1]
    requests = [
        Request(prompt=[n], sampling=SamplingConfig(temperature=0, max_new_tokens=100, ignore_eos=True))
        for n in (5, 9, 20)
    ]
    engine = Engine(model)
    first = texts_of(engine, requests)
    assert len(made) == 3 and {cache.capacity for cache in made} == {128}
    arrays = [id(cache.keys) for cache in made]
    assert texts_of(engine, requests) == first and len(made) == 3
    assert [id(cache.keys) for cache in made] == arrays
    own = model.new_cache()
    texts_of(engine, [dataclasses.replace(requests[0], cache=own)])
    assert own.length == 100  # it stays its owner's


def test_they_do_not_take_memory_from_texts():
    size = cache_bytes(CONFIG, 128)
    engine = Engine(Transformer(in_memory(CONFIG, "f32"), threads=1), kv_bytes=4 * size)

    def request(n_prompt: int, n_new: int, token: int = 5) -> Request:
        sampling = SamplingConfig(temperature=0, max_new_tokens=n_new, ignore_eos=True)
        return Request(prompt=[token] * n_prompt, sampling=sampling)

    texts_of(engine, [request(20, 44, token) for token in range(5, 9)])
    assert engine.spare_bytes == 2 * size  # four of 64 positions
    engine.add(request(100, 92))
    engine.step()
    assert engine.reserved_bytes == 3 * size and engine.spare_bytes == size
    engine.cancel(4)
    engine.step()
    assert engine.reserved_bytes == 0 and engine.spare_bytes == size + cache_bytes(CONFIG, 192)


def test_they_go_if_the_memory_is_not_enough(monkeypatch):
    engine = Engine(Transformer(in_memory(CONFIG, "f32"), threads=1))
    long, short = (
        Request(prompt=[5] * n, sampling=SamplingConfig(temperature=0, max_new_tokens=9, ignore_eos=True))
        for n in (300, 20)
    )
    texts_of(engine, [short, short])
    monkeypatch.setattr("llamalet.kv_cache.free_memory", lambda: 0 if len(engine._spare) else cache_bytes(CONFIG, 512))
    texts_of(engine, [long])
    engine._spare.shrink_to(0)
    monkeypatch.setattr("llamalet.kv_cache.free_memory", lambda: 0)
    engine.add(short)
    (ended,) = [event for event in engine.step() if isinstance(event, Ended)]
    assert isinstance(ended.error, OutOfMemoryError)
