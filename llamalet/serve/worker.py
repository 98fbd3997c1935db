"""The engine's thread, and the bridge from asyncio to it.

The thread takes commands from a queue, lets the engine take a step, and hands all of the step's events to the event
loop in one call. The loop sorts them by request: `Worker.run` returns what a handler iterates over. Everything but
`_Thread` runs on the event loop.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from llamalet.engine import Begun, Ended, Engine, Event, NewToken, Request
from llamalet.errors import note, one_line, place_of
from llamalet.serve.api_error import ApiError
from llamalet.serve.metrics import ServerMetrics

MAX_UNREAD = 1024
"""Events that wait for a slow reader, at most, times the texts of its request, which is then cancelled."""

RETRY_AFTER_S = 1, 30
"""What a client whose request finds the queue full is told to wait: at least, at most."""


class ClientGone(Exception):
    """The client has closed the connection, or reads too slowly."""


class QueueLimits(NamedTuple):
    """What may wait for a place in the engine: numbers of texts and of tokens, and how long, in seconds."""

    texts: int
    tokens: int
    wait_s: float


class Texts:
    """The texts of one HTTP request while they are made: iterate over it for lists of (number of the text, event).

    Use it in a `with` block: whatever ends the block cancels the texts that have not ended.

    Attributes:
        requests: what each is made from.
        sizes: tokens that each may get, its prompt's included.
        has_place: whether each has had a place in the engine.
        n_open: number of texts that have not ended.
        added: when they were put into the queue, by time.perf_counter.
        begun: when the first prompt had been read; None before.
        hurries: whether the reader wants every step's events at once, or many together until a text fails.
        take_at_once: takes a step's events while the reader waits, without waking it; returns whether it could.
        engine, ids: where the engine's thread has put them.
    """

    def __init__(self, worker: "Worker", requests: Sequence[Request], sizes: list[int]) -> None:
        self.requests, self.sizes = requests, sizes
        self.has_place = [False] * len(requests)
        self.n_open = len(requests)
        self.closed = False
        self.added = time.perf_counter()
        self.begun: float | None = None
        self.hurries = True
        self.take_at_once: Callable[[list[tuple[int, Event]]], bool] | None = None
        self.engine: Engine | None = None
        self.ids: list[int] = []
        self._worker = worker
        self._unread: list[tuple[int, Event]] = []
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[tuple[int, Event]]:
        """Return the events since the last call; wait for some if there are none.

        Raises:
            ApiError: if the texts waited too long for a place, or the server stops.
            ClientGone: if nobody reads them.
        """
        while self._error is None and not self._unread and self.n_open:
            self._reader = self._worker.loop.create_future()
            await self._reader
        if self._error is not None:
            raise self._error
        if not self._unread:
            raise StopAsyncIteration
        events, self._unread = self._unread, []
        return events

    def push(self, number: int, event: Event) -> None:
        """Take an event of one of the texts, to be delivered."""
        if not self.closed:
            self._unread.append((number, event))
            self.hurries |= type(event) is Ended and event.error is not None

    def deliver(self) -> None:
        """Let the reader have what was pushed."""
        events = self._unread
        if self.closed or not events:
            return
        if self.take_at_once is not None and self._reader is not None and self.take_at_once(events):
            self._unread = []
        elif self.hurries or not self.n_open or len(events) > MAX_UNREAD // 2:
            self._wake()
        if len(self._unread) > MAX_UNREAD * len(self.requests):
            self.fail(ClientGone())

    def fail(self, error: Exception) -> None:
        """End the iteration with an error, and the texts with the engine's next step."""
        if self._error is None:
            self._error = error
        self.close()
        self._wake()

    def close(self) -> None:
        """Cancel the texts that have not ended; their events are dropped."""
        if not self.closed:
            self.closed = True
            self._unread.clear()
            self._worker.forget(self)

    def _wake(self) -> None:
        """Let the reader continue, if it waits."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        self._reader = None


@dataclass
class _Step:
    """What happened in a step of the engine, and before it.

    added: new texts, as (the engine's number, whose, which of them).
    refused: texts that the engine did not take, with the reason.
    admitted: the engine's numbers of the texts that got a place.
    failure: what ended the engine itself, and with it all its texts.
    """

    added: list[tuple[int, Texts, int]] = field(default_factory=list)
    refused: list[tuple[Texts, int, Ended]] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    failure: Exception | None = None
    reserved_bytes: int = 0
    prefix_bytes: int = 0
    spare_bytes: int = 0


class Worker:
    """Runs an engine for the handlers of one event loop.

    Attributes:
        loop: the event loop; everything here is called on it.
        reserved_bytes, prefix_bytes, spare_bytes: the engine's, as of its last step.
        n_waiting: number of texts that have had no place.
    """

    def __init__(
        self, new_engine: Callable[[], Engine], context: int, limits: QueueLimits, metrics: ServerMetrics
    ) -> None:
        """Start the thread; there must be a running event loop.

        Args:
            new_engine: makes the engine, and another one should it fail.
            context: the model's, in tokens.
            limits: of what waits.
            metrics: counts tokens.
        """
        self.loop = asyncio.get_running_loop()
        self.reserved_bytes = self.prefix_bytes = self.spare_bytes = 0
        self.n_waiting = 0
        self._context, self._limits, self._metrics = context, limits, metrics
        self._n_waiting_tokens = 0
        self._open = dict[Texts, asyncio.TimerHandle]()  # those not closed, with their deadlines
        self._where = dict[int, tuple[Texts, int]]()  # the engine's number of a text -> whose, and which of them
        self._wait_s = 0.0  # about what the last texts waited
        self._stopped: ApiError | None = None
        self._thread = _Thread(new_engine, self)
        self._thread.start()

    @property
    def n_running(self) -> int:
        """Number of texts that have a place."""
        return sum(texts.has_place[number] for texts, number in self._where.values())

    def run(self, requests: Sequence[Request]) -> Texts:
        """Let the engine make texts; see Texts.

        Raises:
            ApiError: 503 if too much waits already, or the server stops.
        """
        if self._stopped is not None:
            raise self._stopped
        sizes = [self._size(request) for request in requests]
        n_texts, n_tokens = self.n_waiting + len(sizes), self._n_waiting_tokens + sum(sizes)
        if self.n_waiting and (n_texts > self._limits.texts or n_tokens > self._limits.tokens):
            raise self._busy(f"{self.n_waiting} texts wait already; try again later")
        self.n_waiting, self._n_waiting_tokens = n_texts, n_tokens
        texts = Texts(self, requests, sizes)
        self._open[texts] = self.loop.call_later(self._limits.wait_s, self._too_late, texts)
        self._thread.commands.put((self._thread.add, texts))
        return texts

    def forget(self, texts: Texts) -> None:
        """Let the engine cancel what has not ended of texts that nobody reads any more."""
        if (deadline := self._open.pop(texts, None)) is not None:
            deadline.cancel()
        if texts.n_open:
            self._thread.commands.put((self._thread.cancel, texts))

    def fail_all(self, error: ApiError) -> None:
        """End all texts with an error, and refuse others."""
        self._stopped = error
        for texts in list(self._open):
            texts.fail(error)

    def stop(self, seconds: float) -> None:
        """End the thread; wait this long for it."""
        self._thread.commands.put(None)
        self._thread.join(seconds)

    def publish(self, step: _Step) -> None:
        """Hand the events of a step to the requests that they belong to; the thread calls this through the loop."""
        self.reserved_bytes, self.prefix_bytes = step.reserved_bytes, step.prefix_bytes
        self.spare_bytes = step.spare_bytes
        for id, texts, number in step.added:
            self._where[id] = texts, number
        for texts, number, ended in step.refused:
            self._end(texts, number, ended)
        for id in step.admitted:
            self._admit(*self._where[id])
        n_new, touched = 0, dict.fromkeys(texts for texts, _, _ in step.refused)
        for event in step.events:
            texts, number = self._where[event.id]
            touched[texts] = None
            if type(event) is NewToken:
                n_new += 1
                texts.push(number, event)
            elif type(event) is Begun:
                self._begin(texts, number, event)
            elif type(event) is Ended:
                del self._where[event.id]
                self._end(texts, number, event)
        self._metrics.n_new_tokens += n_new
        if step.failure is not None:
            what = f"{type(step.failure).__name__}: {one_line(step.failure)} ({place_of(step.failure)})"
            note(f"the engine failed and begins anew: {what}")
            failed, self._where = self._where, {}
            for texts, number in failed.values():
                self._end(texts, number, Ended(-1, "", "error", step.failure))
                touched[texts] = None
        for texts in touched:
            try:
                texts.deliver()
            except Exception as error:  # a mistake in writing one answer is no reason to lose the others
                texts.fail(error)

    def _admit(self, texts: Texts, number: int) -> None:
        """Note that a text got a place."""
        if not any(texts.has_place):
            self._wait_s += (time.perf_counter() - texts.added - self._wait_s) / 8
            if texts in self._open:
                self._open[texts].cancel()
        self._leave_queue(texts, number)

    def _begin(self, texts: Texts, number: int, event: Begun) -> None:
        """Note that a prompt has been read."""
        if texts.begun is None:
            texts.begun = time.perf_counter()
        self._metrics.n_prompt_tokens += len(texts.requests[number].prompt)
        self._metrics.n_cached_tokens += event.n_cached
        texts.push(number, event)

    def _end(self, texts: Texts, number: int, event: Ended) -> None:
        """Note that a text has ended."""
        if not texts.has_place[number]:
            self._leave_queue(texts, number)
        self._metrics.ended[event.reason] += 1
        texts.n_open -= 1
        texts.push(number, event)

    def _leave_queue(self, texts: Texts, number: int) -> None:
        """Note that a text no longer waits."""
        texts.has_place[number] = True
        self.n_waiting -= 1
        self._n_waiting_tokens -= texts.sizes[number]

    def _too_late(self, texts: Texts) -> None:
        """End texts of which none got a place in time."""
        texts.fail(self._busy(f"no place became free in {self._limits.wait_s:g} s; try again later"))

    def _busy(self, message: str) -> ApiError:
        """Return a refusal for now, with the time after which to try again."""
        least, most = RETRY_AFTER_S
        self._metrics.n_busy += 1
        return ApiError(
            503, message, code="queue_full",
            headers={"retry-after": str(round(min(max(self._wait_s, least), most)))},
        )  # fmt: skip

    def _size(self, request: Request) -> int:
        """Return how many tokens a text may get, its prompt's included."""
        n_new = request.sampling.max_new_tokens
        return self._context if n_new is None else min(self._context, len(request.prompt) + n_new)


class _Thread(threading.Thread):
    """Owns the engine.

    Attributes:
        commands: a method, `add` or `cancel`, and the texts that it concerns; None ends the thread.
    """

    def __init__(self, new_engine: Callable[[], Engine], worker: Worker) -> None:
        super().__init__(name="engine", daemon=True)
        self.commands = queue.SimpleQueue[tuple[Callable[[Texts, _Step], None], Texts] | None]()
        self._new_engine, self._worker = new_engine, worker
        self._engine: Engine | None = None

    def run(self) -> None:
        """Take commands and steps until told to end."""
        while True:
            step = _Step()
            try:
                if not self._take_commands(step):
                    return
                if self._engine is not None:
                    step.events, step.admitted = self._engine.step(), self._engine.admitted
                    step.reserved_bytes, step.prefix_bytes = self._engine.reserved_bytes, self._engine.prefix.n_bytes
                    step.spare_bytes = self._engine.spare_bytes
            except Exception as error:  # a mistake in the engine, or no memory: the server goes on with another engine
                step.failure, self._engine = error, None
            try:
                self._worker.loop.call_soon_threadsafe(self._worker.publish, step)
            except RuntimeError:  # the loop has ended
                return

    def _take_commands(self, step: _Step) -> bool:
        """Take the commands that have come, at least one if there is nothing else to do; return whether to go on."""
        waits = self._engine is None or not self._engine.busy
        while True:
            try:
                command = self.commands.get(waits)
            except queue.Empty:
                return True
            if command is None:
                return False
            waits = False
            do, texts = command
            do(texts, step)

    def add(self, texts: Texts, step: _Step) -> None:
        """Let the engine make texts, unless nobody wants them any more."""
        for number, request in enumerate(texts.requests):
            if texts.closed:
                step.refused.append((texts, number, Ended(-1, "", "cancelled", None)))
                continue
            try:
                if self._engine is None:
                    self._engine = self._new_engine()
                texts.engine = self._engine
                id = self._engine.add(request, texts)
            except Exception as error:  # the engine does not take this text, which is no reason to lose the others
                step.refused.append((texts, number, Ended(-1, "", "error", error)))
                continue
            texts.ids.append(id)
            step.added.append((id, texts, number))

    def cancel(self, texts: Texts, step: _Step) -> None:
        """Let the engine end texts, unless it is another engine than theirs, which failed."""
        if self._engine is not None and texts.engine is self._engine:
            for id in texts.ids:
                self._engine.cancel(id)
