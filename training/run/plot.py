"""Plot the losses of runs against tokens and against time.

    python -m training.run.plot out                        out/loss.png
    python -m training.run.plot out/a out/b out/c          compare.png

Faint lines show the training loss as logged, thick lines the smoothed one, dots the validation loss, and a dashed line
the corpus entropy, if known: no model can get below it. Needs neither torch nor the data; the runs may be unfinished.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import argparse
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamalet import command
from llamalet.errors import DataError, LlamaletError, UsageError, note
from llamalet.files import replacing
from training.run.metrics import METRICS_FILE, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE, COMPARISON_FILE = "loss.png", "compare.png"
KINDS = ("png", "svg", "pdf")
UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
FLOOR_STYLE: dict[str, Any] = {"color": "0.3", "linestyle": (0, (4, 3)), "linewidth": 1}

Points = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """A run's metrics.jsonl."""

    name: str
    rows: list[dict[str, Any]]

    def points(self, x: str, y: str) -> Points:
        """Return two columns of the rows that have both: float64 (2, n)."""
        pairs = [(row[x], row[y]) for row in self.rows if row.get(x) is not None and row.get(y) is not None]
        return np.array(pairs, dtype=np.float64).reshape(-1, 2).T

    @property
    def floor(self) -> float | None:
        """The corpus entropy in nats per token, if known."""
        return next((row["entropy"] for row in reversed(self.rows) if row.get("entropy") is not None), None)

    @property
    def label(self) -> str:
        """The run's name and its last validation loss."""
        *_, last = self.points("step", "val_loss")[1].tolist() or [None]
        return self.name if last is None else f"{self.name}: validation {last:.4f}"


def open_runs(folders: Sequence[Path]) -> list[LoggedRun]:
    """Read runs. Each is named after its folder, with the full path if two folders have the same name.

    Raises:
        DataError: if a run does not exist, has logged no losses, or has a damaged record.
    """
    runs = []
    for folder in folders:
        if not (folder / METRICS_FILE).is_file():
            raise DataError(f"{folder}: not a run (a folder made by train.py, with {METRICS_FILE} in it)")
        rows = read(folder / METRICS_FILE)
        if not any(row.get("loss") is not None or row.get("val_loss") is not None for row in rows):
            raise DataError(f"{folder / METRICS_FILE}: has no losses yet; try again when the run has logged some")
        twins = [other for other in folders if other.resolve().name == folder.resolve().name]
        runs.append(LoggedRun(folder.resolve().name if len(twins) == 1 else str(folder), rows))
    return runs


def smooth(losses: Points) -> Points:
    """Return running means over a twenty-fifth of the values; symmetric windows keep the curve from lagging."""
    n = len(losses)
    at = np.arange(n)
    reach = np.minimum(max(n // 50, 1), np.minimum(at, n - 1 - at))
    sums = np.concatenate(([0.0], np.cumsum(losses)))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def draw(folders: Sequence[Path], path: Path, *, log_y: bool = False) -> Path:
    """Plot runs in one picture.

    Args:
        folders: the runs' out_dirs.
        path: the picture to write, .png, .svg or .pdf; .png is added to a name without suffix.
        log_y: whether to plot losses on a logarithmic scale.

    Returns:
        The picture's path.

    Raises:
        UsageError: if the suffix is another one.
        LlamaletError: if matplotlib is missing, a run cannot be read, or the picture cannot be written.
    """
    path = path if path.suffix or not path.name else path.with_name(f"{path.name}.png")
    if (kind := path.suffix.lower().removeprefix(".")) not in KINDS:
        raise UsageError(f"{path}: the suffix must be one of {', '.join(KINDS)}")
    runs = open_runs(folders)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LlamaletError("matplotlib is not installed; install it with `pip install matplotlib`") from None
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    longest = max((run.points("elapsed_s", "step")[0].max(initial=0.0) for run in runs), default=0.0)
    second, unit = next(((size, name) for size, name in UNITS if longest >= 2 * size), UNITS[-1])
    colours = [f"C{number % 10}" for number in range(len(runs))]
    for run, colour in zip(runs, colours, strict=True):
        _draw_run(left, run, "tokens", 1.0, colour)
        _draw_run(right, run, "elapsed_s", second, colour)
    floors = {round(run.floor, 4) for run in runs if run.floor is not None}
    for floor, axes in itertools.product(floors, (left, right)):
        axes.axhline(floor, **FLOOR_STYLE)
    if log_y:
        left.set_yscale("log")
        for which in ("major", "minor"):
            getattr(left.yaxis, f"set_{which}_formatter")("{x:g}")
    left.set_ylim(*_limits(runs, floors, log_y))
    left.set(xlabel="tokens", ylabel="loss (nats per token)")
    left.xaxis.set_major_formatter(lambda x, _: _thousands(x))
    right.set(xlabel=f"time ({unit})")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _add_legend(right, [(run.label, colour) for run, colour in zip(runs, colours, strict=True)], floors)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format=kind)
    return path


def draw_or_warn(run_dir: Path) -> Path | None:
    """Plot a run in its loss.png; if that fails, warn and return None."""
    try:
        return draw([run_dir], run_dir / PLOT_FILE)
    except Exception as error:  # a picture is not worth a run
        note(f"warning: no {run_dir / PLOT_FILE}: {error}")
        return None


def _draw_run(axes: "Axes", run: LoggedRun, x: str, unit: float, colour: str) -> None:
    """Plot a run's losses against one of its columns."""
    at, losses = run.points(x, "loss")
    axes.plot(at / unit, losses, color=colour, linewidth=0.7, alpha=0.3)
    axes.plot(at / unit, smooth(losses), color=colour, linewidth=1.6, alpha=0.9)
    at, losses = run.points(x, "val_loss")
    axes.plot(at / unit, losses, color=colour, linewidth=0.8, marker="o", markersize=4, markeredgecolor="white")


def _add_legend(axes: "Axes", colours: Sequence[tuple[str, str]], floors: set[float]) -> None:
    """Explain the runs' colours, the kinds of lines, and each corpus entropy."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=2, label=label) for label, colour in colours]
    handles += [Line2D([], [], color="0.4", marker="o", markersize=4, linewidth=0.8, label="validation")]
    handles += [Line2D([], [], color="0.4", linewidth=1.6, label="training, smoothed")]
    handles += [Line2D([], [], **FLOOR_STYLE, label=f"corpus entropy {floor:.4f}") for floor in sorted(floors)]
    axes.legend(handles=handles, loc="upper right", frameon=True, framealpha=0.9, fontsize="small")


def _limits(runs: Sequence[LoggedRun], floors: set[float], log_y: bool) -> tuple[float, float]:
    """Return the limits of the loss axis; a linear scale cuts off the first steps."""
    losses = [np.concatenate([run.points("step", column)[1] for column in ("loss", "val_loss")]) for run in runs]
    low, high = min([*floors, *(float(each.min()) for each in losses)]), max(float(each.max()) for each in losses)
    if log_y:
        return low / 1.05, high * 1.05
    most = max(float(np.quantile(each, 0.75)) for each in losses)
    high = min(high, low + 2.5 * (most - low)) if most > low else high
    margin = 0.05 * max(high - low, 0.01)
    return low - margin, high + margin


def _thousands(x: float) -> str:
    """Format a number of tokens in K, M or G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if x >= size:
            return f"{x / size:g} {letter}"
    return f"{x:g}"


def main(argv: Sequence[str]) -> int:
    """Plot the runs named on the command line."""
    parser = command.Parser(
        prog="python -m training.run.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="out_dir of a run")
    parser.add_argument("--out", type=Path, help="picture to write (RUN/loss.png for one run, compare.png for several)")
    parser.add_argument("--log-y", "--log_y", action="store_true", help="losses on a logarithmic scale")
    args = parser.parse_args(argv)
    default = args.runs[0] / PLOT_FILE if len(args.runs) == 1 else Path(COMPARISON_FILE)
    os.environ.setdefault("MPLBACKEND", "agg")
    print(draw(args.runs, args.out or default, log_y=args.log_y))
    return 0


if __name__ == "__main__":
    command.run(main)
