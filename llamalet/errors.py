"""The errors that users can cause, their exit codes, and how a line is printed on stderr.

A message says what is wrong, where, which value, and what to do.
"""

import contextlib
import errno
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

MAX_END = 1000  # characters of a message's beginning and of its end
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LlamaletError(Exception):
    """Base class of all errors that a user can cause."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message; of a very long one, which repeats a file's own text, both ends."""
        text = super().__str__()
        return text if len(text) <= 2 * MAX_END else f"{text[:MAX_END]} ... {text[-MAX_END:]}"


class UsageError(LlamaletError):
    """A command line that cannot be understood."""

    exit_code = 2


class OutOfMemoryError(UsageError):
    """A text that needs more memory than is free."""


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


def note(message: str, end: str = "\n") -> None:
    """Print a line on stderr that is not part of the result; a stderr that takes nothing stops no work."""
    if sys.stderr is not None:  # print(file=None) would go to stdout
        with contextlib.suppress(OSError, ValueError):
            print(message, end=end, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def place_of(error: BaseException) -> str:
    """Return where an error that was caught was raised, as FILE:LINE, without the file's folder."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def fail(message: str, code: int) -> int:
    """Print `message` as one line, without a terminal's control characters, and return `code`."""
    words = " ".join(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", message).split())
    note("error: " + re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], words))
    return code
