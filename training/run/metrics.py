"""What a run leaves to be read: metrics.jsonl, and wandb where it is wanted.

Nothing here stops a run: what cannot be written costs one line on stderr, and a wandb out of reach works offline.
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

from llamalet.errors import DataError, DiskError
from llamalet.files import replacing

METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = "metrics.damaged.jsonl"
WANDB_ID_FILE = "wandb/id"
LARGEST = 3.5e38
"""No number of a run is greater, for they come from float32; so what draws them in float64 meets no infinity."""

Row = Mapping[str, Any]


class Metrics:
    """The record of a run; rows go to metrics.jsonl at once, and to wandb where it is on.

    Each row gets `elapsed_s`: seconds since the run began, with all that a run does but train, the hours between two
    stretches of it left out.

    Args:
        run_dir: the run's out_dir.
        resumed_at: the step that the run goes on after, and whether its evaluation is done; rows of what is about to
            be repeated are dropped. None starts afresh.
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
            # What the dropped rows took was spent as well.
            self._began -= max((row.get("elapsed_s") or 0.0 for row in rows), default=0.0)
        except (OSError, DiskError) as error:
            self._warn(error)
        self._wandb = _start_wandb(wandb, run_dir, resumed_at is not None) if wandb is not None else None

    def log(self, row: Row) -> None:
        """Append one row; it needs `step`, and numbers that are not finite are recorded as null."""
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        row["elapsed_s"] = round(time.monotonic() - self._began, 3)
        self._unwritten += _line(row)
        try:
            # Opened each time and unbuffered: what a full disk does not take now, it gets with a later row.
            with self.path.open("ab", buffering=0) as file:
                while self._unwritten:
                    self._unwritten = self._unwritten[file.write(self._unwritten) :]
        except OSError as error:
            self._warn(error)
        self._to_wandb(row, row["step"])

    def log_story(self, step: int, text: str) -> None:
        """Show wandb what the model tells after a step."""
        self._to_wandb({"story": text}, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=0 if kind is None else 1)
            except Exception as failure:
                print(f"warning: wandb: {_one_line(failure)}", file=sys.stderr, flush=True)

    def _to_wandb(self, row: Row, step: int) -> None:
        """Pass a row on; the first failure is the last."""
        if self._wandb is not None:
            try:
                self._wandb.log(dict(row), step=step)
            except Exception as error:  # wandb's errors share no base class
                print(f"warning: wandb stopped: {_one_line(error)}", file=sys.stderr, flush=True)
                self._wandb = None

    def _warn(self, error: OSError) -> None:
        """Say, once, that rows are not written."""
        if not self._warned:
            reason = getattr(error, "strerror", None) or _one_line(error)
            print(f"warning: {self.path} is incomplete: {reason}; training goes on", file=sys.stderr, flush=True)
        self._warned = True


def read(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl: numbers and None; a last line that was cut off is left out, a missing file has no rows.

    Raises:
        DataError: if the file cannot be read, or another line is damaged.
    """
    try:
        rows, damage = _parse(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    for number, what in damage.items():
        raise DataError(f"{path}: line {number} is damaged: {what}; remove it")
    return rows


def _parse(path: Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Return the rows of metrics.jsonl, and what is wrong with each other line, but for a last one that was cut off."""
    if not path.exists():
        return [], {}
    rows, damage = [], {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            rows.append(_row(line))
        except DataError as error:
            if line.endswith(b"\n"):
                damage[number] = str(error)
    return rows, damage


def _row(line: bytes) -> dict[str, Any]:
    """Read a line of metrics.jsonl.

    Raises:
        DataError: if it is none that `Metrics.log` writes.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError("no JSON") from None
    if not isinstance(row, dict) or "step" not in row:
        raise DataError("no row with a step")
    for key, value in row.items():
        kinds = int if key == "step" else int | float
        number = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= LARGEST
        if not number and (value is not None or key == "step"):
            raise DataError(f"{json.dumps({key: value})[1:-1]:.80} is no number that a run has")
    return row


def _salvage(path: Path) -> list[dict[str, Any]]:
    """Return the sound rows of a run to go on with; if there are others, the file as it is goes aside."""
    rows, damage = _parse(path)
    if damage:
        aside = path.replace(path.with_name(DAMAGED_FILE))
        number, what = next(iter(damage.items()))
        lines = f"line {number} damaged" if len(damage) == 1 else f"{len(damage)} lines damaged, the first is {number}"
        print(f"warning: {path}: {lines}: {what}; left out, all of it is in {aside}", file=sys.stderr, flush=True)
    return rows


def _line(row: Row) -> bytes:
    """Return a row as it stands in metrics.jsonl."""
    return (json.dumps(row) + "\n").encode()


def _one_line(error: Exception) -> str:
    """Return what an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _start_wandb(settings: Mapping[str, Any], run_dir: Path, resumed: bool) -> Any:
    """Start or go on with the run's wandb run: online if that works at once, else offline, else not at all (None).

    A run keeps its id in its folder, so that all its stretches are one run in wandb.
    """
    # wandb may wait for its server, but not for long; it must not stand between the run and its output.
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
            wandb.teardown()  # what is left of a run that did not start has its id
            run = wandb.init(**arguments, mode="offline")
            reason = _one_line(error).rstrip(".")
            print(f"warning: wandb is offline: {reason}; `wandb sync` sends it later", file=sys.stderr, flush=True)
            return run
    except Exception as error:
        print(f"warning: no wandb: {_one_line(error)}", file=sys.stderr, flush=True)
        return None


def _wandb_id(run_dir: Path, resumed: bool) -> str:
    """Return the run's id in wandb, a new one for a run that starts."""
    path = run_dir / WANDB_ID_FILE
    if resumed and path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    with replacing(path) as file:
        file.write((new := uuid.uuid4().hex[:8]).encode())
    return new


@contextlib.contextmanager
def _no_terminal() -> Any:
    """Leave nobody to ask: without a key, wandb would put a question and wait for the answer for ever."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = stdin
