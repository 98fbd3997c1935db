"""What a command does before its other imports, which may take seconds: Ctrl-C, streams, the locale, missing packages.

Imports only what Python has already loaded: until `begin` has run, Python answers Ctrl-C with a traceback. So scripts
block the signal in their first lines; this module and its package take a millisecond or two to import.
"""

import _signal  # the part of `signal` that is written in C; the rest of it takes a millisecond to import
import os
import sys

TYPE_CHECKING = False  # as in __init__.py
if TYPE_CHECKING:
    from types import TracebackType

INTERRUPTED = 130  # exit code after Ctrl-C
MISSING = 2  # exit code without a package, UsageError's


def begin() -> None:
    """Prepare the process of a command. A script calls this above its other imports, and only as the main program."""
    if (
        _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler
    ):  # a shell lets jobs in the background ignore it
        _signal.signal(_signal.SIGINT, end_at_once)
    if hasattr(_signal, "pthread_sigmask"):  # scripts let the signal wait from their first line on
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGINT])
    _open_missing_streams()
    _use_utf8()
    sys.excepthook = _end_for_missing


def end_at_once(number: int, frame: object) -> None:
    """End the process at Ctrl-C: a signal handler for while nothing can be lost.

    An exception would not do there. It can come out of an import as another one, or get lost in a callback.
    """
    try:
        os.write(2, b"error: stopped by Ctrl-C\n")
    finally:
        os._exit(INTERRUPTED)


def missing_package(error: BaseException) -> str | None:
    """Return a line about a package that is not installed; None for any other error."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    package = (name or "").partition(".")[0]
    if not package or package in sys.stdlib_module_names or sys.modules.get(package) is not None:
        return None
    return f"needs the package {package}: pip install {package}, or in a checkout everything: pip install -e '.[train]'"


def _end_for_missing(kind: type[BaseException], error: BaseException, trace: "TracebackType | None") -> None:
    """Print what ended the program, a missing package in one line: a handler for errors in a command's imports."""
    if (line := missing_package(error)) is None:
        sys.__excepthook__(kind, error, trace)
        return
    os.write(2, f"error: {line}\n".encode())
    os._exit(MISSING)


def _open_missing_streams() -> None:
    """Let standard streams that are closed read and write /dev/null.

    The next file to be opened would get their numbers, and messages of C libraries would be written into it. sys.stdin
    remains None, which says that there is nothing to read.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None and os.name == "posix":
            null = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            os.set_inheritable(null, True)
            if number and null == number:
                setattr(sys, name, open(null, "w", encoding="utf-8", closefd=False))


def _use_utf8() -> None:
    """Start Python again in its UTF-8 mode if the locale is C and Python was told to believe that.

    Arguments, names of files and output would be ASCII only.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1" and sys.executable:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
