"""The engine: whatever runs beside a text, it is the one it is alone, and every request ends exactly once."""

import dataclasses
import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SMALL_MODELS, Counting, in_memory, toy_tokenizer

from llamalet.engine import Begun, Ended, Engine, NewToken, Request
from llamalet.errors import NonFiniteError, UsageError
from llamalet.kernels.transformer import Transformer
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import KINDS, cache_bytes
from llamalet.logprobs import logprobs_of
from llamalet.prefix_cache import BLOCK, PrefixCache
from llamalet.sampler import SamplingConfig
from llamalet.stop_strings import TextStream
from llamalet.tokenizer import StreamDecoder

CONTEXT = 192
CONFIG = dataclasses.replace(SMALL_MODELS["gqa-tied"], max_seq_len=CONTEXT)  # 300 tokens
GREEDY = SamplingConfig(temperature=0)


class Clock:
    """A clock that goes on by a random time whenever it is read."""

    def __init__(self, seed: int) -> None:
        self._random, self._now = np.random.default_rng(seed), 0.0

    def __call__(self) -> float:
        self._now += float(self._random.exponential(0.003))
        return self._now


@pytest.fixture(scope="module")
def models():
    """A model in each kind of weights with one thread, and with two."""
    kinds = {"f32": "f32", "bf16": "bf16", "q8": "q8", "q4": "bf16"}
    return {
        (dtype, threads): Transformer(in_memory(CONFIG, dtype), threads=threads, kv=kv)
        for dtype, kv in kinds.items()
        for threads in (1, 2)
    }


def finish(engine: Engine, on_step=lambda number: None) -> dict[int, list]:
    """The events of each request until all have ended; each ends once, with its last event."""
    events = defaultdict(list)
    for number in itertools.count():
        if not engine.busy:
            break
        assert number < 5000
        on_step(number)
        stepped = engine.step()
        check_memory(engine)
        for event in stepped:
            assert not (events[event.id] and isinstance(events[event.id][-1], Ended)), "an event after the end"
            events[event.id].append(event)
    assert all(isinstance(of_one[-1], Ended) for of_one in events.values())
    assert engine.reserved_bytes == engine.n_running == engine.n_waiting == 0
    return events


def check_memory(engine: Engine) -> None:
    """Each cache has one owner, or none and is spare; both keep to the limits."""
    begun = [text for text in (*engine._reading, *engine._running) if text.cache is not None]
    spare, n_bytes = engine._spare._caches, sum(text.n_bytes for text in begun)
    assert len({id(cache) for cache in (*spare, *(text.cache for text in begun))}) == len(spare) + len(begun)
    assert len(spare) + len(begun) <= engine._batch_size
    assert engine.spare_bytes == sum(cache.n_bytes for cache in spare)
    assert n_bytes + engine.spare_bytes <= engine._kv_bytes or (len(begun) == 1 and not spare)


def alone(model, request: Request) -> list:
    """What a request gets from an engine of its own."""
    engine = Engine(model)
    engine.add(request)
    return finish(engine)[0]


def what_counts(events: list) -> list:
    """Events without the number of their request and what the prefix cache gave."""
    return [(type(event).__name__, *(event[2:] if isinstance(event, Begun) else event[1:])) for event in events]


@st.composite
def asked(draw) -> Request:
    """A request like those that a server gets; many begin alike."""
    start = draw(st.integers(3, 5))
    prompt = [start + n % 7 for n in range(draw(st.integers(1, 150)))] + draw(st.lists(st.integers(3, 299), max_size=3))
    return Request(
        prompt=prompt,
        sampling=SamplingConfig(
            temperature=draw(st.sampled_from([0.0, 1.0])),
            top_p=draw(st.sampled_from([0.9, 1.0])),
            seed=draw(st.integers(0, 99)),
            max_new_tokens=draw(st.none() | st.integers(0, 30)),
            ignore_eos=draw(st.booleans()),
        ),
        stop_tokens=range(20),
        yields_stop=draw(st.booleans()),
        bias=draw(st.dictionaries(st.integers(0, 299), st.floats(-5, 5), max_size=3)),
        decoder=StreamDecoder(toy_tokenizer()),
        stop=draw(st.lists(st.sampled_from(["a", "an", "t", "th", "\ufffd\ufffd"]), max_size=2)),
        logprobs=draw(st.sampled_from([None, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, 2])),
        salt=draw(st.sampled_from(["", "a"])),
    )


def again(request: Request) -> Request:
    """The same request with a decoder of its own."""
    return dataclasses.replace(request, decoder=StreamDecoder(toy_tokenizer()))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_text_is_the_same_in_any_company(models, data):
    dtype = data.draw(st.sampled_from(["f32", "bf16", "q8", "q4"]))
    requests = data.draw(st.lists(asked(), min_size=1, max_size=9))
    expected = [what_counts(alone(models[dtype, 1], again(request))) for request in requests]
    cancelled = data.draw(st.dictionaries(st.integers(0, 60), st.integers(0, 8), max_size=3))  # step -> request
    late = data.draw(st.lists(st.integers(0, 30), min_size=len(requests), max_size=len(requests)))
    engine = Engine(
        models[dtype, data.draw(st.sampled_from([1, 2]))],
        batch_size=data.draw(st.sampled_from([1, 3, 64])),
        kv_bytes=data.draw(st.sampled_from([np.inf, 3 * cache_bytes(CONFIG, CONTEXT)])),
        prefix_bytes=data.draw(st.sampled_from([0, 200_000, 10**8])),
        reading_share=data.draw(st.sampled_from([None, 0.1, 1.0])),
        clock=Clock(data.draw(st.integers(0, 99))),
    )
    ids, ended = {}, set()

    def on_step(number: int) -> None:
        for place, request in enumerate(requests):
            if place not in ids and (late[place] <= number or not engine.busy):
                ids[place] = engine.add(again(request), group=place % 2)
        if number in cancelled and cancelled[number] in ids:
            engine.cancel(ids[cancelled[number]])
            ended.add(cancelled[number])
        assert engine.prefix.n_bytes <= engine.prefix.max_bytes

    on_step(0)
    events = {}
    for turn in range(len(requests) + 1):
        for id, of_one in finish(engine, on_step).items():
            assert id not in events
            events[id] = of_one
        on_step(100 + turn)
    for place, found in ids.items():
        mine = what_counts(events[found])
        if mine[-1][2] == "cancelled":
            assert place in ended
            assert mine[:-1] == expected[place][: len(mine) - 1]
        else:
            assert mine == expected[place]
    assert len(ids) == len(requests)
    # Once more, in caches that others had.
    ids = {engine.add(again(request)): place for place, request in enumerate(requests)}
    for id, of_one in finish(engine).items():
        assert what_counts(of_one) == expected[ids[id]]


def test_logprobs_are_those_of_the_logits(models):
    model, prompt = models["q8", 1], [5, 6, 7, 8, 9]
    events = alone(model, Request(prompt=prompt, sampling=GREEDY, logprobs=3, prompt_logprobs=2))
    made = [event for event in events if isinstance(event, NewToken)]
    tokens = prompt + [event.token for event in made]
    logits = model.logits(tokens[:-1]).astype(np.float64)
    rows = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found = [*events[0].prompt_logprobs[1:], *(event.logprobs for event in made)]
    assert len(found) == len(rows) and events[0].prompt_logprobs[0] is None
    for row, token, logprobs in zip(rows, tokens[1:], found, strict=True):
        assert logprobs.logprob == pytest.approx(row[token], abs=1e-9)
        assert logprobs.rank == np.count_nonzero(row > row[token])
        assert logprobs.entropy == pytest.approx(-(np.exp(row) * row).sum(), abs=1e-9)
        assert [token for token, _ in logprobs.top] == np.argsort(-row, kind="stable")[: len(logprobs.top)].tolist()
        assert dict(logprobs.top).get(token, logprobs.logprob) == logprobs.logprob
    assert {len(logprobs.top) for logprobs in found} == {2, 3}


def test_equals_of_the_likeliest_come_by_their_ids():
    (found,) = logprobs_of(np.array([[0, 2, 1, 2, 2]], np.float32), [3], 2)
    assert [token for token, _ in found.top] == [1, 3] and found.rank == 0


def test_a_running_text_gets_a_token_with_every_step_while_another_is_read():
    model = Counting(CONFIG)
    engine = Engine(model, reading_share=0.5, clock=Clock(1))
    engine.add(Request(prompt=[100], sampling=GREEDY))
    engine.step()
    long = engine.add(Request(prompt=[7] * CONTEXT, sampling=GREEDY))
    for _ in range(100):
        events = engine.step()
        assert [event.id for event in events if isinstance(event, NewToken)][0] == 0
        if any(event.id == long for event in events):
            break
    else:
        pytest.fail("the long prompt is never read")


def test_reading_takes_its_share_of_the_time_and_no_more():
    """A pass takes 4 ms, and a token of a prompt 0.1 ms; the share is 0.8, so 32 tokens are read in a pass."""
    now, model = [0.0], Counting(dataclasses.replace(CONFIG, max_seq_len=4096))

    def prefill(cache, tokens):
        now[0] += 1e-4 * len(tokens)
        return Counting.prefill(model, cache, tokens)

    def decode(cache, token):
        now[0] += 4e-3
        return Counting.prefill(model, cache, [token])

    def extend_batch(caches, pieces):
        return [decode(caches[0], pieces[0][0]), prefill(caches[1], pieces[1])]

    model.prefill, model.decode, model.extend_batch = prefill, decode, extend_batch
    engine = Engine(model, reading_share=0.8, clock=lambda: now[0])
    engine.add(Request(prompt=[7] * 4000, sampling=SamplingConfig(temperature=0, max_new_tokens=1)))
    while engine.busy:  # with nobody else, in large chunks
        engine.step()
    assert now[0] == pytest.approx(0.4)
    engine.add(Request(prompt=[100], sampling=GREEDY))
    engine.step()
    engine.step()
    engine.add(Request(prompt=[9] * 4000, sampling=SamplingConfig(temperature=0, max_new_tokens=1)))
    steps, last = [], now[0]
    while engine.n_running > 1 or engine.n_waiting:
        assert any(isinstance(event, NewToken) and event.id == 1 for event in engine.step())
        steps.append(now[0] - last)
        last = now[0]
    assert max(steps) <= 7.3e-3 and 130 < len(steps) < 141  # one in 17 reads nothing


class Timed(Counting):
    """A forward pass that takes 4 ms, 1 for each text, and a third for each token of a prompt."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.now = 0.0

    def take(self, texts: int, tokens: int) -> None:
        self.now += 4e-3 + 1e-3 * texts + 1e-3 / 3 * tokens

    def prefill(self, cache, tokens):
        self.take(0, len(tokens))
        return super().prefill(cache, tokens)

    def decode(self, cache, token):
        self.take(1, 0)
        return super().prefill(cache, [token])

    def decode_batch(self, caches, tokens):
        self.take(len(caches), 0)
        return np.stack([Counting.prefill(self, cache, [token]) for cache, token in zip(caches, tokens, strict=True)])

    def extend_batch(self, caches, pieces):
        n_texts = sum(len(piece) == 1 for piece in pieces)
        self.take(n_texts, sum(map(len, pieces)) - n_texts)
        return [Counting.prefill(self, *each) for each in zip(caches, pieces, strict=True)]


@pytest.mark.parametrize("n_others", [0, 10, 60])
def test_reading_takes_no_longer_than_its_share_when_the_number_of_texts_changes(n_others):
    """One text goes on while others end; then nothing runs for a while; then a text meets a prompt again."""
    model = Timed(dataclasses.replace(CONFIG, max_seq_len=4096))
    engine = Engine(model, reading_share=0.8, clock=lambda: model.now)
    last = SamplingConfig(temperature=0, max_new_tokens=2)
    for _ in range(2):
        long = SamplingConfig(temperature=0, max_new_tokens=500)
        going_on = engine.add(Request(prompt=[100], sampling=long))
        for number in range(n_others):
            few = SamplingConfig(temperature=0, max_new_tokens=150 - number % 2)
            engine.add(Request(prompt=[101], sampling=few))
        while engine.n_running < n_others + 1 or engine._reading:
            engine.step()
        engine.add(Request(prompt=[9] * 4000, sampling=last))
        while engine.busy:
            n_running, before = len(engine._running), model.now
            if any(event.id == going_on and isinstance(event, Ended) for event in engine.step()):
                break
            assert model.now - before <= 1.81 * (4e-3 + 1e-3 * n_running)
        while engine.busy:
            engine.step()


@pytest.mark.parametrize(("prompts", "shares"), [([3], 1), ([3, 4], 2), ([3, 4, 5, 6], 4), (range(9), 4), ([3] * 4, 1)])
def test_a_pass_reads_more_the_more_prompts_there_are(prompts, shares):
    model = Timed(dataclasses.replace(CONFIG, max_seq_len=4096))
    engine = Engine(model, reading_share=0.4, clock=lambda: model.now)
    for _ in range(10):
        engine.add(Request(prompt=[100], sampling=SamplingConfig(temperature=0, max_new_tokens=4000)))
    while len(engine._running) < 10:
        engine.step()
    engine.step()
    for token in prompts:
        engine.add(Request(prompt=[token] * 2000, sampling=GREEDY))
    passes = []
    for _ in range(25):
        before = model.now
        engine.step()
        passes.append(model.now - before)
    texts_s = 4e-3 + 10 * 1e-3
    assert max(passes[5:]) == pytest.approx((1 + 0.4 * shares) * texts_s, rel=0.05)


def test_short_prompts_are_read_one_after_the_other():
    model = Timed(dataclasses.replace(CONFIG, max_seq_len=4096))
    engine = Engine(model, reading_share=0.8, clock=lambda: model.now)
    engine.add(Request(prompt=[100], sampling=SamplingConfig(temperature=0, max_new_tokens=4000)))
    engine.step()
    ids = [engine.add(Request(prompt=[n] * 200, sampling=GREEDY)) for n in range(3, 13)]
    begun = []
    while len(begun) < len(ids):
        begun += [event.id for event in engine.step() if isinstance(event, Begun)]
        assert engine._reading == [] or sum(text.n_read > 0 for text in engine._reading) <= 1
    assert begun == ids


def test_no_memory_for_reading_ends_the_text_that_is_read():
    model = Counting(CONFIG)
    engine = Engine(model, reading_share=0.5, clock=Clock(1))
    going_on = engine.add(Request(prompt=[100], sampling=SamplingConfig(temperature=0, max_new_tokens=20)))
    engine.step()
    engine.step()

    def no_memory(caches, pieces):
        raise MemoryError

    model.extend_batch = no_memory
    read = engine.add(Request(prompt=[7] * 100, sampling=GREEDY))
    events = finish(engine)
    assert events[read][-1].reason == "error" and isinstance(events[read][-1].error, MemoryError)
    assert events[going_on][-1].reason == "length"


def test_spare_caches_go_before_a_text_ends_for_want_of_memory():
    """In numpy a pass may fail when some caches have their token and others have not."""
    model, sampling = Counting(CONFIG), SamplingConfig(temperature=0, max_new_tokens=20)
    engine = Engine(model)
    for start in (100, 150, 200):
        engine.add(Request(prompt=[start], sampling=sampling))
    finish(engine)
    for start in (100, 150):
        engine.add(Request(prompt=[start], sampling=sampling))
    while len(engine._running) < 2:
        engine.step()
    decode_batch, failed = model.decode_batch, []

    def decode_batch_later(caches, tokens):
        assert not any(token in cache for cache, token in zip(caches, tokens, strict=True))  # they count up
        if not failed:
            failed.append(engine.spare_bytes)
            caches[0].append(tokens[0])
            raise MemoryError
        return decode_batch(caches, tokens)

    model.decode_batch = decode_batch_later
    events = finish(engine)
    assert failed[0] and all(of_one[-1].reason == "length" for of_one in events.values())
    for of_one, start in zip(events.values(), (100, 150), strict=True):
        made = [event.token for event in of_one if isinstance(event, NewToken)]
        assert made == list(range(start + 21 - len(made), start + 21))
    assert all(len(cache) == 0 for cache in engine._spare._caches)


def test_a_prompt_without_a_token_to_read_is_refused(models):
    cache = models["q8", 1].new_cache()
    models["q8", 1].prefill(cache, [5, 6])
    with pytest.raises(UsageError, match="n_known=2"):
        Engine(models["q8", 1]).add(Request(prompt=[5, 6], cache=cache, n_known=2))


def test_tokens_that_were_known_do_not_make_reading_look_fast():
    now, model = [0.0], Transformer(in_memory(CONFIG, "q8"), threads=1)
    prefill, extend_batch, sizes = model.prefill, model.extend_batch, []

    def slow_prefill(cache, tokens):
        now[0] += 0.01 * len(tokens)
        sizes.append(len(tokens))
        return prefill(cache, tokens)

    def slow_extend_batch(caches, pieces):
        n = sum(map(len, pieces)) - 1  # one text runs
        now[0] += 0.01 * n
        sizes.append(n)
        return extend_batch(caches, pieces)

    model.prefill, model.extend_batch = slow_prefill, slow_extend_batch
    engine = Engine(model, reading_share=1.0, prefix_bytes=10**8, clock=lambda: now[0])
    known = [5] * 150
    for prompt in (known, [9]):
        engine.add(Request(prompt=prompt, sampling=SamplingConfig(max_new_tokens=30, ignore_eos=True)))
    while engine.n_running != 1 or engine.n_waiting:
        engine.step()
    sizes.clear()
    for prompt in (known, known, [7] * 150):
        engine.add(Request(prompt=prompt, sampling=SamplingConfig(max_new_tokens=1)))
    finish(engine)
    assert max(sizes) <= 32  # 1 s of a pass would be 100 tokens; passes take no time here


def test_what_the_prefix_cache_keeps_does_not_change_with_the_caches_of_texts(models):
    engine = Engine(models["q8", 1], prefix_bytes=10**8)
    sampling = SamplingConfig(temperature=0, max_new_tokens=45, ignore_eos=True)
    first, second = [5 + n % 7 for n in range(20)], [100 + n for n in range(20)]
    engine.add(Request(prompt=first, sampling=sampling))
    events = finish(engine)[0]  # 64 positions in a cache for 64: a block, and all of the cache
    prompt = first + [event.token for event in events if isinstance(event, NewToken)]
    engine.add(Request(prompt=second, sampling=sampling))
    finish(engine)
    request = Request(prompt=prompt, sampling=sampling, logprobs=2)
    id = engine.add(request)
    events = finish(engine)[id]
    assert events[0].n_cached == BLOCK
    assert what_counts(events) == what_counts(alone(models["q8", 1], request))


def test_texts_that_share_a_prompt_take_caches_that_others_had(models):
    model, sampling = models["q8", 1], SamplingConfig(temperature=0, max_new_tokens=30, ignore_eos=True)
    expected = what_counts(alone(model, Request(prompt=[5] * 40, sampling=sampling)))
    engine = Engine(model)
    caches = []
    for token in (9, 5):
        for _ in range(3):
            engine.add(Request(prompt=[token] * 40, sampling=sampling))
        events = finish(engine)
        caches.append(set(map(id, engine._spare._caches)))
    assert caches[0] == caches[1] and len(caches[0]) == 3
    assert [what_counts(of_one) for of_one in events.values()] == [expected] * 3


def test_who_takes_over_a_cache_that_has_rolled_keeps_nothing_of_it(models):
    engine = Engine(models["q8", 1], prefix_bytes=10**8)
    rolling = SamplingConfig(overflow="roll", max_new_tokens=2)
    prompt = [5 + n % 7 for n in range(CONTEXT + 20)]
    for _ in range(2):
        engine.add(Request(prompt=prompt, sampling=rolling))
    finish(engine)
    request = Request(prompt=prompt[:150], sampling=SamplingConfig(max_new_tokens=3, seed=1), logprobs=2)
    engine.add(request)
    (events,) = finish(engine).values()
    assert what_counts(events) == what_counts(alone(models["q8", 1], request))


def test_groups_take_turns():
    engine = Engine(Counting(CONFIG), batch_size=1)
    for n in range(5):
        engine.add(Request(prompt=[100 + n], sampling=SamplingConfig(temperature=0, max_new_tokens=1)), group="many")
    engine.add(Request(prompt=[50], sampling=SamplingConfig(temperature=0, max_new_tokens=1)), group="one")
    assert list(finish(engine)) == [0, 5, 1, 2, 3, 4]


def test_memory_is_a_limit_for_all_but_a_single_text():
    size = cache_bytes(CONFIG, CONTEXT)
    engine = Engine(Counting(CONFIG), kv_bytes=size * 2.5)
    for _ in range(5):
        engine.add(Request(prompt=[1], sampling=SamplingConfig(temperature=0, max_new_tokens=CONTEXT)))
    most = []
    finish(engine, lambda number: most.append(engine.reserved_bytes))
    assert max(most) == 2 * size
    engine = Engine(Counting(CONFIG), kv_bytes=1)
    engine.add(Request(prompt=[1], sampling=GREEDY))
    assert len(finish(engine)[0]) == CONTEXT + 2


@pytest.mark.parametrize("place", ["waits", "is read", "runs", "shares its prompt"])
def test_a_cancelled_text_ends_with_the_next_step_and_frees_its_place(models, place):
    engine = Engine(models["q8", 1], batch_size=2, reading_share=1e-9, clock=Clock(2))
    other = engine.add(Request(prompt=[9], sampling=GREEDY))
    engine.step()
    engine.step()  # a pass without a chunk, to measure it
    prompt = [5] * CONTEXT if place == "is read" else [5, 6]
    text = engine.add(Request(prompt=prompt, sampling=GREEDY))
    twin = engine.add(Request(prompt=prompt, sampling=GREEDY))
    if place != "waits":
        events = engine.step()
        assert any(event.id == text for event in events) == (place != "is read")
    cancelled = twin if place == "shares its prompt" else text
    engine.cancel(cancelled)
    engine.cancel(cancelled)
    engine.cancel(10**6)
    (ended,) = [event for event in engine.step() if event.id == cancelled]
    assert ended == Ended(cancelled, "", "cancelled", None)
    events = finish(engine)
    assert cancelled not in events
    for id in {other, text, twin} - {cancelled}:
        assert isinstance(events[id][-1], Ended) and events[id][-1].reason == "length"
    engine.cancel(cancelled)
    assert engine.step() == [] and engine._shared is None


def test_it_says_who_got_a_place():
    engine = Engine(Counting(CONFIG), batch_size=2)
    for _ in range(3):
        engine.add(Request(prompt=[1], sampling=SamplingConfig(temperature=0, max_new_tokens=2)))
    places = []
    finish(engine, lambda number: places.append(engine.admitted))
    assert places[:2] == [[], [0, 1]] and sum(places, []) == [0, 1, 2]


def test_an_error_ends_one_text(models):
    model, engine = Counting(CONFIG), None
    decode = model.decode
    model.decode = lambda cache, token: decode(cache, token) * (np.nan if token == 105 else 1)
    engine = Engine(model)
    for start in (101, 90):
        engine.add(Request(prompt=[start], sampling=SamplingConfig(temperature=0, max_new_tokens=9)))
    broken, other = finish(engine).values()
    assert [event.token for event in broken[1:-1]] == [102, 103, 104, 105]
    assert broken[-1].reason == "error" and isinstance(broken[-1].error, NonFiniteError)
    assert [event.token for event in other[1:-1]] == list(range(91, 100)) and other[-1].reason == "length"


def test_no_memory_ends_one_text(models, monkeypatch):
    monkeypatch.setattr("llamalet.kv_cache.free_memory", lambda: cache_bytes(CONFIG, 64))
    engine = Engine(models["f32", 1])
    engine.add(Request(prompt=[5] * 100, sampling=GREEDY))
    engine.add(Request(prompt=[5] * 10, sampling=SamplingConfig(temperature=0, max_new_tokens=3)))
    large, small = finish(engine).values()
    assert isinstance(large[-1].error, UsageError) and "memory" in str(large[-1].error) and small[-1].reason == "length"


def test_a_bias_changes_what_is_chosen(models):
    events = alone(models["f32", 1], Request(prompt=[5], sampling=GREEDY, bias={77: 1000.0}, logprobs=1))
    assert {event.token for event in events if isinstance(event, NewToken)} == {77}
    assert all(event.logprobs.logprob < 0 for event in events if isinstance(event, NewToken))  # without the bias


# --- the prefix cache ---


@pytest.mark.parametrize("reuses", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_cache_are_copies(kind, reuses):
    rng = np.random.default_rng(1)
    one, two = KVCache(CONFIG, BLOCK, kind), KVCache(CONFIG, CONTEXT, kind)
    shape = (CONFIG.n_kv_heads, BLOCK, CONFIG.head_dim)
    for layer in range(CONFIG.n_layers):
        one.write(layer, 0, *rng.standard_normal((2, *shape), np.float32))
    memory = KVCache(CONFIG, CONTEXT, kind).block(64, 128) if reuses else None
    block = one.block(0, BLOCK, memory)  # all of the cache
    assert block is memory or not reuses
    assert sum(array.nbytes for array in block) == one.block_bytes(BLOCK)
    expected = [[part.copy() for part in one.read(layer, 0, BLOCK)] for layer in range(CONFIG.n_layers)]
    for array in (one.keys, one.values, one.key_scales, one.value_scales):
        array[...] = 1
    two.put_block(64, block)
    for layer in range(CONFIG.n_layers):
        for found, wanted in zip(two.read(layer, 64, 128), expected[layer], strict=True):
            assert found.tobytes() == wanted.tobytes()


def filled(n: int) -> KVCache:
    cache = KVCache(CONFIG, n)
    cache.length = n
    return cache


def test_whole_blocks_are_found_again_but_not_with_another_salt():
    prefix, tokens = PrefixCache(10**9), list(range(CONTEXT))
    prefix.store(tokens, "", filled(CONTEXT))
    assert len(prefix) == 3 and prefix.n_bytes == 3 * filled(64).block_bytes(BLOCK)
    for asked_for, n in ((tokens, 128), ([*tokens, 1], 192), (tokens[:129], 128), (tokens[:64], 0), ([7, *tokens], 0)):
        assert prefix.restore(asked_for, "", KVCache(CONFIG)) == n
    assert prefix.restore(tokens, "other", KVCache(CONFIG)) == 0
    prefix.store(tokens, "", filled(CONTEXT))
    assert len(prefix) == 3


def test_what_was_used_least_recently_leaves_first_and_the_limit_holds():
    block = filled(64).block_bytes(BLOCK)
    prefix = PrefixCache(4 * block)
    texts = [[start] * 128 for start in range(3)]
    for text in texts[:2]:
        prefix.store(text, "", filled(128))
    prefix.restore([*texts[0], 1], "", KVCache(CONFIG))
    prefix.store(texts[2], "", filled(128))
    assert prefix.n_bytes == 4 * block
    assert [prefix.restore([*text, 1], "", KVCache(CONFIG)) for text in texts] == [128, 0, 128]
    arrays = [array for node in prefix._by_age for array in node.arrays]  # kept, so that no other gets their ids
    prefix.store([9] * 192, "", filled(192))
    prefix.store([8] * 64, "", filled(64))
    assert prefix.n_bytes == 4 * block
    now = {id(array) for node in prefix._by_age for array in node.arrays}
    assert now == set(map(id, arrays))  # new blocks lie in the memory of old ones
    assert prefix.restore([9] * 193, "", KVCache(CONFIG, 256)) in (
        128,
        192,
    )  # the end of a text leaves before its beginning
    small = PrefixCache(block - 1)
    small.store(texts[0], "", filled(128))
    assert len(small) == 0


def test_texts_that_begin_alike_are_read_once(models):
    engine = Engine(models["q8", 1], prefix_bytes=10**8)
    prompt = [5 + n % 9 for n in range(150)]
    request = Request(prompt=prompt, sampling=SamplingConfig(temperature=0, max_new_tokens=40))
    engine.add(request)
    first = finish(engine)[0]
    made = [event.token for event in first if isinstance(event, NewToken)]
    engine.add(request)
    engine.add(Request(prompt=[*prompt, *made], sampling=SamplingConfig(max_new_tokens=1)))
    engine.add(dataclasses.replace(request, salt="mine"))
    engine.add(dataclasses.replace(request, prompt_logprobs=0))
    cached = {id: events[0].n_cached for id, events in finish(engine).items()}
    assert first[0].n_cached == 0 and cached == {1: 128, 2: 128, 3: 0, 4: 0}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8"])
def test_a_text_is_the_same_with_a_warm_cache(models, dtype):
    """Of three blocks, with an alternative at every place, so that a wrong key shows."""
    model, rng = models[dtype, 2], np.random.default_rng(3)
    request = Request(
        prompt=rng.integers(3, 300, 170).tolist(), sampling=SamplingConfig(max_new_tokens=22, seed=1), logprobs=3
    )
    engine = Engine(model, prefix_bytes=10**8)
    for n in (0, 128):
        engine.add(request)
        (events,) = finish(engine).values()
        assert events[0].n_cached == n and what_counts(events) == what_counts(alone(model, request))
    made = [event.token for event in events if isinstance(event, NewToken)]
    longer = dataclasses.replace(request, prompt=[*request.prompt, *made], sampling=GREEDY)  # 192 tokens
    engine.add(longer)
    (events,) = finish(engine).values()
    assert events[0].n_cached == 128 and what_counts(events) == what_counts(alone(model, longer))


@pytest.mark.parametrize(("n_new", "blocks"), [(4, 0), (5, 1)])
def test_only_what_has_been_computed_is_kept(models, n_new, blocks):
    engine = Engine(models["q8", 1], prefix_bytes=10**8)
    engine.add(Request(prompt=[5] * 60, sampling=SamplingConfig(max_new_tokens=n_new, ignore_eos=True)))
    finish(engine)
    assert len(engine.prefix) == blocks  # the newest token's key is never computed


def test_what_rolls_is_not_kept(models):
    engine = Engine(models["q8", 1], prefix_bytes=10**8)
    engine.add(Request(prompt=[5] * 100, sampling=SamplingConfig(overflow="roll", max_new_tokens=250, seed=1)))
    finish(engine)
    assert len(engine.prefix) == 1  # the prompt's, before it rolled


# --- stop strings ---


@settings(max_examples=300)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 5), max_size=30),
)
def test_text_ends_before_the_stop_string_that_is_complete_first_however_it_is_cut(text, stops, cuts):
    class Pieces:
        def push(self, piece):
            return piece

        def finish(self):
            return ""

    stream, rest, out, ended = TextStream(Pieces(), stops), text, "", False
    for cut in itertools.chain(cuts, itertools.repeat(1)):
        if not rest or ended:
            break
        piece, ended = stream.push(rest[:cut])
        rest = rest[cut:]
        out += piece
    out += stream.finish()
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    assert out == (text[: min(ends)[1]] if ends else text) and ended == bool(ends)
