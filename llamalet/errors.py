"""The errors that users can cause, their exit codes, and the function that reports them in one line.

A message says what is wrong, where, which value, and what to do. Only `run` turns an error into a message and an exit
code; all other code raises, argparse included (`Parser`).
"""

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LlamaletError(Exception):
    """Base class of all errors that a user can cause."""

    exit_code = 1


class UsageError(LlamaletError):
    """A command line that cannot be understood."""

    exit_code = 2


class ConfigError(LlamaletError, ValueError):
    """A configuration with an unknown key or a bad value."""

    exit_code = 2

    @classmethod
    def raise_for(cls, problems: Sequence[str]) -> None:
        """Raise one error with all `problems`, if there are any, so that the user can fix them together."""
        if problems:
            raise cls("; ".join(problems))


class DataError(LlamaletError, ValueError):
    """Training or evaluation data that is missing, damaged or made with another vocabulary."""

    exit_code = 3


class FormatError(LlamaletError, ValueError):
    """A model file that violates its format."""

    exit_code = 4


class TokenizerError(LlamaletError, ValueError):
    """A tokenizer file that is damaged or does not match the model."""

    exit_code = 4


class CheckpointError(LlamaletError, ValueError):
    """A training checkpoint that is missing, damaged or from another run."""

    exit_code = 5


class NonFiniteError(LlamaletError, ArithmeticError):
    """A loss, weight or logit that is NaN or infinite."""

    exit_code = 6


class LockedError(LlamaletError):
    """A run's folder that another process is using."""

    exit_code = 7


class DiskError(LlamaletError, OSError):
    """A file that could not be written."""

    exit_code = 8


def not_positive(config: object, *names: str) -> list[str]:
    """Return a problem for each of the named fields that is not above 0; None is allowed."""
    values = {name: getattr(config, name) for name in names}
    return [f"{name}={n}: must be positive" for name, n in values.items() if n is not None and not n > 0]


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
    try:
        code = main(sys.argv[1:])
        print(end="", flush=True)  # unlike sys.stdout.flush(), this works with stdout closed
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # during Python's clean-up it would change the exit code
    except LlamaletError as error:
        code = _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _fail("stopped by Ctrl-C", 130)
    except BrokenPipeError:  # the reader (head, less) has gone
        forget_stdout()
        code = 141
    except MemoryError:
        code = _fail("out of memory; use a smaller model, batch or context", 1)
    except OSError as error:
        where, full = f"{error.filename}: " if error.filename else "", error.errno in DISK_FULL
        if full and not where:  # an error on another file would have its name
            where = "stdout: "
            forget_stdout()
        code = _fail(f"{where}{error.strerror or error}", DiskError.exit_code if full else 1)
    sys.exit(code)


def forget_stdout() -> None:
    """Discard buffered output, or Python would fail once more when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    """Print `message` as one line and return `code`."""
    if sys.stderr is not None:  # print(file=None) would go to stdout
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code
