"""Worker processes: results come in the order of the tasks, and a worker that fails or dies is always reported."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Self, TypeVar

from llamalet.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_PER_WORKER = 4  # in flight at a time: enough to keep all busy, few enough that memory stays flat


class Workers:
    """A pool of processes, spawned and so the same on every platform; use it in a `with` block.

    Args:
        count: number of processes; None is one per available core.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or available_cores()
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_initialize)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yield function(task) for every task, in order, taking tasks only as fast as results are used.

        Args:
            function: a function at the top level of a module.
            tasks: values that can be pickled.

        Raises:
            DataError: if a worker process died. An exception of `function` is raised here as it is.
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
                "a worker process died, perhaps out of memory (fewer --workers need less); type the command again"
            ) from None


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Delay Ctrl-C until the block ends. A process started inside never gets it: Ctrl-C is the parent's affair.

    Blocking the signal is not enough: another thread may receive it, and Python then interrupts the main thread anyway,
    perhaps between creating and starting the pool's manager thread, which leaves a pool that cannot be shut down.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
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


def _initialize() -> None:
    """Prepare a worker: it ignores Ctrl-C, which its parent handles, and ends when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent does; a worker whose parent was killed would otherwise wait for tasks forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
