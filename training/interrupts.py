"""SIGTERM and Ctrl-C as a wish to stop, which a run grants as soon as its state is whole.

Needs the standard library alone: it is in place before torch is imported, which takes seconds.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_CODE = 75
"""Interrupted and resumable: EX_TEMPFAIL of sysexits.h."""

ECHO_S = 2.0
"""torchrun passes a signal on to processes that have had it already; what comes within this time is the same one."""


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
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._raises = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, or end the process if it is the second."""
        now = time.monotonic()
        if self.requested:
            if "TORCHELASTIC_RUN_ID" not in os.environ or now - self._came_at > ECHO_S:
                os._exit(128 + number)
            return
        self.requested, self._came_at = True, now
        if os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping as soon as the state is saved; once more stops at once, without saving\n")
        if self._raises:
            raise Interrupted
