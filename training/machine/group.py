"""What the training loop needs of the processes of a run, and the run of one process. Needs no torch."""

from collections.abc import Sequence
from typing import Protocol

from training.run.progress import say


class Group(Protocol):
    """This process among the processes of a run; distributed.Processes is one. Every process must call each method."""

    @property
    def rank(self) -> int:
        """The process's number."""

    @property
    def count(self) -> int:
        """Number of processes."""

    @property
    def local_count(self) -> int:
        """Number of processes on this machine."""

    @property
    def launch(self) -> str | None:
        """Name of the torchrun command; None without torchrun."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""

    def print(self, line: str) -> None:
        """Print a line, once for all processes."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values` over all processes."""

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process."""

    def all_gather(self, text: str) -> list[str]:
        """Return the `text` of every process by rank."""

    def barrier(self) -> None:
        """Return once every process has called this."""


class OneProcess:
    """A run of one process."""

    rank, count, local_count, launch, is_main = 0, 1, 1, None, True

    def print(self, line: str) -> None:
        """Print a line."""
        say(line)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the values."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def all_gather(self, text: str) -> list[str]:
        """Return the text alone."""
        return [text]

    def barrier(self) -> None:
        """Return at once."""
