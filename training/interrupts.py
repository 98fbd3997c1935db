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


class Interrupted(BaseException):
    """A signal ends what is going on; no Exception, so that no handler of errors takes it for one."""


class Interrupts:
    """Takes SIGTERM and SIGINT while it is entered; a second one ends the process at once.

    Attributes:
        requested: whether a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._came_at = 0.0
        self._raises = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other can set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

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
        """Note a signal, or end the process if it is the second."""
        now = time.monotonic()
        if self.requested:
            echo_s = TORCHRUN_ECHO_S if "TORCHELASTIC_RUN_ID" in os.environ else ECHO_S
            if now - self._came_at > echo_s:
                os._exit(128 + number)
            return
        self.requested, self._came_at = True, now
        if os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come in the middle of one. And whoever read stderr may have gone.
            with suppress(OSError):
                os.write(2, b"\nstopping as soon as the state is saved; once more stops at once, without saving\n")
        if self._raises:
            raise Interrupted
