"""How fast training is on this machine, rung by rung from plain PyTorch to train.py, compared with llama2.c if given.

python -m benchmarks.training [--peer-train=PATH/llama2.c]
python -m benchmarks.training --shapes=15M,42M,110M --no-ladder

The models train on random tokens, which cost as much as stories. Each contender is a separate process with its own
memory and compilation; compile time is reported separately, and is short if the compiler's cache has the model.
Machines are noisy: on a CPU all contenders take turns; on a GPU they run one after the other. Every figure is the
median over the turns.

MFU is the model's own operations as a share of the bfloat16 peak, which is known for common GPUs, measured on a CPU by
square matrix products in the same run, or given as --peak-tflops.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import functools
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
import timeit
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import model as plain
from benchmarks import llama2c, random_models
from benchmarks.harness import OUT, aligned, kind_and_message, machine, peak_resident_bytes, run_benchmark
from benchmarks.report import Key, Results
from configurator import parse
from llamalet import shards, tokenizer
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.config import ModelConfig
from llamalet.errors import ConfigError, UsageError, note
from llamalet.kernels import bfloat16
from llamalet.shards import Meta, Split, TokenBlock
from training.backend import Arrays
from training.config import TrainConfig
from training.machine.distributed import Processes, find_device
from training.machine.hardware import choose_dtype, count_threads, peak_tflops
from training.run.interrupts import Interrupts
from training.run.progress import training_flops
from training.step_numba import NumbaBackend
from training.step_torch import TorchBackend
from training.trainer import Trainer

CONFIGS = Path(__file__).parent.parent / "configs"
SHAPES = ("15M", "42M", "110M")
SHAPE_OPTIONS = ("dim", "n_layers", "n_heads", "max_seq_len", "batch_size")
VOCABULARY = 32000

# Tokens of a step on a CPU; on a GPU it is the micro-step in configs/.
CPU_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A configuration of the trainer.

    Attributes:
        dtype: f32, tf32 or bf16, of the matrix products.
        plain: use attention and loss as in model.py.
        backend: train.py's.
    """

    dtype: str
    compile: bool = True
    plain: bool = True
    backend: Literal["torch", "numba"] = "torch"


TRAINED = "as train.py does it"
WITHOUT_TORCH = "without PyTorch"
PEER = "llama2.c's train.py"
Turn = Callable[[], dict[str, float]]
"""Takes a turn and returns its figures: step and forward in milliseconds, memory in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBenchConfig:
    """The options of benchmarks/training.py."""

    shapes: str = "15M"
    """The models, separated by commas: 15M, 42M, 110M; each with the context of its file in configs/."""
    batch_size: int | None = None
    """Sequences of a step; by default those of configs/ on a GPU, and 2048 tokens on a CPU."""
    turns: int = 4
    """Turns of each contender."""
    steps: int = 4
    """Steps of a turn."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """train.py's optimizer; llama2.c's is AdamW."""
    threads: int | None = None
    """CPU threads, the peer's too; by default as in train.py."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    peak_tflops: float | None = None
    """The device's peak with bfloat16 in TFLOP/s, for MFU."""
    ladder: bool = True
    """Measure the whole ladder; false measures the last rung alone."""
    peer_train: str | None = None
    """Folder of llama2.c, whose train.py then takes turns with --compile=True on the same device and batches."""
    out: str = str(OUT)
    """Folder for training.json and training.png."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = not_positive(self, "batch_size", "turns", "steps", "threads", "peak_tflops")
        unknown = [name for name in self.shapes.split(",") if name not in SHAPES]
        problems += [f"shapes={name}: must be one of {', '.join(SHAPES)}" for name in unknown]
        if self.peer_train is not None and not (Path(self.peer_train) / "train.py").is_file():
            problems.append(f"peer_train={self.peer_train}: has no train.py")
        ConfigError.raise_for(problems)

    def shape(self, name: str, device: torch.device) -> dict[str, int]:
        """Return train.py's options for a shape."""
        options = tomllib.loads((CONFIGS / f"stories{name}.toml").read_text())
        if device.type == "cpu":
            options["batch_size"] = max(CPU_TOKENS // options["max_seq_len"], 1)
        if self.batch_size is not None:
            options["batch_size"] = self.batch_size
        return {option: options[option] for option in SHAPE_OPTIONS}


def main(argv: Sequence[str]) -> int:
    """Measure and print; return 0."""
    config = parse(TrainingBenchConfig, argv, program="python -m benchmarks.training", description=__doc__)
    device = find_device(config.device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device}: must be cpu or cuda for this benchmark")
    threads = config.threads or count_threads(1)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    builds = machine(threads) | {"torch": f"{torch.__version__} on {device_name}"}
    peak, origin = find_peak(config, device, threads)
    builds["peak"] = f"{peak:.3g} TFLOP/s, {origin}" if peak else origin
    shapes = {name: config.shape(name, device) for name in config.shapes.split(",")}

    def measure_and_report(name: str, folder: Path, results: Results) -> Iterator[str]:
        measure(config, name, shapes[name], device, threads, folder, results)
        return table(results, name, shapes[name], peak)

    facts = {"builds": builds, "options": config, "peak_tflops": peak}
    run_benchmark("training", facts, shapes, measure_and_report, draw_steps, Path(config.out))
    return 0


def rungs(device: torch.device) -> dict[str, Rung]:
    """Return the ladder of a device."""
    cuda, native = device.type == "cuda", choose_dtype("auto", device) == torch.bfloat16
    ladder = {"eager": Rung(dtype="f32", compile=False), "compiled": Rung(dtype="f32")}
    if cuda:
        ladder["compiled, TF32"] = Rung(dtype="tf32")
    elif native:
        ladder["compiled, bfloat16"] = Rung(dtype="bf16")
    if device.type == "cpu":
        ladder[WITHOUT_TORCH] = Rung(dtype="f32", compile=False, plain=False, backend="numba")
        if bfloat16.instructions():
            ladder[f"{WITHOUT_TORCH}, bfloat16"] = Rung(dtype="bf16", compile=False, plain=False, backend="numba")
    ladder[TRAINED] = Rung(dtype="bf16" if native else "tf32" if cuda else "f32", plain=False)
    return ladder


# -- the machine ------------------------------------------------------------------------------------------------------


def find_peak(config: TrainingBenchConfig, device: torch.device, threads: int) -> tuple[float | None, str]:
    """Return the peak for MFU in TFLOP/s, None if unknown, and where it comes from."""
    if config.peak_tflops:
        return config.peak_tflops, "as given"
    if device.type == "cuda":
        known = peak_tflops(device, torch.bfloat16)
        return known, "bfloat16, NVIDIA's data sheet" if known else "peak unknown: give --peak-tflops for MFU"
    torch.set_num_threads(threads)
    dtype = choose_dtype("auto", device)
    kinds = dict.fromkeys((dtype, torch.float32))
    peaks = {kind: max(product_tflops(kind, size) for size in (512, 1024, 2048)) for kind in kinds}
    return peaks[dtype], " ".join(f"{str(kind)[6:]} {1e3 * peak:.0f} GFLOP/s," for kind, peak in peaks.items()) + (
        " square products measured with all threads"
    )


def product_tflops(dtype: torch.dtype, size: int) -> float:
    """Return the TFLOP/s of the fastest of several products of two square matrices."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    product = torch.empty_like(a)
    seconds = timeit.repeat(lambda: torch.mm(a, b, out=product), number=1, repeat=max(10, 3 * 2048 // size))
    return 2 * size**3 / min(seconds) / 1e12


# -- contenders -------------------------------------------------------------------------------------------------------


def measure(
    config: TrainingBenchConfig,
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
    options = {**shape, "data": str(folder / "data"), "threads": threads, "optimizer": config.optimizer}
    contenders: dict[Key, AbstractContextManager[Turn]] = {
        Key(name, rung.dtype, "", title): ours(options, rung, device, config.steps)
        for title, rung in rungs(device).items()
        if config.ladder or title == TRAINED
    }
    if config.peer_train is not None:
        dtype = "bf16" if device.type == "cuda" else "f32"  # on a CPU its train.py ignores its dtype option
        contenders[Key(name, dtype, "", PEER)] = peer(
            Path(config.peer_train), shape, tokens, device, threads, config.steps, folder / "llama2.c"
        )
    groups = [list(contenders)] if device.type == "cpu" else [[key] for key in contenders]
    for group in groups:
        with ExitStack() as stack:
            turns: dict[Key, Turn] = {}
            for key in group:
                note(f"{name}: preparing {key.contender}, {key.dtype}")
                try:
                    turns[key] = stack.enter_context(contenders[key])
                except UsageError as error:  # for lack of memory, perhaps; the others are measured all the same
                    results.missing[key] = kind_and_message(error)
            for number in range(config.turns):
                for key, turn in turns.items():
                    figures = turn()
                    note(
                        f"{name} turn {number + 1} of {config.turns}: {key.contender}, {figures['step']:.1f} ms a step"
                    )
                    for figure, value in figures.items():
                        results.add(key._replace(figure=figure), value)


def write_data(folder: Path, tokens: np.ndarray) -> None:
    """Write prepared data whose training and validation split are these tokens."""
    folder.mkdir()
    vocabulary = folder / "tokenizer.bin"
    random_models.write_vocabulary(vocabulary, VOCABULARY)
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
    """Start a trainer in a separate process, and stop it at the end.

    Yields:
        Its turn; the figures include the seconds that compiling took.

    Raises:
        UsageError: if it cannot be started.
    """
    spec = (tuple(options.items()), rung, str(device))
    spawn, no_interrupt = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(1, spawn, initializer=signal.signal, initargs=no_interrupt) as pool:
        prepared = pool.submit(prepare_trainer, *spec).result()
        yield lambda: prepared | pool.submit(take_turn, *spec, steps).result()


def prepare_trainer(options: tuple[tuple[str, Any], ...], rung: Rung, device_name: str) -> dict[str, float]:
    """Prepare the trainer of this process; return the seconds that compiling took."""
    try:
        with redirect_stdout(sys.stderr):
            return {"compile": make_trainer(options, rung, device_name)[1]}
    except Exception as error:  # not every exception can be sent to another process
        raise UsageError(kind_and_message(error)) from None


def make_backend(
    group: Processes, config: TrainConfig, shape: ModelConfig, weights: Arrays | None
) -> TorchBackend | NumbaBackend:
    """Return what computes."""
    if config.backend == "numba":
        return NumbaBackend(config, shape, weights, Interrupts())
    return TorchBackend(config, shape, group, weights, Interrupts())


@functools.cache
def make_trainer(options: tuple[tuple[str, Any], ...], rung: Rung, device_name: str) -> tuple[Trainer, float]:
    """Return a trainer that has taken a step, and the seconds that compiling took, 0 without compilation.

    Raises:
        UsageError: if the compiler does not work.
    """
    device, dtype = find_device(device_name), "bfloat16" if rung.dtype == "bf16" else "float32"
    config = TrainConfig(**dict(options), dtype=dtype, compile=rung.compile, backend=rung.backend)
    group = Processes(0, 1, 1, device)
    trainer = Trainer(config, group, functools.partial(make_backend, group))
    if isinstance(backend := trainer.backend, TorchBackend):
        set_up_rung(backend, rung)
    start = time.perf_counter()
    trainer.prepare()
    compile_s = time.perf_counter() - start if rung.compile else 0.0
    trainer.optimizer_step()
    forward_only(trainer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return trainer, compile_s


def set_up_rung(backend: TorchBackend, rung: Rung) -> None:
    """Let PyTorch compute as a rung says.

    Raises:
        UsageError: if the compiler does not work.
    """
    if rung.compile and backend.machine.not_compiled is not None:
        raise UsageError(backend.machine.not_compiled)
    if rung.plain:
        backend.model.head_loss = plain.head_loss
        for module in backend.model.modules():
            if isinstance(module, plain.Attention):
                module.attend = plain.causal_attention
    if rung.dtype == "f32":
        torch.set_float32_matmul_precision("highest")  # the trainer lets GPUs round to TF32


def forward_only(trainer: Trainer) -> None:
    """Run the forward pass alone, as in an evaluation."""
    trainer.backend.losses([trainer.training_batch(0)])


def take_turn(options: tuple[tuple[str, Any], ...], rung: Rung, device_name: str, steps: int) -> dict[str, float]:
    """Return the milliseconds of a whole step and of the forward pass alone, and the peak bytes so far."""
    trainer, _ = make_trainer(options, rung, device_name)
    device = find_device(device_name)
    figures = {}
    for figure, work in (("step", trainer.optimizer_step), ("forward", lambda: forward_only(trainer))):
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
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    """Start llama2.c's train.py on the same tokens, suspend it between its turns, and stop it at the end.

    Args:
        source: its repository.
        shape: its options that affect the time; by default one micro-batch a step and VOCABULARY.
        tokens: the training tokens.
        device: the device.
        threads: CPU threads.
        steps: steps of a turn.
        home: the folder to create for it.

    Yields:
        Its turn, which resumes the program until it has reported enough steps.

    Raises:
        UsageError: if it stops.
    """
    vocab_size = shape.get("vocab_size", VOCABULARY)
    llama2c.copy_home(source, home, {"train": tokens, "val": tokens}, vocab_size)
    options: dict[str, Any] = {"gradient_accumulation_steps": 1, "vocab_size": vocab_size, **shape}
    options |= {"n_kv_heads": shape["n_heads"], "device": str(device)}
    options |= {"eval_iters": 1, "eval_interval": 10**6, "max_iters": 10**6}
    process = llama2c.start(home, options, threads)
    memory_bytes = 0

    def step() -> float:
        """Return the milliseconds of the next reported step."""
        nonlocal memory_bytes
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"memory (\d+)", line):
                memory_bytes = int(found[1])
            elif found := re.search(r"\| ([\d.]+)ms \|", line):
                return float(found[1])
        last = (home / llama2c.LOG).read_text().strip().splitlines()[-1:]
        raise UsageError(f"{source}: its train.py stopped with exit code {process.wait()}: {' '.join(last)}")

    def turn() -> dict[str, float]:
        """Resume the program, skip the step during which it was suspended, and time the following ones."""
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
    """Yield the lines about one shape: a row per contender, with its speed relative to the peer or the first rung."""
    model = TrainConfig(**shape).model_config(VOCABULARY)
    tokens = shape["batch_size"] * shape["max_seq_len"]
    batch = f"{shape['batch_size']} x {shape['max_seq_len']}"
    yield f"{name}: {model.n_params / 1e6:.0f}M parameters, {batch} tokens a step, medians of the turns"
    found = contenders_of(results, name)
    base = ([key for key in found if key.contender == PEER] or found)[:1]
    rows = [["", "", "forward ms", "step ms", "tok/s", "TFLOP/s", "MFU", "memory MB", "compile s", "ratio"]]
    for key in found:
        step, base_step = statistics.median(results.turns[key]), statistics.median(results.turns[base[0]])
        forward_ms, memory, compile_s = (
            results.median(*key._replace(figure=figure)) for figure in ("forward", "memory", "compile")
        )
        tflops = training_flops(model) * 1e3 * tokens / step / 1e12
        rows.append([
            key.contender,
            key.dtype,
            f"{forward_ms:.1f}" if forward_ms else "-",
            f"{step:.1f}",
            f"{1e3 * tokens / step:,.0f}",
            f"{tflops:.3g}",
            f"{tflops / peak:.1%}" if peak else "-",
            f"{memory / 1e6:,.0f}" if memory else "-",
            f"{compile_s:.1f}" if compile_s else "-",
            f"{base_step / step:.2f}",
        ])  # fmt: skip
    yield from (f"  {line}" for line in aligned(rows))
    yield from (f"  {key.contender}: {reason}" for key, reason in results.missing.items() if key.shape == name)
    if base:
        yield f"  ratio: tokens/s against {base[0].contender}"


def contenders_of(results: Results, shape: str) -> list[Key]:
    """Return the keys of the contenders that took turns at a shape, in order."""
    return [key for key in results.turns if key.shape == shape and key.figure == "step"]


def draw_steps(figure: Any, results: Results, shapes: Sequence[str]) -> None:
    """Draw a bar for each contender's step, the forward pass a part of it."""
    figure.set_size_inches(8, 3 * len(shapes))
    for axis, name in zip(figure.subplots(len(shapes), squeeze=False)[:, 0], shapes, strict=True):
        found = contenders_of(results, name)[::-1]
        labels = [f"{key.contender} ({key.dtype})" for key in found]
        for part in ("step", "forward"):
            values = [results.median(*key._replace(figure=part)) or 0.0 for key in found]
            axis.barh(labels, values, label="whole step" if part == "step" else "forward alone")
        axis.set(title=name, xlabel="ms a step")
        axis.legend(fontsize="small")


if __name__ == "__main__":
    run(main)
