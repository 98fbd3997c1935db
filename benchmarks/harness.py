"""What the benchmarks share: the loop over shapes and its files, facts about the machine, tables and charts."""

import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.report import Results, write_json
from llamalet.errors import note
from llamalet.files import check_writable, replacing

OUT = Path("out") / "bench"


def run_benchmark(
    name: str,
    facts: Mapping[str, Any],
    shapes: Mapping[str, Any],
    measure: Callable[[str, Path, Results], Iterator[str]],
    draw: Callable[[Any, Results, Sequence[str]], None],
    out: Path,
    results: Results | None = None,
) -> Results:
    """Measure one shape after another; print and write the results after each.

    Args:
        name: the result files are out/NAME.json and out/NAME.png.
        facts: what goes into the JSON file; its "builds" are printed.
        shapes: what is measured, by name.
        measure: measures the named shape, with a folder for temporary files, and yields lines to print.
        draw: fills a matplotlib figure with the results of the named shapes.
        out: the folder.
        results: where the figures are kept; by default in a new Results.
    """
    check_writable(out)
    for build, text in facts["builds"].items():
        print(f"{build}: {text}", flush=True)
    results, start = Results() if results is None else results, time.perf_counter()
    facts = {**facts, "shapes": {}, "load": load_average()}
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="llamalet-bench-") as folder:
            for line in measure(shape, Path(folder), results):
                print(line, flush=True)
        facts["shapes"][shape] = shapes[shape]
        write_json(out / f"{name}.json", results, facts | {"seconds": time.perf_counter() - start})
        save_chart(out / f"{name}.png", lambda figure: draw(figure, results, list(facts["shapes"])))
    note(f"{out / name}.json and {name}.png written after {time.perf_counter() - start:.0f} s")
    return results


# -- the machine ------------------------------------------------------------------------------------------------------


def machine(threads: int) -> dict[str, str]:
    """Describe the processor, the load and the versions that the figures depend on."""
    model = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "numba", "llvmlite"))
    return {
        "machine": f"{model}, {os.cpu_count()} processors, {threads} threads, load {load_average():.1f} at the start",
        "versions": f"Python {platform.python_version()}, {versions}; {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    }


def load_average() -> float:
    """Return the load average of the last minute; 0 if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def peak_resident_bytes(process: int) -> int:
    """Return the peak resident memory of a process, mapped files included; 0 if unknown.

    getrusage is not used because on Linux a new process inherits the peak of its parent there.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(sizes[0]) if sizes else 0


# -- output -----------------------------------------------------------------------------------------------------------


def kind_and_message(error: Exception) -> str:
    """Return an error's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row of cells, in columns; the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def save_chart(path: Path, draw: Callable[[Any], None]) -> bool:
    """Write the matplotlib figure that `draw` fills as a PNG; return False if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        note(f"warning: no {path}: matplotlib is not installed")
        return False
    figure = Figure(layout="constrained")
    draw(figure)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True
