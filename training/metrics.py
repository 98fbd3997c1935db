"""What a run leaves to be read: metrics.jsonl, a picture of the loss, and wandb where it is wanted.

Nothing here stops a run: a picture or a wandb record that fails costs one line on stderr.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llamalet.errors import DataError, DiskError
from llamalet.files import replacing

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"

Row = Mapping[str, Any]


class Metrics:
    """The record of a run; rows go to metrics.jsonl at once, and to wandb where it is on.

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
        rows = read(self.path) if resumed_at is not None else []
        rows = [row for row in rows if (row["step"], "val_loss" in row) <= (resumed_at or (0, False))]
        with replacing(self.path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(wandb, run_dir) if wandb is not None else None

    def log(self, row: Row) -> None:
        """Append one row; it needs `step`, and numbers that are not finite are recorded as null.

        Raises:
            DiskError: if the disk is full or fails.
        """
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise DiskError(f"{self.path}: cannot be written: {error.strerror}") from error
        if self._wandb is not None:
            try:
                self._wandb.log(dict(row), step=row["step"])
            except Exception as error:  # wandb's errors share no base class
                print(f"warning: wandb stopped: {error}", file=sys.stderr, flush=True)
                self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=0 if kind is None else 1)
            except Exception as failure:
                print(f"warning: wandb: {failure}", file=sys.stderr, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line that was cut off is left out, a missing file has no rows.

    Raises:
        DataError: if another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise DataError(f"{path}: line {number} is damaged; remove it") from None
    return rows


def plot(run_dir: Path, *, entropy: float | None = None) -> Path | None:
    """Draw the losses of metrics.jsonl into loss.png.

    Args:
        run_dir: the run's out_dir.
        entropy: the corpus's nats per token, the floor that no model can beat, where it is known.

    Returns:
        The picture's path, or None (and a line on stderr) where it could not be drawn.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("warning: no loss.png: matplotlib is not installed", file=sys.stderr)
        return None
    del matplotlib
    rows = read(run_dir / METRICS_FILE)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("val_loss", "validation")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker="o" if key == "val_loss" else None)
    if entropy is not None:
        axes.axhline(entropy, linestyle="--", color="gray", label=f"corpus entropy {entropy:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=str(run_dir))
    if axes.has_data():
        axes.legend()
    axes.grid(alpha=0.3)
    path = run_dir / PLOT_FILE
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        print(f"warning: no {path}: {error.strerror}", file=sys.stderr)
        return None
    return path


def _start_wandb(settings: Mapping[str, Any], run_dir: Path) -> Any:
    """Start a wandb run, or say why not and return None."""
    try:
        import wandb

        return wandb.init(dir=str(run_dir), **settings)
    except Exception as error:
        print(f"warning: no wandb: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return None
