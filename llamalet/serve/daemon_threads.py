"""Threads for what would hold up the event loop. The process may end while they work: nobody waits for them."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from llamalet.serve.api_error import ApiError

Result = TypeVar("Result")

INLINE_BYTES = 1 << 13
"""A body up to this size is read on the event loop: most take less than a millisecond, one for 256 texts 20 to 40.
Larger ones are read in a thread, and so are conversations, whose templates may take seconds."""


class DaemonThreads:
    """A few threads that call functions, in the order in which they come.

    Python's ThreadPoolExecutor takes any number of them, and is waited for at the end of the process.
    """

    def __init__(self, name: str, number: int, most: int) -> None:
        """Start with nothing to do.

        Args:
            name: what the threads are called.
            number: of threads.
            most: how many calls may wait or go on at once.
        """
        self._name, self._number, self._most = name, number, most
        self._calls = queue.SimpleQueue[tuple[list[Callable[[], Any]], asyncio.Future[Any]]]()
        self._started = False
        self._n_calls = 0

    async def call(self, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Return what a function returns, or raise what it raises. If this is cancelled first, it is not called.

        Raises:
            ApiError: 503, if too many calls wait.
        """
        if self._n_calls >= self._most:
            message = f"{self._n_calls} requests wait to be read already; try again later"
            raise ApiError(503, message, code="queue_full", headers={"retry-after": "1"})
        if not self._started:
            self._started = True
            for _ in range(self._number):
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
        call: list[Callable[[], Any]] = [partial(function, *arguments, **options)]
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._calls.put((call, result))
        self._n_calls += 1
        try:
            return await result
        finally:
            self._n_calls -= 1
            call.clear()

    def _work(self) -> None:
        """Call the functions that come."""
        while True:
            _do(*self._calls.get())  # in a function of its own, so that nothing of it is kept until the next call


def _do(call: list[Callable[[], Any]], result: asyncio.Future[Any]) -> None:
    """Call a function, unless nobody waits for it any more and it has been taken out of its list."""
    for function in call.copy():
        try:
            end = partial(_end, result, function(), None)
        except Exception as error:
            end = partial(_end, result, None, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            result.get_loop().call_soon_threadsafe(end)


def _end(result: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    """Hand a result or an error to who waits for it, on the event loop."""
    if result.cancelled():
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)
