"""SIGTERM and Ctrl-C as a wish to stop, which a run grants as soon as its state is whole.

Needs the standard library alone: it is in place before torch is imported, which takes seconds.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_CODE = 75
"""Interrupted and resumable: EX_TEMPFAIL of sysexits.h."""

ECHO_S, TORCHRUN_ECHO_S = 0.1, 2.0
"""A signal so soon after the first is the same one: timeout(1) sends its own twice, and what a whole job is sent,
torchrun passes on to processes that have had it already."""

_END = b"\0"
"""No signal has this number."""


class Interrupted(BaseException):
    """A signal ends what is going on; no Exception, so that no handler of errors takes it for one."""


class Interrupts:
    """Takes SIGTERM and SIGINT while it is entered; a second one ends the process at once.

    Attributes:
        requested: whether a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._raises = False
        self._previous: dict[signal.Signals, Any] = {}
        self._told: int | None = None
        self._listener = threading.Thread()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other can set handlers
            hears, self._told = os.pipe()
            os.set_blocking(self._told, False)
            signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
            self._listener = threading.Thread(target=_end_at_second, args=(hears,), daemon=True)
            self._listener.start()
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._told is not None:
            signal.set_wakeup_fd(-1)
            os.write(self._told, _END)  # closing it would not do: a process that was forked may hold it too
            self._listener.join()
            os.close(self._told)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise Interrupted within the block, where nothing can be lost; one that came before too."""
        self._raises = True
        try:
            self.check()
            yield
            self.check()  # what was raised in a destructor or a callback, Python has dropped
        except Exception:
            self.check()  # a signal to a whole process group ends the compiler's processes too, and so fails the block
            raise
        finally:
            self._raises = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Note a signal."""
        self.requested = True
        if self._raises:
            raise Interrupted


def _end_at_second(hears: int) -> None:
    """Read signals from the descriptor as they come, and end the process at the second.

    Not in their handler: Python calls that between two instructions, and so not while it waits for another process.
    """
    came_at = None
    echo_s = TORCHRUN_ECHO_S if "TORCHELASTIC_RUN_ID" in os.environ else ECHO_S
    while (number := os.read(hears, 1)) != _END:
        if number[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        if came_at is None:
            came_at = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                with suppress(OSError):  # whoever read stderr may have gone
                    os.write(2, b"\nstopping as soon as the state is saved; once more stops at once, without saving\n")
        elif time.monotonic() - came_at > echo_s:
            os._exit(128 + number[0])
    os.close(hears)
