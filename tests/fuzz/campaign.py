"""The campaign: many mutants of every format, each under a limit of time and memory.

    make fuzz                                 all of it, 30 minutes on two cores, into benchmarks/fuzz.log
    make fuzz ARGS="--formats=gguf,hf"        some formats; the log keeps the lines of the others
    PYTHONPATH=tests python -m fuzz.campaign --formats=gguf --only=1234      one mutant again, with its traceback

A mutant's number and the seed decide its bytes. Numbers from the format's `cases` on are truncations: every length of
every file of up to WHOLE bytes, then some. A fault is anything but a LlamaletError or a load that computes; more than
SECONDS; more than MEMORY.
"""

import argparse
import contextlib
import faulthandler
import functools
import gc
import importlib
import mmap
import os
import pickle
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torture

from fuzz.formats import FORMATS, Files, Format, Seed
from llamalet.errors import LlamaletError

SECONDS = 10.0
MEMORY = 1 << 30
WHOLE = 8192
STRIDE = 97  # between truncations of the rest of larger files
BATCH = 2000  # mutants until a worker is replaced, so that no leak adds up
SHOWN = 12

LOADED, REFUSED, FAULT = range(3)
# What a worker shares with its parent: the mutant in progress, when it began, the next one, counts, the worst so far.
SLOTS = ("current", "began_ms", "next", "loaded", "refused", "behind", "slowest_ms", "slowest", "biggest_kb", "end")


@dataclass
class Result:
    """The counts of one format."""

    name: str
    mutants: int = 0
    truncations: int = 0
    loaded: int = 0
    refused: int = 0
    behind: int = 0
    slowest: float = 0.0
    slowest_number: int = 0
    biggest_mb: float = 0.0
    seconds: float = 0.0
    faults: list[tuple[int, str]] = field(default_factory=list)

    def line(self) -> str:
        """Return the line of the log."""
        share = self.behind / max(1, self.mutants + self.truncations)
        return (
            f"{self.name:16} {self.mutants:7} {self.truncations:11} {self.loaded:7} {self.refused:7} {share:7.0%} "
            f"{len(self.faults):6} {self.slowest:9.2f} {self.slowest_number:7} {self.biggest_mb:8.0f} "
            f"{self.seconds:8.0f}"
        )


HEADING = (
    f"{'format':16} {'mutants':>7} {'truncations':>11} {'loaded':>7} {'refused':>7} {'behind':>7} {'faults':>6} "
    f"{'slowest s':>9} {'which':>7} {'MB more':>8} {'seconds':>8}"
)


def mutant(seeds: Sequence[Seed], name: str, number: int, cases: int, campaign: int) -> tuple[Seed, Files]:
    """Return a mutant's seed and files."""
    if number >= cases:
        seed, length = truncations(seeds)[number - cases]
        files = dict(seed.files)
        files[seed.target] = files[seed.target][:length]
        if seed.mend is not None and number % 2:
            seed.mend(files)
        return seed, files
    rng = Random(f"{campaign}/{name}/{number}")
    seed = seeds[number % len(seeds)]
    files = dict(seed.files)
    files[seed.target] = seed.mutate(files[seed.target], rng)
    if seed.mend is not None and rng.random() < 0.6:
        seed.mend(files)
    return seed, files


def truncations(seeds: Sequence[Seed]) -> list[tuple[Seed, int]]:
    """Return every truncation that is tried; a file that several seeds share is cut once."""
    found = []
    seen = set()
    for seed in seeds:
        data = seed.files[seed.target]
        if data not in seen:
            seen.add(data)
            every = WHOLE if seed.cut else 0
            found += [(seed, n) for n in range(len(data)) if n < every or n % STRIDE == 0 or n > len(data) - 64]
    return found


class Behind:
    """Notes that a function behind the header was called."""

    def __init__(self, names: Sequence[str]) -> None:
        self.reached = not names
        for name in names:
            module_name, _, path = name.partition(":")
            holder: Any = importlib.import_module(module_name)
            *outer, last = path.split(".")
            for part in outer:
                holder = getattr(holder, part)
            self._watch(holder, last)

    def _watch(self, holder: Any, name: str) -> None:
        original = getattr(holder, name)

        @functools.wraps(original)
        def watched(*args: Any, **options: Any) -> Any:
            self.reached = True
            return original(*args, **options)

        setattr(holder, name, watched)
        for module in list(sys.modules.values()):  # those that imported it by name
            if module is not None and getattr(module, "__dict__", {}).get(name) is original:
                setattr(module, name, watched)


def place(folder: Path, files: Files) -> None:
    """Put a mutant's files into an empty folder; every file is new, because the last one may still be mapped."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def try_one(form: Format, folder: Path, files: Files) -> tuple[int, str]:
    """Use a mutant; return the outcome, and what went wrong."""
    place(folder, files)
    try:
        form.use(folder)
    except MemoryError as error:
        return FAULT, f"more than {MEMORY >> 20} MB: {_last_line(error)}"
    except LlamaletError as error:
        if len(str(error)) > 4000:
            return FAULT, f"a message of {len(str(error))} characters: {type(error).__name__}"
        return REFUSED, str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust's code is no Exception
        return FAULT, _last_line(error)
    return (LOADED, "") if form.may_load else (FAULT, "loads")


def _last_line(error: BaseException) -> str:
    """Return an error and the last place in our own code that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if ".venv" not in frame.filename]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-1:-4:-1])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({where})"


class Worker:
    """A forked process that tries the mutants begin, begin + step, ... below end."""

    def __init__(self, name: str, seeds: Sequence[Seed], numbers: range, campaign: int, parent_folder: Path) -> None:
        self.shared = np.frombuffer(mmap.mmap(-1, 8 * len(SLOTS)), np.int64)
        self.numbers = numbers
        self.faults_file = parent_folder / f"faults-{numbers.start}-{time.monotonic_ns()}"
        self.faults_file.touch()
        self._set("current", -1)
        self._set("next", numbers.start)
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._work(name, seeds, campaign, parent_folder / f"w{os.getpid()}")
                code = 0
            finally:
                os._exit(code)

    def get(self, slot: str) -> int:
        return int(self.shared[SLOTS.index(slot)])

    def _set(self, slot: str, value: int) -> None:
        self.shared[SLOTS.index(slot)] = value

    def _work(self, name: str, seeds: Sequence[Seed], campaign: int, folder: Path) -> None:
        """Try the mutants; in the child."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        warnings.simplefilter("ignore")
        folder.mkdir()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        form = FORMATS[name]
        behind = Behind(form.behind)
        limit_memory()
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in self.numbers:
            _, files = mutant(seeds, name, number, form.cases, campaign)
            behind.reached = not form.behind
            self._set("began_ms", time.monotonic_ns() // 1_000_000)
            self._set("current", number)
            began = time.perf_counter()
            outcome, what = try_one(form, folder, files)
            taken = int(1000 * (time.perf_counter() - began))
            self._set("current", -1)
            self._set("next", number + self.numbers.step)
            if taken > self.get("slowest_ms"):
                self._set("slowest_ms", taken)
                self._set("slowest", number)
            if outcome == FAULT:
                with self.faults_file.open("ab") as file:
                    pickle.dump((number, what), file)
            else:
                slot = "loaded" if outcome == LOADED else "refused"
                self._set(slot, self.get(slot) + 1)
            self._set("behind", self.get("behind") + behind.reached)
            self._set("biggest_kb", max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base))
            if number % 500 < self.numbers.step:
                gc.collect()
        shutil.rmtree(folder)

    def faults(self) -> Iterator[tuple[int, str]]:
        """Yield the faults that the worker itself has seen."""
        with self.faults_file.open("rb") as file, contextlib.suppress(EOFError):
            while True:
                yield pickle.load(file)

    def check(self) -> tuple[bool, tuple[int, str] | None]:
        """Return whether the worker has ended, and the fault that ended it."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        current = self.get("current")
        if pid:
            if os.WIFSIGNALED(status):
                return True, (current, f"killed by {signal.Signals(os.WTERMSIG(status)).name}")
            return True, None if os.WEXITSTATUS(status) == 0 else (current, f"exit {os.WEXITSTATUS(status)}")
        late = current >= 0 and time.monotonic_ns() // 1_000_000 - self.get("began_ms") > 1000 * SECONDS
        if late and self.get("current") == current:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return True, (current, f"more than {SECONDS:g} s")
        return False, None


def limit_memory() -> None:
    """Let this process take MEMORY more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def build_seeds(name: str) -> list[Seed]:
    """Return a format's seeds; libraries that start threads are used here, before the workers are forked.

    Every seed must load: otherwise its mutants would only show that it does not.
    """
    torch.set_num_threads(1)
    form = FORMATS[name]
    seeds = form.seeds()
    for seed in seeds if form.may_load else ():
        with tempfile.TemporaryDirectory() as folder:
            place(Path(folder), dict(seed.files))
            form.use(Path(folder))
    return seeds


def run(name: str, *, seed: int, workers: int = 2, cases: int | None = None, cuts: int | None = None) -> Result:
    """Try a format's mutants.

    Args:
        name: one of FORMATS.
        seed: decides the mutants.
        workers: number of processes.
        cases: number of mutants; None is all.
        cuts: number of truncations, evenly spread; None is all.
    """
    form = FORMATS[name]
    seeds = build_seeds(name)
    n_cuts = len(truncations(seeds)) if form.may_load else 0
    chosen = form.cases if cases is None else min(cases, form.cases)
    if cuts is not None and n_cuts > cuts:
        step = max(1, n_cuts // max(1, cuts))
        cut_numbers = range(form.cases, form.cases + n_cuts, step)[:cuts]
    else:
        cut_numbers = range(form.cases, form.cases + n_cuts)
    gc.collect()
    gc.freeze()  # or the first collection in each worker would copy all memory
    result = Result(name, mutants=chosen, truncations=len(cut_numbers))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=fast_folder()) as folder:
        queue = [part for numbers in (range(chosen), cut_numbers) for part in parts(numbers, workers)]
        running: list[Worker] = []
        while queue or running:
            while queue and len(running) < workers:
                running.append(Worker(name, seeds, queue.pop(0), seed, Path(folder)))
            time.sleep(0.02)
            for worker in list(running):
                ended, fault = worker.check()
                if not ended:
                    continue
                running.remove(worker)
                result.faults += worker.faults()
                if fault is not None:
                    result.faults.append(fault)
                    rest = range(fault[0] + worker.numbers.step, worker.numbers.stop, worker.numbers.step)
                    if fault[0] >= 0 and len(rest):
                        queue.insert(0, rest)
                result.loaded += worker.get("loaded")
                result.refused += worker.get("refused")
                result.behind += worker.get("behind")
                if (slowest := worker.get("slowest_ms") / 1000) > result.slowest:
                    result.slowest, result.slowest_number = slowest, worker.get("slowest")
                result.biggest_mb = max(result.biggest_mb, worker.get("biggest_kb") / 1024)
    result.seconds = time.monotonic() - began
    result.faults.sort()
    return result


def parts(numbers: range, workers: int) -> list[range]:
    """Cut numbers into ranges of up to BATCH, smaller ones if some worker would have none."""
    size = max(1, min(BATCH, -(-len(numbers) // workers)))
    return [numbers[at : at + size] for at in range(0, len(numbers), size)]


def fast_folder() -> str | None:
    """Return a folder in memory, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def again(name: str, number: int, seed: int) -> None:
    """Try one mutant in this process, so that its traceback is seen; its files stay."""
    form = FORMATS[name]
    made, files = mutant(form.seeds(), name, number, form.cases, seed)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-{number}-"))
    place(folder, files)
    print(f"{name} {number}: {made.name}, {made.target} changed, in {folder}")
    limit_memory()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    form.use(folder)
    print("loads and computes")


def log_text(path: Path, results: Sequence[Result], seed: int) -> str:
    """Return the log with these results; it keeps the lines of other formats."""
    lines = {}
    if path.exists():
        known = [line for line in path.read_text().splitlines() if line.partition(" ")[0] in FORMATS]
        lines = {line.partition(" ")[0]: line for line in known}
    note = f"  seed {seed}, {time.strftime('%Y-%m-%d', time.gmtime())}"
    lines |= {result.name: result.line() + note for result in results}
    head = [
        f"make fuzz: {torture.processor()}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}",
        "behind: share of all mutants whose header was accepted; MB more: than a worker has before its first mutant",
        "",
        HEADING,
    ]
    return "\n".join([*head, *(lines[name] for name in FORMATS if name in lines)]) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run the campaign; return 1 if there were faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS), help="names with commas between them (all)")
    parser.add_argument("--cases", type=int, help="mutants of each format (20,000; 5,000 templates)")
    parser.add_argument("--cuts", type=int, help="truncations of each format (all)")
    parser.add_argument("--seed", type=int, default=14, help="decides the mutants (14)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--only", type=int, metavar="N", help="try mutant N of a format again, with its traceback")
    parser.add_argument("--log", type=Path, help="file to write the counts to")
    options = parser.parse_args(argv)
    names = options.formats.split(",")
    if unknown := set(names) - FORMATS.keys():
        parser.error(f"no such format: {', '.join(sorted(unknown))}; there are {', '.join(FORMATS)}")
    if options.only is not None:
        again(names[0], options.only, options.seed)
        return 0
    results = []
    print(HEADING, flush=True)
    for name in names:
        result = run(name, seed=options.seed, workers=options.workers, cases=options.cases, cuts=options.cuts)
        results.append(result)
        print(result.line(), flush=True)
        for number, what in result.faults[:SHOWN]:
            print(f"    --formats={name} --only={number}: {what}", flush=True)
        if options.log is not None:
            options.log.write_text(log_text(options.log, results, options.seed))
    return int(any(result.faults for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
