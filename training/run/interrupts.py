"""SIGTERM and Ctrl-C as requests to stop, which a run obeys as soon as it can save its state.

Uses only the standard library: the handlers are set before torch is imported, which takes seconds.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_CODE = 75
"""Interrupted and resumable: EX_TEMPFAIL of sysexits.h."""

ECHO_S, TORCHRUN_ECHO_S = 0.1, 2.0
"""A signal this soon after the first is a duplicate: timeout(1) sends two, and torchrun forwards ones that the process
has already received."""

REPEAT_S = 0.05
"""After so long an Interrupted is raised again that Python dropped."""

_END = b"\0"
"""Ends the listener; no signal has this number."""


class Interrupted(BaseException):
    """A signal interrupts the current work; not an Exception, so that no error handler catches it."""


class Interrupts:
    """Handles SIGTERM and SIGINT inside its block; a second signal ends the process at once.

    Attributes:
        requested: whether a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._raises = False
        self._previous: dict[signal.Signals, Any] = {}
        self._writer: int | None = None
        self._listener = threading.Thread()
        self._hook = sys.unraisablehook

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only this thread can set handlers
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._listener = threading.Thread(target=_end_at_second, args=(reader,), daemon=True)
            self._listener.start()
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
            if hasattr(signal, "setitimer"):
                self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._receive)
                self._hook, sys.unraisablehook = sys.unraisablehook, self._repeat
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if hasattr(signal, "setitimer") and self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = self._hook
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._writer is not None:
            signal.set_wakeup_fd(-1)
            os.write(self._writer, _END)  # closing it is not enough: a forked process may hold it too
            self._listener.join()
            os.close(self._writer)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal, even an earlier one, raise Interrupted at any point of the block, where nothing can be lost."""
        self._raises = True
        try:
            self.check()
            yield
            self.check()  # Python drops exceptions raised in destructors and callbacks
        except Exception:
            self.check()  # a signal to the process group ends the compiler's processes too, which raises other errors
            raise
        finally:
            self._raises = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Record a signal."""
        self.requested = True
        if self._raises:
            raise Interrupted

    def _repeat(self, dropped: Any) -> None:
        """Repeat an Interrupted that Python dropped, because it came in a destructor or a callback, as of a compiler.

        Args:
            dropped: what sys.unraisablehook gets.
        """
        if issubclass(dropped.exc_type, Interrupted):
            signal.setitimer(signal.ITIMER_REAL, REPEAT_S)  # a real signal would count as a second one
        else:
            self._hook(dropped)


def _end_at_second(reader: int) -> None:
    """Read signals from the descriptor as they arrive, and end the process at the second.

    A signal handler could not: Python runs it between two instructions, so not while it waits for another process.
    """
    came_at = None
    echo_s = TORCHRUN_ECHO_S if "TORCHELASTIC_RUN_ID" in os.environ else ECHO_S
    while (number := os.read(reader, 1)) != _END:
        if number[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        if came_at is None:
            came_at = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                with suppress(OSError):  # stderr may be closed
                    os.write(
                        2, b"\nstopping as soon as the state is saved; a second signal stops at once, without saving\n"
                    )
        elif time.monotonic() - came_at > echo_s:
            os._exit(128 + number[0])
    os.close(reader)
