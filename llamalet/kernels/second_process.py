"""A process that compiles some kernels while this one compiles others, so that a first start takes two cores.

LLVM compiles one function at a time in a process, whatever the number of threads. So `shared.py` sends the kernels that
others call by name to a second process. It puts them into the kernel cache, where this one finds them. If there is no
such process, or it fails in any way, this one compiles them itself.
"""

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamalet.cores import physical_cores

BOOT = "import sys; sys.path[:] = sys.argv[1:]; from llamalet.kernels.shared import serve; serve()"
DONE = b"."

Request = tuple[str, str, tuple[Any, ...]]
"""A kernel: its module, its name, and numba's types of its arguments."""


class SecondProcess:
    """The second process: started by the first request, ended with the block `while_compiling`."""

    def __init__(self) -> None:
        self._wanted = False
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: list[Request] = []

    @contextlib.contextmanager
    def while_compiling(self) -> Iterator[None]:
        """Let requests in this block start the process, if there is a second core; end it after the block."""
        self._wanted = bool(sys.executable) and physical_cores() > 1
        try:
            yield
        finally:
            self._wanted = False
            self._end()

    def ask(self, request: Request) -> None:
        """Ask for a kernel."""
        if not self._wanted or request in self._asked:
            return
        try:
            if self._process is None:
                paths = [str(Path(__file__).parents[2]), *sys.path]
                self._process = subprocess.Popen(
                    [sys.executable, "-c", BOOT, *paths],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            assert self._process.stdin is not None
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            self._asked.append(request)
        except OSError:
            self._end()

    def wait_for(self, request: Request) -> None:
        """Wait until a kernel that was asked for is in the cache, or the process has ended."""
        while request in self._asked and self._process is not None:
            assert self._process.stdout is not None
            if self._process.stdout.read(len(DONE)) != DONE:
                self._end()
                return
            self._asked.pop(0)

    def _end(self) -> None:
        """End the process."""
        process, self._process, self._asked = self._process, None, []
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError), process:  # closes the pipes, and waits for the end
                pass
