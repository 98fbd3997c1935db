"""The record of a run: metrics.jsonl, and wandb if it is enabled.

Nothing here stops a run: a failed write costs one line on stderr, and without a connection wandb works offline.
"""

import contextlib
import io
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llamalet import strict
from llamalet.errors import DataError, note, one_line
from llamalet.files import check_regular, read_file, replacing

METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = "metrics.damaged.jsonl"
WANDB_ID_FILE = "wandb/id"
MAX_BYTES = 1 << 26  # of metrics.jsonl: 400,000 lines
LARGEST = 3.5e38
"""Largest number in a record: all come from float32. Plots, which use float64, never overflow on such numbers."""

Row = Mapping[str, Any]


class Metrics:
    """The record of a run; rows go to metrics.jsonl at once, and to wandb if it is enabled.

    Each row gets `elapsed_s`: the seconds that the run has been running, evaluation and saving included, the time
    between an interruption and a resume excluded.

    Args:
        run_dir: the run's out_dir.
        resumed_at: the step that the run resumes after, and whether its evaluation is done; later rows are dropped,
            for they will be written again. None starts a new record.
        wandb: keyword arguments of wandb.init, or None for no wandb.
    """

    def __init__(
        self, run_dir: Path, *, resumed_at: tuple[int, bool] | None = None, wandb: Mapping[str, Any] | None = None
    ) -> None:
        self.path = run_dir / METRICS_FILE
        self._began = time.monotonic()
        self._unwritten = b""
        self._warned = False
        try:
            rows = [] if resumed_at is None else _salvage(self.path)
            with replacing(self.path) as file:
                kept = [row for row in rows if (row["step"], "val_loss" in row) <= (resumed_at or (0, False))]
                file.write(b"".join(map(_line, kept)))
            # The time of dropped rows counts: it was spent.
            self._began -= max((row.get("elapsed_s") or 0.0 for row in rows), default=0.0)
        except (OSError, DataError) as error:
            self._warn(error)
        self._wandb = _start_wandb(wandb, run_dir, resumed_at is not None) if wandb is not None else None

    def log(self, row: Row) -> None:
        """Append a row, which needs `step`; numbers that are not finite become null."""
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        row["elapsed_s"] = round(time.monotonic() - self._began, 3)
        self._unwritten += _line(row)
        try:
            check_regular(self.path)
            # Opened for each row and unbuffered: what a full disk refuses is written with a later row.
            with self.path.open("ab", buffering=0) as file:
                while self._unwritten:
                    self._unwritten = self._unwritten[file.write(self._unwritten) :]
        except OSError as error:
            self._warn(error)
        self._to_wandb(row, row["step"])

    def log_story(self, step: int, text: str) -> None:
        """Log a sample of the model after a step to wandb."""
        self._to_wandb({"story": text}, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=0 if kind is None else 1)
            except Exception as failure:
                note(f"warning: wandb: {one_line(failure)}")

    def _to_wandb(self, row: Row, step: int) -> None:
        """Log a row to wandb, until the first failure."""
        if self._wandb is not None:
            try:
                self._wandb.log(dict(row), step=step)
            except Exception as error:  # wandb's errors have no common base class
                note(f"warning: wandb stopped: {one_line(error)}")
                self._wandb = None

    def _warn(self, error: Exception) -> None:
        """Warn, once, that rows are missing."""
        if not self._warned:
            reason = getattr(error, "strerror", None) or one_line(error)
            note(f"warning: {self.path} is incomplete: {reason}; training continues")
        self._warned = True


def read(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl: rows of numbers and None. An incomplete last line is ignored; a missing file has no rows.

    Raises:
        DataError: if the file cannot be read, or another line is damaged.
    """
    rows, damage = _parse(path)
    for number, what in damage.items():
        raise DataError(f"{path}: line {number} is damaged: {what}; remove it")
    return rows


def _parse(path: Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Return the valid rows of metrics.jsonl and the damage by line number; an incomplete last line is ignored."""
    if not path.exists():
        return [], {}
    rows, damage = [], {}
    lines = strict.read_bytes(path, DataError, "no such file", MAX_BYTES).splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(line))
        except DataError as error:
            if line.endswith(b"\n"):
                damage[number] = str(error)
    return rows, damage


def _row(line: bytes) -> dict[str, Any]:
    """Parse a line of metrics.jsonl.

    Raises:
        DataError: if `Metrics.log` cannot have written it.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError("not JSON") from None
    if not isinstance(row, dict) or "step" not in row:
        raise DataError("not a row with a step")
    for key, value in row.items():
        kinds = int if key == "step" else int | float
        number = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= LARGEST
        if not number and (value is not None or key == "step"):
            raise DataError(f"{json.dumps({key: value})[1:-1]:.80} is not a number that a run records")
    return row


def _salvage(path: Path) -> list[dict[str, Any]]:
    """Return the valid rows of a run to resume; if there is damage, first move the whole file to DAMAGED_FILE."""
    rows, damage = _parse(path)
    if damage:
        backup = path.replace(path.with_name(DAMAGED_FILE))
        number, what = next(iter(damage.items()))
        lines = f"line {number} damaged" if len(damage) == 1 else f"{len(damage)} lines damaged, the first is {number}"
        note(f"warning: {path}: {lines}: {what}; left out; {backup} has the original file")
    return rows


def _line(row: Row) -> bytes:
    """Return a row as a line of metrics.jsonl."""
    return (json.dumps(row) + "\n").encode()


def _start_wandb(settings: Mapping[str, Any], run_dir: Path, resumed: bool) -> Any:
    """Start or resume the run in wandb: online if that works at once, else offline, else not at all (None).

    The id is kept in the run's folder, so that a resumed run is the same run in wandb.
    """
    # wandb may wait for its server, but not long enough to hold up the run.
    patience = {"WANDB_INIT_TIMEOUT": "10", "WANDB_FINISH_TIMEOUT": "10", "WANDB_CONSOLE": "off", "WANDB_QUIET": "true"}
    for name, value in patience.items():
        os.environ.setdefault(name, value)
    try:
        import wandb

        arguments = dict(settings, id=_wandb_id(run_dir, resumed), dir=str(run_dir), resume="allow")
        try:
            with _no_terminal():
                return wandb.init(**arguments)
        except Exception as error:
            wandb.teardown()  # or the failed run would keep its id
            run = wandb.init(**arguments, mode="offline")
            reason = one_line(error).rstrip(".")
            note(f"warning: wandb is offline: {reason}; `wandb sync` sends it later")
            return run
    except Exception as error:
        note(f"warning: no wandb: {one_line(error)}")
        return None


def _wandb_id(run_dir: Path, resumed: bool) -> str:
    """Return the run's id in wandb; a new run gets a new one."""
    path = run_dir / WANDB_ID_FILE
    if resumed and path.exists() and (known := read_file(path).decode().strip()):
        return known
    with replacing(path) as file:
        file.write((new := uuid.uuid4().hex[:8]).encode())
    return new


@contextlib.contextmanager
def _no_terminal() -> Any:
    """Close stdin for wandb, which would otherwise ask for a missing key and wait for ever."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = stdin
