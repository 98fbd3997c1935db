"""One base error, a few kinds, their exit codes, and the function that turns them into one line.

Whatever a user can get wrong raises one of these with what, where, which value and what to do.
Only `run` turns an error into a message and an exit status; everything below it just raises, `Parser` for argparse.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, Self

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LlamaletError(Exception):
    """Base of all errors that a user can cause."""

    exit_code = 1


class UsageError(LlamaletError):
    """A command line that cannot be understood."""

    exit_code = 2


class ConfigError(LlamaletError, ValueError):
    """A configuration whose keys or values do not fit."""

    exit_code = 2

    @classmethod
    def from_problems(cls, problems: Iterable[str]) -> Self:
        """Put all `problems` into one error, so that the user fixes them in one go."""
        return cls("; ".join(problems))


class DataError(LlamaletError, ValueError):
    """Training or evaluation data that is missing, damaged or of another vocabulary."""

    exit_code = 3


class FormatError(LlamaletError, ValueError):
    """A model file that breaks a rule of its format."""

    exit_code = 4


class TokenizerError(LlamaletError, ValueError):
    """A tokenizer file that is damaged or does not fit the model."""

    exit_code = 4


class CheckpointError(LlamaletError, ValueError):
    """A training checkpoint that is missing, damaged or of another run."""

    exit_code = 5


class NonFiniteError(LlamaletError, ArithmeticError):
    """A loss, weight or logit that is NaN or infinite."""

    exit_code = 6


class LockedError(LlamaletError):
    """A run's folder that another process is writing into."""

    exit_code = 7


class DiskError(LlamaletError, OSError):
    """A file that could not be written."""

    exit_code = 8


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as what is wrong with the command line."""
        raise UsageError(f"{message}; see --help")


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main` on the command line and exit; an error becomes one line on stderr, never a traceback.

    Args:
        main: takes the arguments without the program's name and returns the exit code.
    """
    try:
        code = main(sys.argv[1:])
        print(end="", flush=True)  # unlike sys.stdout.flush(), this may be done where stdout is closed
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # all is done: while Python tidies up, it would spoil the exit code
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
        if full and not where:  # whoever writes to a file names it
            where = "stdout: "
            forget_stdout()
        code = _fail(f"{where}{error.strerror or error}", DiskError.exit_code if full else 1)
    sys.exit(code)


def forget_stdout() -> None:
    """Send what stdout still holds nowhere, or Python would complain once more when it closes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    """Print `message` as one line and return `code`."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code
