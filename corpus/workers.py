"""Worker processes: results come in the order of the tasks, and a worker that fails or dies is never overlooked."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Self, TypeVar

from llamalet.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_PER_WORKER = 4  # under way at a time: enough that none waits for work, few enough that memory stays flat


class Workers:
    """A pool of processes, started by spawn and so the same on every platform; use it in a `with` block.

    Args:
        count: how many processes; one per available core when None.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or available_cores()
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yield function(task) for every task, in order, taking tasks only as fast as results are used.

        Args:
            function: a function at the top level of a module.
            tasks: what pickle can carry.

        Raises:
            DataError: if a worker process died. What `function` raises is raised here.
        """
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                with _interrupts_held_back():  # submit may start a worker
                    waiting.append(self._pool.submit(function, task))
                if len(waiting) >= TASKS_PER_WORKER * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process died, perhaps for want of memory (fewer --workers need less); type the command again"
            ) from None


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends. A process started within holds it back for good: it is the parent's.

    Blocking the signal is not enough: another thread may take it, and Python then interrupts the main one all the same,
    perhaps between making the pool's manager thread and starting it, which leaves a pool that cannot be shut down.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set, none interrupts
        yield
        return
    held_back: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: held_back.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if held_back:
            signal.raise_signal(signal.SIGINT)


def _begin() -> None:
    """Prepare a worker: it leaves Ctrl-C to its parent, and has no more work when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Wait for the parent's end; without this a worker whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
