"""Run a command: its argument parser, Ctrl-C, and its end in one line and an exit code.

Only `run` turns an error into a message and an exit code; all other code raises, argparse included (`Parser`). Ctrl-C
first ends the process at once (startup.py), in `run` it raises KeyboardInterrupt, and inside `nothing_to_lose` it ends
the process at once again. A training run sets handlers of its own (training/run/interrupts.py).
"""

import _thread
import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, TextIO

from llamalet import startup
from llamalet.errors import DISK_FULL, DiskError, LlamaletError, UsageError, fail


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError with this message."""
        raise UsageError(f"{message}; see --help")


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main` on the command line and exit; an error prints one line on stderr, never a traceback.

    Args:
        main: takes the arguments, without the program's name, and returns the exit code.
    """
    for standard in (sys.stdout, sys.stderr):
        if isinstance(standard, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a pipe in the place of a file cannot be asked for its position
                standard.reconfigure(errors="backslashreplace")  # a file's name may not fit the terminal's encoding
    ctrl_c = CtrlC()
    try:
        if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, startup.end_at_once):
            signal.signal(signal.SIGINT, ctrl_c)
            sys.unraisablehook = ctrl_c.again
        try:
            code = main(sys.argv[1:])
        except SystemExit as ended:  # --help
            code = ended.code  # type: ignore[assignment]
        print(end="", flush=True)  # unlike sys.stdout.flush(), this works with stdout closed
        _ignore_signals()
    except BaseException as error:
        _ignore_signals()
        code = _report(KeyboardInterrupt() if ctrl_c.came else error)
        try:
            print(end="", flush=True)
        except (OSError, ValueError):
            forget_output(sys.stdout)
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):  # it may be on a full disk; its lines stop nothing, see errors.note
        forget_output(sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def nothing_to_lose() -> Iterator[None]:
    """Let Ctrl-C end a command at once inside the block, in which it imports, compiles and reads, and does no more.

    `startup.end_at_once` says why. Outside of `run` this does nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not isinstance(handler, CtrlC) or threading.current_thread() is not threading.main_thread():
        yield
        return
    print(end="", flush=True)
    signal.signal(signal.SIGINT, startup.end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


class CtrlC:
    """The signal handler of `run`: raises KeyboardInterrupt, and remembers that it did.

    Libraries turn that exception into others (an ImportError, a SystemError), so whatever follows it counts as Ctrl-C.
    """

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self.came = True
        raise KeyboardInterrupt

    def again(self, dropped: Any) -> None:
        """Repeat a KeyboardInterrupt that Python dropped, because it came in a destructor or a callback.

        Args:
            dropped: what sys.unraisablehook gets.
        """
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _interrupt_main_thread).start()  # once the callback has returned
        else:
            sys.__unraisablehook__(dropped)


def _interrupt_main_thread() -> None:
    """Send Ctrl-C's signal to the main thread, as if it were pressed."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)  # also ends a system call
    else:
        _thread.interrupt_main()


def forget_output(stream: TextIO) -> None:
    """Discard what a standard stream has buffered, or Python would fail once more when it flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _ignore_signals() -> None:
    """Ignore Ctrl-C and SIGTERM from now on: during Python's clean-up they would change the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _report(error: BaseException) -> int:
    """Print an error as one line and return the exit code; raise it again if no user can have caused it."""
    if isinstance(error, KeyboardInterrupt):
        return fail("stopped by Ctrl-C", startup.INTERRUPTED)
    if isinstance(error, LlamaletError):
        return fail(str(error), error.exit_code)
    if line := startup.missing_package(error):
        return fail(line, startup.MISSING)
    if isinstance(error, BrokenPipeError):  # the reader (head, less) has gone
        forget_output(sys.stdout)
        return 141
    if isinstance(error, MemoryError):
        return fail("out of memory; use a smaller model, batch or context", 1)
    if isinstance(error, OSError):
        where, full = f"{error.filename}: " if error.filename else "", error.errno in DISK_FULL
        if full and not where:  # an error on another file would have its name
            where = "stdout: "
            forget_output(sys.stdout)
        return fail(f"{where}{error.strerror or error}", DiskError.exit_code if full else 1)
    raise error
