"""The bridge between asyncio and the engine's thread, with an engine that does what a test wants."""

import asyncio
import re
import threading
import time
from types import SimpleNamespace

import pytest

from llamalet.engine import Begun, Ended, NewToken
from llamalet.errors import UsageError
from llamalet.sampler import SamplingConfig
from llamalet.serve.api_error import ApiError
from llamalet.serve.metrics import ServerMetrics
from llamalet.serve.worker import MAX_UNREAD, ClientGone, QueueLimits, Worker


class ToyEngine:
    """Gives every text a token in each step, while the gate is open.

    Prompt [7] has a place at once, and others while the gate is open. It refuses prompt [8], and fails at prompt [9].
    """

    def __init__(self, gate: threading.Event):
        self.gate, self.texts, self.begun, self.cancelled = gate, {}, set(), []
        self.placed, self.admitted = set(), []
        self.reserved_bytes, self.spare_bytes, self.prefix = 0, 0, SimpleNamespace(n_bytes=0)
        self.n_added = 0

    @property
    def busy(self):
        return bool(self.texts)

    def add(self, request, group):
        if request.prompt == [8]:
            raise UsageError("no such text")
        self.texts[self.n_added] = request
        self.n_added += 1
        return self.n_added - 1

    def cancel(self, id):
        self.cancelled.append(id)

    def admit(self, ids):
        self.admitted += [id for id in ids if id not in self.placed]
        self.placed.update(self.admitted)

    def step(self):
        self.admitted = []
        events = [Ended(id, "", "cancelled", None) for id in self.cancelled if self.texts.pop(id, None)]
        self.cancelled.clear()
        self.admit(id for id, request in self.texts.items() if request.prompt == [7])
        if not self.gate.wait(0.01):
            return events
        self.admit(self.texts)
        time.sleep(0.0005)
        for id, request in list(self.texts.items()):
            if request.prompt == [9]:
                raise ZeroDivisionError("a mistake")
            if id not in self.begun:
                self.begun.add(id)
                events.append(Begun(id, 0, None, None))
            request.left[0] -= 1
            events.append(NewToken(id, 1, "a", None))
            if not request.left[0]:
                del self.texts[id]
                events.append(Ended(id, "", "length", None))
        return events


class ToyRequest(SimpleNamespace):
    def __init__(self, n=3, prompt=(1,)):
        super().__init__(prompt=list(prompt), sampling=SamplingConfig(max_new_tokens=n), left=[n])


@pytest.fixture
def gate():
    found = threading.Event()
    found.set()
    return found


def run(gate, test, *, texts=4, tokens=1000, wait_s=30.0):
    """Run a test with a worker, which must be idle afterwards, whatever happened."""

    async def main():
        worker = Worker(lambda: ToyEngine(gate), 100, QueueLimits(texts, tokens, wait_s), ServerMetrics())
        try:
            await asyncio.wait_for(test(worker), 20)
            gate.set()
            for _ in range(200):
                if not (worker.n_running or worker.n_waiting):
                    break
                await asyncio.sleep(0.01)
            assert (worker.n_running, worker.n_waiting, worker._n_waiting_tokens, worker._open) == (0, 0, 0, {})
        finally:
            worker.stop(5)
        assert not worker._thread.is_alive()

    asyncio.run(main())


async def read(worker, *requests):
    """Return the kinds of all events of each text."""
    found = [[] for _ in requests]
    with worker.run(requests) as texts:
        async for events in texts:
            for number, event in events:
                found[number].append(type(event).__name__)
    return found


WHOLE = ["Begun", "NewToken", "NewToken", "NewToken", "Ended"]


def test_every_text_gets_its_events_in_order(gate):
    async def test(worker):
        found = await asyncio.gather(*(read(worker, ToyRequest(), ToyRequest()) for _ in range(2)))
        assert found == [[WHOLE, WHOLE]] * 2

    run(gate, test)


def test_a_text_that_the_engine_refuses_leaves_the_others_alone(gate):
    async def test(worker):
        assert await read(worker, ToyRequest(), ToyRequest(prompt=[8]), ToyRequest()) == [WHOLE, ["Ended"], WHOLE]

    run(gate, test)


def test_an_engine_that_fails_ends_its_texts_and_is_replaced(gate, capsys):
    async def test(worker):
        others = asyncio.create_task(read(worker, ToyRequest(10**9)))
        await asyncio.sleep(0.05)
        with worker.run([ToyRequest(prompt=[9])]) as texts:
            events = [event async for events in texts for _, event in events]
        assert [type(event.error) for event in events] == [ZeroDivisionError]
        assert (await others)[0][-1] == "Ended"
        assert await read(worker, ToyRequest()) == [WHOLE]
        assert worker._metrics.ended["error"] == 2

    run(gate, test)
    said = capsys.readouterr().err
    pattern = r"the engine failed and begins anew: ZeroDivisionError: a mistake \(test_worker\.py:\d+\)\n"
    assert re.fullmatch(pattern, said), said


def test_an_engine_that_cannot_be_made_refuses_texts(gate):
    async def test(worker):
        worker._thread._new_engine = lambda: 1 / 0
        assert await read(worker, ToyRequest(), ToyRequest()) == [["Ended"], ["Ended"]]
        worker._thread._new_engine = lambda: ToyEngine(gate)
        assert await read(worker, ToyRequest()) == [WHOLE]

    run(gate, test)


@pytest.mark.parametrize("limits", [{"texts": 3}, {"tokens": 13}])
def test_a_full_queue_refuses_at_once(gate, limits):
    async def test(worker):
        gate.clear()
        first = asyncio.create_task(read(worker, *[ToyRequest()] * 2))
        await asyncio.sleep(0.03)
        with pytest.raises(ApiError, match="2 texts wait already") as caught:
            worker.run([ToyRequest()] * 2)
        assert caught.value.status == 503 and 1 <= int(caught.value.headers["retry-after"]) <= 30
        second = asyncio.create_task(read(worker, ToyRequest()))
        await asyncio.sleep(0.03)
        first.cancel()
        gate.set()
        assert await second == [WHOLE]
        assert (
            await read(worker, *(ToyRequest() for _ in range(5))) == [WHOLE] * 5
        )  # more than may wait, but nobody does

    run(gate, test, **limits)


def test_texts_that_wait_too_long_are_refused(gate):
    async def test(worker):
        gate.clear()
        with pytest.raises(ApiError, match="no place became free in 0.1 s"):
            await read(worker, ToyRequest())
        gate.set()
        with worker.run([ToyRequest(10**9)]) as texts:  # one that has begun may take its time
            await anext(texts)
            await asyncio.sleep(0.2)
            assert await anext(texts)

    run(gate, test, wait_s=0.1)


def test_a_text_with_a_place_does_not_wait(gate):
    async def test(worker):
        gate.clear()
        reading = asyncio.create_task(read(worker, ToyRequest(prompt=[7]), ToyRequest()))
        await asyncio.sleep(0.3)
        assert (worker.n_running, worker.n_waiting, worker._n_waiting_tokens) == (1, 1, 4)
        gate.set()
        assert await reading == [WHOLE, WHOLE]

    run(gate, test, wait_s=0.1)


def test_leaving_the_block_cancels(gate):
    async def test(worker):
        with worker.run([ToyRequest(10**9), ToyRequest(10**9)]) as texts:
            await anext(texts)
        gate.clear()
        for _ in range(5):  # some before the engine hears of them
            with worker.run([ToyRequest()]):
                pass
        await asyncio.sleep(0.1)
        assert worker._metrics.ended["cancelled"] == 7

    run(gate, test, texts=10)


def test_a_reader_that_falls_behind_is_cancelled(gate):
    async def test(worker):
        with worker.run([ToyRequest(10**9)]) as texts:
            while not texts.closed:
                assert len(texts._unread) <= MAX_UNREAD
                await asyncio.sleep(0.001)
            with pytest.raises(ClientGone):
                await anext(texts)

    run(gate, test)


def test_events_come_many_at_a_time_for_those_who_do_not_hurry(gate):
    async def test(worker):
        with worker.run([ToyRequest(900)]) as texts:
            texts.hurries = False
            sizes = [len(events) async for events in texts]
        assert sum(sizes) == 902 and len(sizes) < 10

    run(gate, test)


def test_a_text_that_fails_is_told_at_once_to_those_who_do_not_hurry(gate):
    async def test(worker):
        with worker.run([ToyRequest(10**9), ToyRequest(prompt=[8])]) as texts:
            texts.hurries = False
            events = await anext(texts)
        assert (1, "Ended") in [(number, type(event).__name__) for number, event in events] and len(events) < 50

    run(gate, test)


def test_a_mistake_in_taking_events_leaves_other_requests_alone(gate):
    async def test(worker):
        with worker.run([ToyRequest(10**9)]) as texts:
            await anext(texts)
            texts.take_at_once = lambda events: 1 / 0
            others = asyncio.create_task(read(worker, ToyRequest(100)))
            with pytest.raises(ZeroDivisionError):
                async for _ in texts:
                    pass
        assert (await others)[0].count("NewToken") == 100

    run(gate, test)


def test_at_the_end_all_texts_fail(gate):
    async def test(worker):
        first = asyncio.create_task(read(worker, ToyRequest(10**9)))
        await asyncio.sleep(0.03)
        worker.fail_all(ApiError(503, "the end"))
        for call in (lambda: first, lambda: read(worker, ToyRequest())):
            with pytest.raises(ApiError, match="the end"):
                await call()

    run(gate, test)
