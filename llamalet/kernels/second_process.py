"""A process that compiles some kernels while this one compiles others, so that a first start takes two cores.

Numba compiles one function at a time in a process, whatever the number of threads. So `shared.py` sends the kernels
that others call by name to a second process. It puts them into the kernel cache, where this one finds them. If there is
no such process, or it fails or does not answer in time, this one compiles them itself.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llamalet.cores import physical_cores

BOOT = "import sys; sys.path[:] = sys.argv[1:]; from llamalet.kernels.shared import serve; serve()"
DONE = b"."

MARK = "LLAMALET_SECOND_PROCESS"
"""Set in its environment, so that it never starts another, whatever program `sys.executable` is."""

LIMIT_S = 60.0
"""The process is ended after this time; it needs a few seconds."""

Request = tuple[str, str, tuple[Any, ...]]
"""A kernel: its module, its name, and numba's types of its arguments."""


class SecondProcess:
    """The second process: started by the first request, ended with the block `while_compiling`.

    It belongs to the thread in that block; to other threads it does not exist.
    """

    def __init__(self) -> None:
        self._owner: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: list[Request] = []
        self._meanwhile: Callable[[], None] | None = None

    @contextlib.contextmanager
    def while_compiling(
        self, *, can_share: bool = True, at_once: bool = False, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Let requests in this block start the process, if there is a second core; end it after the block.

        Args:
            can_share: whether there is a cache folder through which it can hand over what it compiles.
            at_once: whether requests are certain, so that it may start now; it takes half a second.
            meanwhile: what to do when this process would have to wait for it for the first time, which may not come.
        """
        is_python = bool(sys.executable) and not getattr(sys, "frozen", False) and MARK not in os.environ
        if self._owner is not None or not can_share or not is_python or physical_cores() == 1:
            yield
            return
        self._owner, self._meanwhile = threading.get_ident(), meanwhile
        try:
            if at_once:
                with contextlib.suppress(OSError):  # the first request tries again
                    self._process = self._start()
            yield
        finally:
            self._end()

    def ask(self, request: Request) -> None:
        """Ask for a kernel."""
        if self._owner != threading.get_ident() or request in self._asked:
            return
        try:
            if self._process is None:
                self._process = self._start()
            assert self._process.stdin is not None
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            self._asked.append(request)
        except OSError:
            self._end()

    def wait_for(self, request: Request) -> None:
        """Wait until a kernel that was asked for is in the cache, or the process has ended."""
        while self._owner == threading.get_ident() and request in self._asked and self._process is not None:
            if self._meanwhile is not None:
                meanwhile, self._meanwhile = self._meanwhile, None
                meanwhile()
            assert self._process is not None and self._process.stdout is not None
            if self._process.stdout.read(len(DONE)) != DONE:
                self._end()
                return
            self._asked.pop(0)

    def _start(self) -> "subprocess.Popen[bytes]":
        """Start the process, and what ends it if it does not answer."""
        paths = [*sys.path, str(Path(__file__).parents[2])]
        process = subprocess.Popen(
            [sys.executable, "-c", BOOT, *paths],
            env=os.environ | {MARK: "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._timer = threading.Timer(LIMIT_S, process.kill)
        self._timer.daemon = True
        self._timer.start()
        return process

    def _end(self) -> None:
        """End the process; no other is started in this block."""
        process, self._process, self._asked, self._owner = self._process, None, [], None
        if process is not None:
            self._timer.cancel()
            process.kill()
            with contextlib.suppress(OSError), process:  # closes the pipes, and waits for the end
                pass


def requests(stream: BinaryIO) -> Iterator[Request]:
    """Yield what the process that started this one asks for; nobody else has the other end of this pipe."""
    with contextlib.suppress(EOFError):
        while True:
            yield pickle.load(stream)
