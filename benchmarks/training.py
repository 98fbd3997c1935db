"""How fast a training step is on this machine, rung by rung, beside llama2.c's train.py if it is named.

python -m benchmarks.training [--peer-train PATH/llama2.c]

The rungs train the stories15M shape on random tokens, which cost as much as stories. Machines are noisy: all contenders
take turns, and every figure is the median of its turns. Compilation happens before the first turn and is not counted.
"""

import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import model as plain
from configurator import parse
from llamalet import shards
from llamalet.errors import ConfigError, UsageError, run
from llamalet.shards import Block, Meta, Shards, Split
from training.config import TrainConfig
from training.distributed import Processes, find_device
from training.progress import training_flops
from training.trainer import Trainer

RUNGS: dict[str, dict[str, Any]] = {
    "eager, float32": {"compile": False, "dtype": "float32"},
    "compiled, float32": {"compile": True, "dtype": "float32"},
    "compiled, bfloat16": {"compile": True, "dtype": "bfloat16"},
}
AS_TRAINED = "as train.py does it"
PEER = "llama2.c's train.py"

Step = Callable[[], float]
"""Takes one optimizer step and returns the milliseconds it took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """The options of benchmarks/training.py."""

    dim: int = 288
    """Width of the model."""
    n_layers: int = 6
    """Number of layers."""
    n_heads: int = 6
    """Number of heads."""
    vocab_size: int = 32000
    """Tokens in the vocabulary."""
    max_seq_len: int = 256
    """Tokens of a sequence."""
    batch_size: int = 8
    """Sequences of a step."""
    turns: int = 4
    """How many turns each contender has."""
    steps: int = 4
    """How many steps a turn has."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    ladder: bool = True
    """Climb the whole ladder; false measures the last rung alone."""
    peer_train: str | None = None
    """Folder of llama2.c, whose train.py then takes its turns with --compile=True on the same device and batches."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = [f"{name}={getattr(self, name)}: must be positive" for name in ("turns", "steps") if self.turns < 1]
        if self.peer_train is not None and not (Path(self.peer_train) / "train.py").is_file():
            problems.append(f"peer_train={self.peer_train}: holds no train.py")
        if self.peer_train is not None and self.vocab_size != 32000:
            problems.append(
                f"vocab_size={self.vocab_size}: llama2.c's train.py takes other sizes only with its own data"
            )
        if problems:
            raise ConfigError.from_problems(problems)


def main(argv: Sequence[str]) -> int:
    """Measure and print; return 0."""
    config = parse(BenchConfig, argv, program="python -m benchmarks.training", description=__doc__ or "")
    with tempfile.TemporaryDirectory(prefix="llamalet-bench-") as temporary:
        folder = Path(temporary)
        tokens = np.random.default_rng(0).integers(3, config.vocab_size, 200 * config.max_seq_len + 1)
        write_data(folder / "data", tokens, config.vocab_size)
        contenders: dict[str, Step] = {}
        for name, options in RUNGS.items() if config.ladder else ():
            contenders[name] = make_rung(config, folder, options, plain_kernels=True)
        contenders[AS_TRAINED] = make_rung(config, folder, {}, plain_kernels=False)
        with peer(config, folder, tokens) as peer_step:
            if peer_step:
                contenders[PEER] = peer_step
            report(config, measure(contenders, config.turns, config.steps))
    return 0


def write_data(folder: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Write the same tokens as the training and the validation split of prepared data."""
    folder.mkdir()
    block = Block(tokens, documents=1, text_bytes=len(tokens))
    splits = {
        name: Split((shards.write_shard(folder / f"{name}_00000.bin", [block], vocab_size),)) for name in shards.SPLITS
    }
    meta = Meta(
        source="random", recipe={}, bos_id=1, eos_id=2, vocab_size=vocab_size, splits=splits, tokenizer="none",
        tokenizer_sha256="0" * 64,
    )  # fmt: skip
    shards.write_meta(folder / shards.META_FILE, meta)
    Shards.open(folder)


def make_rung(config: BenchConfig, folder: Path, options: dict[str, Any], *, plain_kernels: bool) -> Step:
    """Return the step of a trainer with these options; it has already taken one, and so is compiled.

    Args:
        config: the shape.
        folder: holds data/.
        options: of TrainConfig.
        plain_kernels: whether to leave attention and loss as model.py has them.
    """
    shape: dict[str, Any] = {
        name: getattr(config, name) for name in ("dim", "n_layers", "n_heads", "max_seq_len", "batch_size")
    }
    device = find_device(config.device)
    trainer = Trainer(
        TrainConfig(data=str(folder / "data"), out_dir=str(folder / "out"), **shape, **options),
        Processes(0, 1, 1, device),
    )
    if plain_kernels:
        trainer.model.head_loss = plain.head_loss
        for module in trainer.model.modules():
            if isinstance(module, plain.Attention):
                module.attend = plain.attend

    def step() -> float:
        start = time.perf_counter()
        trainer.optimizer_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    print(f"preparing {trainer.dtype}, {trainer.not_compiled or 'compiled'}", file=sys.stderr, flush=True)
    step()
    return step


@contextmanager
def peer(config: BenchConfig, folder: Path, tokens: np.ndarray) -> Iterator[Step | None]:
    """Start llama2.c's train.py on the same tokens, let it stand still between its turns, and end it at the end.

    Yields:
        Its step, which lets the program go on until it reports one more; None if it is not wanted.
    """
    if config.peer_train is None:
        yield None
        return
    home = folder / "llama2.c"
    data = home / "data" / "TinyStories_all_data"
    data.mkdir(parents=True)
    for source in Path(config.peer_train).glob("*.py"):
        shutil.copy(source, home)
    for name in ("data00.bin", "data01.bin"):
        tokens.astype("<u2").tofile(data / name)
    device = find_device(config.device).type
    options = {name: getattr(config, name) for name in ("dim", "n_layers", "n_heads", "max_seq_len", "batch_size")}
    options |= {"n_kv_heads": config.n_heads, "device": device, "compile": True, "eval_iters": 1, "max_iters": 10**6}
    options |= {"gradient_accumulation_steps": 1, "eval_interval": 10**6, "out_dir": "out"}
    command = [sys.executable, "-u", "train.py", *(f"--{key}={value}" for key, value in options.items())]
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def step() -> float:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"\| ([\d.]+)ms \|", line):
                return float(found[1])
        raise UsageError(f"{config.peer_train}: its train.py stopped with exit code {process.wait()}; run it by itself")

    def turn() -> float:
        """Wake the program, pass over the step that its sleep fell into, and time the next."""
        process.send_signal(signal.SIGCONT)
        step()
        milliseconds = step()
        process.send_signal(signal.SIGSTOP)
        return milliseconds

    try:
        print("preparing llama2.c's train.py", file=sys.stderr, flush=True)
        step()
        turn()
        yield turn
    finally:
        process.kill()
        process.wait()


def measure(contenders: dict[str, Step], turns: int, steps: int) -> dict[str, float]:
    """Return the median milliseconds of a step of each contender, all taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        for name, step in contenders.items():
            print(f"turn {turn + 1} of {turns}: {name}", file=sys.stderr, flush=True)
            times[name] += [step() for _ in range(steps)]
    return {name: statistics.median(values) for name, values in times.items()}


def report(config: BenchConfig, milliseconds: dict[str, float]) -> None:
    """Print a line for each contender."""
    shape: dict[str, Any] = {name: getattr(config, name) for name in ("dim", "n_layers", "n_heads", "max_seq_len")}
    flops = training_flops(TrainConfig(**shape).model_config(config.vocab_size))
    tokens = config.batch_size * config.max_seq_len
    print(f"{config.batch_size} x {config.max_seq_len} tokens a step, {torch.get_num_threads()} threads")
    print(f"{'':24} {'ms a step':>9} {'tok/s':>9} {'GFLOP/s':>8} {'against':>9}")
    base = milliseconds.get(PEER) or next(iter(milliseconds.values()))
    for name, value in milliseconds.items():
        rate = 1e3 * tokens / value
        print(f"{name:24} {value:9.1f} {rate:9,.0f} {flops * rate / 1e9:8.0f} {base / value:8.2f}x")
    print(f"against: {PEER if PEER in milliseconds else next(iter(milliseconds))}")


if __name__ == "__main__":
    run(main)
