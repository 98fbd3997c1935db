"""One run of at most eight minutes for whoever has a GPU: the speed of training, and whether it does what it does here.

LLAMA2C=~/llama2.c benchmarks/gpu.sh     with llama2.c's train.py beside it; without LLAMA2C the rest
benchmarks/gpu.sh --dry-run              every part on the CPU with tiny models; its figures mean nothing

It measures tokens/s, MFU and memory of the 15M, 42M and 110M models, and of every rung of benchmarks/training.py at
15M. It trains the demo for 200 steps in bfloat16, in TF32 and with FSDP2, and compares the losses with a CPU's. It
stops a run with --deterministic, resumes it, and compares the digests of its weights and moments with those of a run
that never stopped.

Each part is a process of its own with a limit: one that hangs or fails costs the others nothing. The files are written
again after each part: gpu.txt, which is printed at the end, gpu.json, and a log of each part with all its output.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import training as speed
from benchmarks.harness import aligned, kind_and_message, machine
from benchmarks.report import Key, Results, write_json
from configurator import parse
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.errors import ConfigError, LlamaletError, UsageError, note
from llamalet.files import check_writable, write_file
from llamalet.hf_names import MODEL_SAFETENSORS
from llamalet.model_file.checkpoint import MANIFEST, OPTIMIZER, find_latest
from training.machine.hardware import count_threads
from training.run import metrics
from training.run.interrupts import EXIT_CODE

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
SHAPE_LIMITS_S = {"15M": 60.0, "42M": 75.0, "110M": 90.0}
RUN_LIMIT_S = 60.0
CPU_RUN_LIMIT_S = RESUME_LIMIT_S = 100.0
SHORTEST_S = 5.0
"""A part is not started if less is left; importing PyTorch alone takes that long."""

LOSS_BOUND = 0.005
"""Nats per token. On a CPU, PyTorch in float32 and numba in float32 and bfloat16 end within 0.0001 of each other."""
STOP_AT = 1 / 4
"""Share of its steps after which the run is stopped that resumes."""

ADAMW, MUON = f"{speed.TRAINED}, AdamW", f"{speed.TRAINED}, Muon"
NO_PEER = "not given: LLAMA2C=PATH names the folder of llama2.c"
ON_CPU = "CPU, float32"
RESUME = "resume with --deterministic"

TINY_SHAPE = {"dim": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 16, "batch_size": 2}
TINY_DEMO = ["--dim=32", "--n_layers=1", "--n_heads=2", "--hidden_dim=64", "--max_seq_len=32", "--eval_iters=2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """The options of benchmarks/gpu.py."""

    peer_train: str | None = None
    """Folder of llama2.c; gpu.sh takes it from LLAMA2C."""
    peak_tflops: float | None = None
    """The GPU's peak with bfloat16 in TFLOP/s, for MFU; known for common GPUs."""
    minutes: float = 8.0
    """Time for all parts; those that it does not suffice for are not run."""
    dry_run: bool = False
    """Try every part on the CPU, with tiny models and without the compiler; the figures mean nothing."""
    out: str = "out/gpu"
    """Folder for gpu.txt, gpu.json and the logs."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = not_positive(self, "peak_tflops", "minutes")
        if self.peer_train is not None and not (Path(self.peer_train) / "train.py").is_file():
            problems.append(f"peer_train={self.peer_train}: has no train.py")
        ConfigError.raise_for(problems)

    @property
    def turns(self) -> tuple[int, int]:
        """Turns of a contender, and steps of a turn."""
        return (2, 2) if self.dry_run else (4, 16)

    @property
    def demo_steps(self) -> int:
        """Steps of a run of the demo."""
        return 20 if self.dry_run else 200

    @property
    def threads(self) -> int:
        """Threads of the CPU."""
        return 1 if self.dry_run else count_threads(1)


Figures = dict[str, Any]
Work = Callable[[Path], Figures]
"""Does a part in a new folder, and returns what JSON can hold; it is sent to another process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPart:
    """A part of the run.

    Attributes:
        name: unique; of its lines and its log.
        work: what is done; None for a peer that was not given.
        limit_s: seconds after which it is ended.
        key: of a contender of benchmarks/training.py, whose figures are lists of turns; None for other parts.
    """

    name: str
    work: Work | None
    limit_s: float
    key: Key | None = None


def main(argv: Sequence[str]) -> int:
    """Run all parts and print the tables.

    Returns:
        0; 1 if a part failed or did not get its turn, or the resumed run is not the one that never stopped.

    Raises:
        UsageError: if there is no GPU, unless it is a dry run.
        DiskError: if the files cannot be written.
    """
    config = parse(GpuConfig, argv, program="benchmarks/gpu.sh", description=__doc__)
    deadline = time.monotonic() + 60 * config.minutes
    if not config.dry_run and not torch.cuda.is_available():
        raise UsageError(f"no GPU: PyTorch {torch.__version__} finds none here; --dry-run tries every part on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the part of now ends too
    device, out = torch.device("cpu" if config.dry_run else "cuda:0"), Path(config.out)
    check_writable(out)
    report = new_report(config, device)
    with tempfile.TemporaryDirectory(prefix="llamalet-gpu-") as scratch:
        for part in plan(config, device, report.shapes, Path(scratch)):
            start = time.monotonic()
            try:
                figures = run_part(part, Path(scratch), out, deadline - start)
                report.add(part, figures, time.monotonic() - start)
            except UsageError as error:
                report.leave_out(part, str(error), time.monotonic() - start)
            write_file(out / "gpu.txt", "".join(f"{line}\n" for line in report.lines()).encode())
            write_json(out / "gpu.json", report.results, {**report.facts, "parts": report.parts})
    print("\n".join(report.lines()))
    note(f"{out}: gpu.txt, gpu.json and the logs are written")
    return 0 if report.is_good() else 1


# -- the parts --------------------------------------------------------------------------------------------------------


def plan(
    config: GpuConfig, device: torch.device, shapes: Mapping[str, Mapping[str, int]], scratch: Path
) -> Iterator[GpuPart]:
    """Yield all parts, those first that matter most.

    Args:
        config: the options.
        device: the GPU; the CPU for a dry run.
        shapes: train.py's options for each model.
        scratch: a folder for the demo's text.
    """

    def contender(name: str, title: str, rung: speed.Rung, optimizer: str) -> GpuPart:
        """Return the part that times the trainer at a shape."""
        rung = dataclasses.replace(rung, compile=rung.compile and not config.dry_run)
        work = partial(time_ours, config, {**shapes[name], "optimizer": optimizer}, rung, device)
        return GpuPart(
            name=f"{name} {title}", work=work, limit_s=SHAPE_LIMITS_S[name], key=Key(name, rung.dtype, "", title)
        )

    def peer(name: str) -> GpuPart:
        """Return the part that times llama2.c's train.py."""
        folder = config.peer_train and Path(config.peer_train).resolve()
        work = partial(time_peer, config, folder, shapes[name], device) if folder else None
        key = Key(name, "f32" if config.dry_run else "bf16", "", speed.PEER)
        return GpuPart(name=f"{name} {speed.PEER}", work=work, limit_s=SHAPE_LIMITS_S[name], key=key)

    def demo(name: str, *options: str, launcher: Sequence[str] = (), limit_s: float = RUN_LIMIT_S) -> GpuPart:
        """Return the part that trains the demo with these options."""
        return GpuPart(name=f"demo {name}", work=partial(train_demo, [*words, *options], launcher), limit_s=limit_s)

    ladder = {title: rung for title, rung in speed.rungs(device).items() if rung.backend == "torch"}
    trained = ladder.pop(speed.TRAINED)
    for title, rung in ladder.items():
        yield contender("15M", title, rung, "adamw")
    yield contender("15M", ADAMW, trained, "adamw")
    yield contender("15M", MUON, trained, "muon")
    yield peer("15M")

    corpus, steps = scratch / "corpus", config.demo_steps
    yield GpuPart(name="corpus", work=partial(write_corpus, corpus, config.dry_run), limit_s=RUN_LIMIT_S)
    words = [str(ROOT / "configs" / "demo.toml"), f"--data={corpus}", "--backend=torch", "--no-sample"]
    words += [f"--max_iters={steps}", f"--eval_interval={steps}", f"--log_interval={steps // 20}", "--save_every=0"]
    words += [*TINY_DEMO, "--threads=1"] if config.dry_run else []
    yield demo(ON_CPU, "--device=cpu", "--dtype=float32", "--compile=False", limit_s=CPU_RUN_LIMIT_S)
    words += [f"--device={device}", f"--compile={not config.dry_run}"]
    yield demo("bfloat16", "--dtype=bfloat16")
    yield demo("TF32", "--dtype=float32")
    yield demo("FSDP2, one process", "--dtype=bfloat16", "--parallel=fsdp", launcher=TORCHRUN)
    yield GpuPart(name=RESUME, work=partial(stop_and_resume, words, steps), limit_s=RESUME_LIMIT_S)

    for name in ("110M", "42M"):
        yield contender(name, ADAMW, trained, "adamw")
        yield peer(name)
    for name in ("110M", "42M"):
        yield contender(name, MUON, trained, "muon")


def time_ours(
    config: GpuConfig, options: Mapping[str, Any], rung: speed.Rung, device: torch.device, folder: Path
) -> Figures:
    """Return the turns of the trainer: step and forward in ms, memory in bytes, and the seconds that compiling took."""
    speed.write_data(folder / "data", random_tokens(options["max_seq_len"]))
    settings = tuple({**options, "data": str(folder / "data"), "threads": config.threads}.items())
    n_turns, steps = config.turns
    _, compile_s = speed.make_trainer(settings, rung, str(device))
    turns = [speed.take_turn(settings, rung, str(device), steps) for _ in range(n_turns)]
    return {figure: [turn[figure] for turn in turns] for figure in turns[0]} | {"compile": [compile_s]}


def time_peer(config: GpuConfig, source: Path, shape: Mapping[str, int], device: torch.device, folder: Path) -> Figures:
    """Return the turns of llama2.c's train.py, and its largest memory: it reports that once a second."""
    tokens, (n_turns, steps) = random_tokens(shape["max_seq_len"]), config.turns
    with speed.peer(source, shape, tokens, device, config.threads, steps, folder / "llama2.c") as turn:
        turns = [turn() for _ in range(n_turns)]
    return {"step": [one["step"] for one in turns], "memory": [max(one["memory"] for one in turns)]}


def random_tokens(length: int) -> np.ndarray:
    """Return enough tokens for windows of this length."""
    return np.random.default_rng(0).integers(3, speed.VOCABULARY, 200 * length + 1)


def write_corpus(corpus: Path, tiny: bool, folder: Path) -> Figures:
    """Write synthetic stories as the demo has them, but fewer, and prepare them in `corpus`."""
    stories, val_stories, vocab_size = (200, 50, 400) if tiny else (4000, 400, 2048)
    options = {
        "synthesize": ["--seed=1", f"--stories={stories}", f"--val-stories={val_stories}"],
        "pretokenize": ["--source=synthetic", f"--vocab-size={vocab_size}"],
    }
    for command, words in options.items():
        run_script("tinystories.py", [command, *words, f"--data-dir={corpus}"])
    return {}


def train_demo(words: Sequence[str], launcher: Sequence[str], folder: Path) -> Figures:
    """Return the losses at the end of a run of train.py, and the median of its tokens/s."""
    lines = run_script("train.py", [*words, f"--out_dir={folder / 'out'}"], launcher)
    if launcher and not any("FSDP2" in line for line in lines):
        raise UsageError("train.py did not use FSDP2")
    rows = metrics.read(folder / "out" / metrics.METRICS_FILE)
    columns = {name: [row[name] for row in rows if name in row] for name in ("val_loss", "loss", "tokens_per_s")}
    if None in columns["val_loss"]:
        raise UsageError("the validation loss is not finite")
    return {
        "val_loss": columns["val_loss"][-1],
        "loss": columns["loss"][-1],
        "tokens_per_s": float(np.median(columns["tokens_per_s"])),
    }


def stop_and_resume(words: Sequence[str], steps: int, folder: Path) -> Figures:
    """Return the digests of a run that never stopped and of one that was stopped, and whether they are the same."""
    whole, cut = folder / "whole", folder / "cut"
    options = [*words, "--deterministic"]
    run_script("train.py", [*options, f"--out_dir={whole}"])
    lines = run_script("train.py", [*options, f"--out_dir={cut}"], stop_at=round(steps * STOP_AT))
    stopped = re.search(r"interrupted at step (\d+)", lines[-1])
    run_script("train.py", ["--resume", f"--out_dir={cut}"])
    found = {"whole": digests(whole, steps), "resumed": digests(cut, steps)}
    return {"stopped_at": int(stopped[1]) if stopped else None, "same": found["whole"] == found["resumed"], **found}


def digests(run_dir: Path, step: int) -> dict[str, str]:
    """Return the sha256 of the weights and of the optimizer's state after a run's last step."""
    newest = find_latest(run_dir)
    if newest is None or newest.name != f"step-{step:08d}":
        raise UsageError(f"{run_dir.name} has no checkpoint of step {step}")
    files = json.loads((newest / MANIFEST).read_bytes())["files"]
    return {name: files[name]["sha256"] for name in (MODEL_SAFETENSORS, OPTIMIZER)}


def run_script(
    script: str, words: Sequence[str], launcher: Sequence[str] = (), stop_at: int | None = None
) -> list[str]:
    """Run a script of the checkout and return its lines, which are printed too.

    Args:
        script: its file.
        words: its arguments.
        launcher: arguments of Python before it.
        stop_at: send SIGTERM at the line of this step; the run then has to end as one that can be resumed.

    Raises:
        UsageError: if it ends otherwise, with its error, or the last line that it printed.
    """
    command = [sys.executable, *launcher, str(ROOT / script), *words]
    print("$", *command, flush=True)
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
            if stop_at is not None and re.match(rf"step +{stop_at}/", line):
                process.terminate()
    expected = 0 if stop_at is None else EXIT_CODE
    if process.returncode != expected:
        said = [line for line in lines if line.startswith("error:")] or lines or ["nothing"]
        other = f", not {expected}" if expected else ""
        raise UsageError(f"{script} ended with exit code {process.returncode}{other}: {said[-1]}")
    return lines


# -- a part as a process ----------------------------------------------------------------------------------------------


def run_part(part: GpuPart, scratch: Path, out: Path, left_s: float) -> Figures:
    """Do a part in another process, which is ended at its limit with all that it has started.

    Args:
        part: the part.
        scratch: where its folder is made.
        out: where its log goes.
        left_s: seconds that are left for all parts.

    Raises:
        UsageError: if it was not given or there is no time, if it fails, or if it takes too long.
    """
    if part.work is None:
        raise UsageError(NO_PEER)
    if left_s < SHORTEST_S:
        raise UsageError("not run: the time for all parts was over")
    note(f"{part.name}: {left_s:.0f} s left")
    name = re.sub(r"\W+", "-", part.name).strip("-")
    folder, log, limit_s = scratch / name, out / f"{name}.log", min(part.limit_s, left_s)
    folder.mkdir()
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=do, args=(part.work, folder, log, sender))
    process.start()
    assert process.pid is not None
    sender.close()  # so that the end of the process is an end of file
    try:
        if not receiver.poll(limit_s):
            raise UsageError(f"ended after {limit_s:.0f} s, its limit; {last_line(log)}")
        figures, reason = receiver.recv()
    except EOFError:
        process.join()
        raise UsageError(f"ended with exit code {process.exitcode}; {last_line(log)}") from None
    finally:
        process.join(1)
        if process.is_alive():
            kill_all(process.pid)
            process.join()
    if reason is not None:
        raise UsageError(reason)
    return dict(figures)


def do(work: Work, folder: Path, log: Path, sender: Connection) -> None:
    """Do a part, in its own process: all output goes to the log, and the figures or what went wrong to the sender."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    try:
        sender.send((work(folder), None))
    except Exception as error:  # whatever it is, it is a fact about this machine, and the next part follows
        traceback.print_exc()
        sender.send((None, str(error) if isinstance(error, LlamaletError) else kind_and_message(error)))


def last_line(log: Path) -> str:
    """Return the last line of a log, to say how far a part has come."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return f"its log ends with: {next((line.strip() for line in reversed(lines) if line.strip()), 'nothing')}"


def kill_all(process: int) -> None:
    """Kill a process and, on Linux, all that it has started, in whatever sessions: torchrun's have their own."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(file.parent.name))
    found = [process]
    for one in found:  # which grows
        found += children.get(one, [])
    for one in found:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


# -- report -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class GpuReport:
    """What was found so far.

    Attributes:
        facts: about the machine and the options; they go into the JSON file.
        shapes: train.py's options for each model.
        peak: the GPU's peak in TFLOP/s, None if unknown.
        steps: of the demo.
        results: the turns of the contenders.
        parts: what each part took and, but for contenders, found; or the reason why it has nothing.
    """

    facts: Mapping[str, Any]
    shapes: Mapping[str, Mapping[str, int]]
    peak: float | None
    steps: int
    results: Results = field(default_factory=Results)
    parts: dict[str, Figures] = field(default_factory=dict)

    def add(self, part: GpuPart, figures: Figures, seconds: float) -> None:
        """Add the figures of a part."""
        self.parts[part.name] = {"seconds": seconds} | ({} if part.key else figures)
        if part.key:
            for figure, turns in figures.items():
                self.results.turns[part.key._replace(figure=figure)] = turns

    def leave_out(self, part: GpuPart, reason: str, seconds: float) -> None:
        """Say why a part has no figures."""
        self.parts[part.name] = {"seconds": seconds, "reason": reason}
        if part.key:
            self.results.missing[part.key] = reason

    def is_good(self) -> bool:
        """Return whether no part that could be run has failed, resuming is exact, and the losses are the CPU's."""
        failed = any(found.get("reason", NO_PEER) != NO_PEER for found in self.parts.values())
        return not failed and bool(self.parts[RESUME]["same"]) and not any(map(self.differs, self.parts.values()))

    def differs(self, found: Figures) -> bool:
        """Return whether a part has a loss further from the CPU's than rounding takes it."""
        cpu_loss = self.parts.get(f"demo {ON_CPU}", {}).get("val_loss")
        return "val_loss" in found and cpu_loss is not None and not abs(found["val_loss"] - cpu_loss) < LOSS_BOUND

    def lines(self) -> Iterator[str]:
        """Yield the tables."""
        yield from (f"{name}: {text}" for name, text in self.facts["builds"].items())
        measured = {key.shape for key in [*self.results.turns, *self.results.missing]}
        for name in (name for name in self.shapes if name in measured):
            yield ""
            yield from speed.table(self.results, name, self.shapes[name], self.peak)
        yield ""
        yield from self.demo_lines()
        if found := self.parts.get(RESUME):
            yield f"{RESUME}: {found.get('reason') or resume_line(found)}"
        if reason := self.parts.get("corpus", {}).get("reason"):
            yield f"corpus: {reason}"

    def demo_lines(self) -> Iterator[str]:
        """Yield the table of the demo's losses."""
        demos = {name.removeprefix("demo "): found for name, found in self.parts.items() if name.startswith("demo ")}
        cpu_loss = demos.get(ON_CPU, {}).get("val_loss")
        rows = [[f"demo, {self.steps} steps", "validation loss", "more than on the CPU", "tok/s"]]
        for name, found in demos.items():
            if "reason" not in found:
                more = "-" if cpu_loss is None else f"{found['val_loss'] - cpu_loss:+.5f}"
                more += " TOO FAR" if self.differs(found) else ""
                rows.append([name, f"{found['val_loss']:.5f}", more, f"{found['tokens_per_s']:,.0f}"])
        yield from aligned(rows)
        yield from (f"  {name}: {found['reason']}" for name, found in demos.items() if "reason" in found)


def resume_line(found: Figures) -> str:
    """Return what came of stopping and resuming."""
    where = f"stopped at step {found['stopped_at']} and resumed"
    if found["same"]:
        return f"{where}, weights and moments are those of a run that never stopped, to the last bit"
    differ = [name for name, digest in found["whole"].items() if found["resumed"][name] != digest]
    return f"{where}, {' and '.join(differ)} DIFFER from a run that never stopped"


def new_report(config: GpuConfig, device: torch.device) -> GpuReport:
    """Return a report about this machine that has no figures yet."""
    options = speed.TrainingBenchConfig(peak_tflops=config.peak_tflops)
    shapes = {name: TINY_SHAPE if config.dry_run else options.shape(name, device) for name in speed.SHAPES}
    builds = {"dry run": "tiny models on the CPU, not compiled; the figures mean nothing"} if config.dry_run else {}
    builds |= machine(config.threads) | {"commit": commit(), "gpu": describe_gpu(device)}
    peak, origin = config.peak_tflops, "as given" if config.peak_tflops else "none"
    if not config.dry_run:
        peak, origin = speed.find_peak(options, device, config.threads)
    builds["peak"] = f"{peak:.3g} TFLOP/s, {origin}" if peak else origin
    facts = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "builds": builds,
        "options": config,
        "shapes": shapes,
        "peak_tflops": peak,
    }
    return GpuReport(facts=facts, shapes=shapes, peak=peak, steps=config.demo_steps)


def describe_gpu(device: torch.device) -> str:
    """Return the GPU's name and memory, and the versions of its driver, of CUDA and of PyTorch."""
    if device.type == "cpu":
        return f"none used, PyTorch {torch.__version__}"
    gpu, driver = torch.cuda.get_device_properties(device), "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().partition("\n")[0] or driver
    return (
        f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, driver {driver}, CUDA {torch.version.cuda}, "
        f"PyTorch {torch.__version__}"
    )


def commit() -> str:
    """Return the checkout's commit, with a + if files have changed since."""
    if not shutil.which("git"):
        return "unknown"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    run(main)
