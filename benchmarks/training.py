"""How fast training is on this machine, rung by rung from plain PyTorch to train.py, beside llama2.c's if it is named.

python -m benchmarks.training [--peer-train=PATH/llama2.c]
python -m benchmarks.training --shapes=15M,42M,110M --no-ladder

The models train on random tokens, which cost as much as stories. Each contender is a process of its own, so that its
memory and its compilation are its own; compiling is told apart, and short where the compiler's cache knows the model.
Machines are noisy: on a CPU all contenders take turns; a GPU they have one after the other, for themselves. Every
figure is the median of the turns.

MFU is the share of the bfloat16 peak that the model's own operations come to: known for common GPUs, measured on a CPU
by square matrix products in the same run, or given as --peak-tflops.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

import model as plain
from benchmarks import llama2c, peers, report
from benchmarks.report import Key, Results
from benchmarks.runtime import load, machine, one_line, peak_resident_bytes, say
from configurator import parse
from llamalet import shards, tokenizer
from llamalet.errors import ConfigError, UsageError, run
from llamalet.files import replacing
from llamalet.shards import Meta, Split, TokenBlock
from training.config import TrainConfig
from training.machine.distributed import Processes, find_device
from training.machine.hardware import choose_dtype, count_threads, peak_tflops
from training.run.progress import training_flops
from training.trainer import Trainer

CONFIGS = Path(__file__).parent.parent / "configs"
SHAPES = ("15M", "42M", "110M")
SHAPE_OPTIONS = ("dim", "n_layers", "n_heads", "max_seq_len", "batch_size")
VOCABULARY = 32000

# The tokens of a step on a CPU; on a GPU it is the micro-step of configs/.
CPU_TOKENS = 2048

OUT = Path("out") / "bench"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A way to train.

    Attributes:
        dtype: f32, tf32 or bf16, of the matrix products.
        plain: leave attention and loss as model.py has them.
    """

    dtype: str
    compile: bool = True
    plain: bool = True


TRAINED = "as train.py does it"
PEER = "llama2.c's train.py"
Turn = Callable[[], dict[str, float]]
"""Takes a turn and returns its figures: step and forward in milliseconds, memory in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """The options of benchmarks/training.py."""

    shapes: str = "15M"
    """The models, with commas between them: 15M, 42M, 110M; each with the context of its file in configs/."""
    batch_size: int | None = None
    """Sequences of a step; those of configs/ on a GPU, 2048 tokens on a CPU if not given."""
    turns: int = 4
    """How many turns each contender has."""
    steps: int = 4
    """How many steps a turn has."""
    threads: int | None = None
    """CPU threads, the peer's too; as train.py has them if not given."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    peak_tflops: float | None = None
    """The device's peak with bfloat16 in TFLOP/s, for MFU."""
    ladder: bool = True
    """Climb the whole ladder; false measures the last rung alone."""
    peer_train: str | None = None
    """Folder of llama2.c, whose train.py then takes its turns with --compile=True on the same device and batches."""
    out: str = str(OUT)
    """The folder for training.json and training.png."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = [
            f"{name}={getattr(self, name)}: must be positive"
            for name in ("batch_size", "turns", "steps", "threads", "peak_tflops")
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        unknown = [name for name in self.shapes.split(",") if name not in SHAPES]
        problems += [f"shapes={name}: must be one of {', '.join(SHAPES)}" for name in unknown]
        if self.peer_train is not None and not (Path(self.peer_train) / "train.py").is_file():
            problems.append(f"peer_train={self.peer_train}: holds no train.py")
        if problems:
            raise ConfigError.from_problems(problems)

    def shape(self, name: str, device: torch.device) -> dict[str, int]:
        """Return the options of train.py that make a shape."""
        options = tomllib.loads((CONFIGS / f"stories{name}.toml").read_text())
        if device.type == "cpu":
            options["batch_size"] = max(CPU_TOKENS // options["max_seq_len"], 1)
        if self.batch_size is not None:
            options["batch_size"] = self.batch_size
        return {option: options[option] for option in SHAPE_OPTIONS}


def main(argv: Sequence[str]) -> int:
    """Measure and print; return 0."""
    config = parse(BenchConfig, argv, program="python -m benchmarks.training", description=__doc__ or "")
    device = find_device(config.device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device}: the benchmark knows cpu and cuda")
    threads = config.threads or count_threads(1)
    builds = machine(threads) | {"torch": f"{torch.__version__} on {describe(device)}"}
    peak, origin = find_peak(config, device, threads)
    builds["peak"] = f"{peak:.3g} TFLOP/s, {origin}" if peak else origin
    for name, text in builds.items():
        print(f"{name}: {text}", flush=True)
    facts: dict[str, Any] = {"builds": builds, "options": config, "peak_tflops": peak, "shapes": {}, "load": load()}
    results, out, start = Results(), Path(config.out), time.perf_counter()
    for name in config.shapes.split(","):
        shape = config.shape(name, device)
        facts["shapes"][name] = shape
        with tempfile.TemporaryDirectory(prefix="llamalet-bench-") as folder:
            measure(config, name, shape, device, threads, Path(folder), results)
        for line in table(results, name, shape, peak):
            print(line, flush=True)
        report.write_json(out / "training.json", results, facts | {"seconds": time.perf_counter() - start})
        write_chart(out / "training.png", results, list(facts["shapes"]))
    say(f"{out / 'training.json'} and training.png written after {time.perf_counter() - start:.0f} s")
    return 0


def rungs(device: torch.device) -> dict[str, Rung]:
    """Return the ladder of a device."""
    cuda, native = device.type == "cuda", choose_dtype("auto", device) == torch.bfloat16
    ladder = {"eager": Rung(dtype="f32", compile=False), "compiled": Rung(dtype="f32")}
    if cuda:
        ladder["compiled, TF32"] = Rung(dtype="tf32")
    elif native:
        ladder["compiled, bfloat16"] = Rung(dtype="bf16")
    ladder[TRAINED] = Rung(dtype="bf16" if native else "tf32" if cuda else "f32", plain=False)
    return ladder


# -- the machine ------------------------------------------------------------------------------------------------------


def describe(device: torch.device) -> str:
    """Return the device's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def find_peak(config: BenchConfig, device: torch.device, threads: int) -> tuple[float | None, str]:
    """Return the peak that MFU refers to in TFLOP/s, None if it is not known, and where it comes from."""
    if config.peak_tflops:
        return config.peak_tflops, "as given"
    if device.type == "cuda":
        known = peak_tflops(device, torch.bfloat16)
        return known, "bfloat16, NVIDIA's data sheet" if known else "peak not known: give --peak-tflops for MFU"
    torch.set_num_threads(threads)
    dtype = choose_dtype("auto", device)
    kinds = dict.fromkeys((dtype, torch.float32))
    peaks = {kind: max(product_tflops(kind, size) for size in (512, 1024, 2048)) for kind in kinds}
    return peaks[dtype], " ".join(f"{str(kind)[6:]} {1e3 * peak:.0f} GFLOP/s," for kind, peak in peaks.items()) + (
        " square products measured with all threads"
    )


def product_tflops(dtype: torch.dtype, size: int) -> float:
    """Return the fastest of some products of two square matrices, in TFLOP/s."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    product, shortest = torch.empty_like(a), float("inf")
    for _ in range(max(10, 3 * 2048 // size)):
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        shortest = min(shortest, time.perf_counter() - start)
    return 2 * size**3 / shortest / 1e12


# -- contenders -------------------------------------------------------------------------------------------------------


def measure(
    config: BenchConfig,
    name: str,
    shape: Mapping[str, int],
    device: torch.device,
    threads: int,
    folder: Path,
    results: Results,
) -> None:
    """Let all contenders take their turns at a shape."""
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 200 * shape["max_seq_len"] + 1)
    write_data(folder / "data", tokens)
    options = {**shape, "data": str(folder / "data"), "threads": threads}
    contenders: dict[Key, AbstractContextManager[Turn]] = {
        Key(name, rung.dtype, "", title): ours(options, rung, device, config.steps)
        for title, rung in rungs(device).items()
        if config.ladder or title == TRAINED
    }
    if config.peer_train is not None:
        dtype = (
            "bf16" if device.type == "cuda" else "f32"
        )  # what its train.py computes in on a CPU, whatever it is told
        contenders[Key(name, dtype, "", PEER)] = peer(
            Path(config.peer_train), shape, tokens, device, threads, config.steps, folder / "llama2.c"
        )
    groups = [list(contenders)] if device.type == "cpu" else [[key] for key in contenders]
    for group in groups:
        with ExitStack() as stack:
            turns: dict[Key, Turn] = {}
            for key in group:
                say(f"{name}: preparing {key.contender}, {key.dtype}")
                try:
                    turns[key] = stack.enter_context(contenders[key])
                except UsageError as error:  # what does not fit into memory must not cost the figures of the others
                    results.missing[key] = one_line(error)
            for number in range(config.turns):
                for key, turn in turns.items():
                    figures = turn()
                    say(f"{name} turn {number + 1} of {config.turns}: {key.contender}, {figures['step']:.1f} ms a step")
                    for figure, value in figures.items():
                        results.add(key._replace(figure=figure), value)


def write_data(folder: Path, tokens: np.ndarray) -> None:
    """Write the same tokens as the training and the validation split of prepared data."""
    folder.mkdir()
    vocabulary = folder / "tokenizer.bin"
    peers.write_vocabulary(vocabulary, VOCABULARY)
    block = TokenBlock(tokens, documents=1, text_bytes=len(tokens))
    splits = {
        name: Split((shards.write_shard(folder / f"{name}_00000.bin", [block], VOCABULARY),)) for name in shards.SPLITS
    }
    meta = Meta(
        source="random", recipe={}, bos_id=1, eos_id=2, vocab_size=VOCABULARY, splits=splits,
        tokenizer=vocabulary.name, tokenizer_sha256=tokenizer.load(vocabulary).sha256,
    )  # fmt: skip
    shards.write_meta(folder / shards.META_FILE, meta)


@contextmanager
def ours(options: Mapping[str, Any], rung: Rung, device: torch.device, steps: int) -> Iterator[Turn]:
    """Start a trainer in a process of its own, and end it at the end.

    Yields:
        Its turn, whose figures tell again how long it took to compile, in seconds.

    Raises:
        UsageError: if it fails.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=serve, args=(there, dict(options), rung, str(device), steps))
    process.start()
    there.close()

    def answer() -> dict[str, float]:
        try:
            figures = here.recv()
        except EOFError:
            process.join()
            raise UsageError(f"its process ended with exit code {process.exitcode}") from None
        if isinstance(figures, str):
            raise UsageError(figures)
        return figures

    def turn() -> dict[str, float]:
        here.send("go")
        return prepared | answer()

    try:
        prepared = answer()
        yield turn
    finally:
        process.kill()
        process.join()


def serve(pipe: Connection, options: dict[str, Any], rung: Rung, device_name: str, steps: int) -> None:
    """Be a contender: prepare a trainer, say how long compiling took, and take a turn whenever asked.

    What goes wrong is sent as text instead of the figures.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            trainer, compile_s = make_trainer(options, rung, find_device(device_name))
        pipe.send({"compile": compile_s})
        while True:
            pipe.recv()
            pipe.send(take_turn(trainer, steps))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send(one_line(error))


def make_trainer(options: dict[str, Any], rung: Rung, device: torch.device) -> tuple[Trainer, float]:
    """Return a trainer that has taken a step, and the seconds that compiling took, 0 if it was not asked for.

    Raises:
        UsageError: if the compiler does not work.
    """
    dtype = "bfloat16" if rung.dtype == "bf16" else "float32"
    config = TrainConfig(**options, dtype=dtype, compile=rung.compile)
    trainer = Trainer(config, Processes(0, 1, 1, device))
    if rung.compile and trainer.not_compiled is not None:
        raise UsageError(trainer.not_compiled)
    if rung.plain:
        trainer.model.head_loss = plain.head_loss
        for module in trainer.model.modules():
            if isinstance(module, plain.Attention):
                module.attend = plain.attend
    if rung.dtype == "f32" and device.type == "cuda":
        torch.set_float32_matmul_precision("highest")  # the trainer lets GPUs round to TF32
    start = time.perf_counter()
    trainer.compile()
    compile_s = time.perf_counter() - start if rung.compile else 0.0
    trainer.optimizer_step()
    forward(trainer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return trainer, compile_s


@torch.no_grad()
def forward(trainer: Trainer) -> None:
    """Run the forward pass alone, as an evaluation does."""
    trainer.model.eval()
    trainer.loss(trainer.model, trainer.training_batch(0))
    trainer.model.train()


def take_turn(trainer: Trainer, steps: int) -> dict[str, float]:
    """Return the milliseconds of a whole step and of the forward pass alone, and the most bytes held so far."""
    device = trainer.group.device
    figures = {}
    for figure, work in (("step", trainer.optimizer_step), ("forward", lambda: forward(trainer))):
        wait_for(device)
        start = time.perf_counter()
        for _ in range(steps):
            work()
        wait_for(device)
        figures[figure] = 1e3 * (time.perf_counter() - start) / steps
    cuda = device.type == "cuda"
    figures["memory"] = torch.cuda.max_memory_allocated(device) if cuda else peak_resident_bytes(os.getpid())
    return figures


def wait_for(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# It runs train.py as it is and tells, every second, how much GPU memory that took: nobody else could know.
PEER_LAUNCHER = """
import runpy, sys, threading, time, torch
def tell():
    while torch.cuda.is_available():
        print("memory", torch.cuda.max_memory_allocated(), flush=True)
        time.sleep(1)
threading.Thread(target=tell, daemon=True).start()
sys.path.insert(0, ".")
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


@contextmanager
def peer(
    source: Path,
    shape: Mapping[str, int],
    tokens: np.ndarray,
    device: torch.device,
    threads: int,
    steps: int,
    home: Path,
) -> Iterator[Turn]:
    """Start llama2.c's train.py on the same tokens, let it stand still between its turns, and end it at the end.

    Args:
        source: its repository.
        shape: its options that matter for the time; one micro-batch a step and VOCABULARY where they are not given.
        tokens: what it trains on.
        device: where.
        threads: on the CPU.
        steps: of a turn.
        home: the folder to make for it.

    Yields:
        Its turn, which lets the program go on until it has reported some more steps.

    Raises:
        UsageError: if it stops.
    """
    vocab_size = shape.get("vocab_size", VOCABULARY)
    llama2c.copy_home(source, home, {"train": tokens, "val": tokens}, vocab_size)
    options = {"gradient_accumulation_steps": 1, "vocab_size": vocab_size, "vocab_source": "custom"} | dict(shape)
    options |= {"n_kv_heads": shape["n_heads"], "device": str(device), "compile": True, "out_dir": "out"}
    options |= {"eval_iters": 1, "eval_interval": 10**6, "max_iters": 10**6}
    command = [sys.executable, "-u", "-c", PEER_LAUNCHER, *(f"--{key}={value}" for key, value in options.items())]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(home / "errors", "wb") as errors:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    memory_bytes = 0

    def step() -> float:
        """Return the milliseconds of the next step that is reported."""
        nonlocal memory_bytes
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"memory (\d+)", line):
                memory_bytes = int(found[1])
            elif found := re.search(r"\| ([\d.]+)ms \|", line):
                return float(found[1])
        last = (home / "errors").read_text().strip().splitlines()[-1:]
        raise UsageError(f"{source}: its train.py stopped with exit code {process.wait()}: {' '.join(last)}")

    def turn() -> dict[str, float]:
        """Wake the program, pass over the step that its sleep fell into, and time some more."""
        process.send_signal(signal.SIGCONT)
        step()
        milliseconds = sum(step() for _ in range(steps)) / steps
        memory = memory_bytes or peak_resident_bytes(process.pid)
        process.send_signal(signal.SIGSTOP)
        return {"step": milliseconds, "memory": memory}

    try:
        step()  # compiles
        turn()
        yield turn
    finally:
        process.kill()
        process.wait()


# -- text and chart ---------------------------------------------------------------------------------------------------


def table(results: Results, name: str, shape: Mapping[str, Any], peak: float | None) -> Iterator[str]:
    """Yield the lines about one shape: a contender each, and how it compares with the peer, or with the first rung."""
    model = TrainConfig(**shape).model_config(VOCABULARY)
    tokens = shape["batch_size"] * shape["max_seq_len"]
    batch = f"{shape['batch_size']} x {shape['max_seq_len']}"
    yield f"{name}: {model.n_params / 1e6:.0f}M parameters, {batch} tokens a step, medians of the turns"
    yield (
        f"  {'':22}{'':5}{'forward ms':>11}{'step ms':>9}{'tok/s':>10}{'TFLOP/s':>9}{'MFU':>7}{'memory MB':>11}"
        f"{'compile s':>11}{'ratio':>7}"
    )
    found = contenders_of(results, name)
    base = next((key for key in found if key.contender == PEER), next(iter(found), None))
    for key in found:
        step, forward_ms, memory, compile_s = (
            results.median(name, key.dtype, figure, key.contender)
            for figure in ("step", "forward", "memory", "compile")
        )
        against = results.median(name, base.dtype, "step", base.contender) if base else None
        if step is None or against is None:
            continue
        rate = 1e3 * tokens / step
        tflops = training_flops(model) * rate / 1e12
        cells = [
            f"{forward_ms:11.1f}" if forward_ms else f"{'-':>11}",
            f"{step:9.1f}{rate:10,.0f}{tflops:9.3g}",
            f"{tflops / peak:7.1%}" if peak else f"{'-':>7}",
            f"{memory / 1e6:11,.0f}" if memory else f"{'-':>11}",
            f"{compile_s:11.1f}" if compile_s else f"{'-':>11}",
            f"{against / step:7.2f}",
        ]
        yield f"  {key.contender:22}{key.dtype:5}{''.join(cells)}"
    yield from (f"  {key.contender}: {reason}" for key, reason in results.missing.items() if key.shape == name)
    if base:
        yield f"  ratio: tokens/s against {base.contender}"


def contenders_of(results: Results, shape: str) -> list[Key]:
    """Return the keys of the contenders that took turns at a shape, in their order."""
    return [key for key in results.turns if key.shape == shape and key.figure == "step"]


def write_chart(path: Path, results: Results, names: Sequence[str]) -> None:
    """Draw a bar for each contender's step, the forward pass a part of it; do nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("warning: no chart: matplotlib is not installed")
        return
    picture = Figure(figsize=(8, 3 * len(names)), layout="constrained")
    for axis, name in zip(picture.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        found = contenders_of(results, name)[::-1]
        labels = [f"{key.contender} ({key.dtype})" for key in found]
        for figure in ("step", "forward"):
            values = [results.median(name, key.dtype, figure, key.contender) or 0.0 for key in found]
            axis.barh(labels, values, label="whole step" if figure == "step" else "forward alone")
        axis.set(title=name, xlabel="ms a step")
        axis.legend(fontsize="small")
    with replacing(path) as file:
        picture.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    run(main)
