"""How fast the runtime is on this machine, beside the machine's memory and, if they are named, llama2.c's programs.

python -m benchmarks.runtime [--peer-run PATH/run --peer-runq PATH/runq]

The models have random weights, which cost as much as trained ones. Machines are noisy: all contenders take turns, and
every figure is the median of its turns. The peers are to be built with OpenMP: `make runomp` in llama2.c.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
import numpy as np

from configurator import parse
from llamalet import format, kernels, team, tokenizer
from llamalet.config import ModelConfig
from llamalet.errors import ConfigError, run
from llamalet.generate import generate
from llamalet.sampler import Sampler
from llamalet.transformer import Transformer

SHAPES = {
    "15M": ModelConfig.create(dim=288, n_layers=6, n_heads=6, hidden_dim=768, vocab_size=32000, max_seq_len=256),
    "42M": ModelConfig.create(dim=512, n_layers=8, n_heads=8, hidden_dim=1376, vocab_size=32000, max_seq_len=1024),
    "110M": ModelConfig.create(dim=768, n_layers=12, n_heads=12, hidden_dim=2048, vocab_size=32000, max_seq_len=1024),
}
VERSIONS = {"float32": 0, "int8": 2}
PREFILL_TOKENS = 128
SAMPLE = Path(__file__).parent.parent / "sample.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """The options of benchmarks/runtime.py."""

    shapes: str = "15M,110M"
    """The models, with commas between them: 15M, 42M, 110M."""
    tokens: int = 128
    """How many tokens a turn of decoding makes."""
    turns: int = 5
    """How many turns each contender has."""
    threads: int | None = None
    """How many threads compute, the peers' too; one for each physical core if not given."""
    peer_run: str | None = None
    """llama2.c's run, on the same float32 files."""
    peer_runq: str | None = None
    """llama2.c's runq, on the same int8 files."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = [f"shapes={name}: must be one of {', '.join(SHAPES)}" for name in self.names if name not in SHAPES]
        if not 2 <= self.tokens < 256:
            problems.append(f"tokens={self.tokens}: must lie between 2 and 255, the smallest context")
        if self.turns < 1:
            problems.append(f"turns={self.turns}: must be positive")
        for option in ("peer_run", "peer_runq"):
            path = getattr(self, option)
            if path is not None and not os.access(path, os.X_OK):
                problems.append(f"{option}={path}: no program there")
        if problems:
            raise ConfigError.from_problems(problems)

    @property
    def names(self) -> list[str]:
        """The names of the shapes."""
        return [name.strip() for name in self.shapes.split(",")]

    def peer(self, dtype: str) -> str | None:
        """Return llama2.c's program for models of this type."""
        return self.peer_run if dtype == "float32" else self.peer_runq


@dataclass
class Contest:
    """One model file and what was measured on it, a figure for each turn."""

    shape: str
    dtype: str
    file: format.ModelFile
    transformer: Transformer
    figures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decoded token needs: everything but an untied embedding table's other rows."""
        return sum(array.nbytes for tensor in self.file.tensors.values() for array in _arrays(tensor))

    def median(self, figure: str) -> float:
        """Return the median of a figure's turns."""
        return statistics.median(self.figures[figure])


def main(argv: Sequence[str]) -> int:
    """Measure and print; return 0."""
    config = parse(BenchConfig, argv, program="python -m benchmarks.runtime", description=__doc__ or "")
    threads = team.thread_count(config.threads)
    with tempfile.TemporaryDirectory(prefix="llamalet-bench-") as folder:
        vocabulary = Path(folder) / "tokenizer.bin"
        for name in config.names:
            contests = [_make_contest(Path(folder), vocabulary, name, dtype, threads) for dtype in VERSIONS]
            for turn in range(config.turns):
                for contest in contests:
                    _say(f"{name} {contest.dtype}: turn {turn + 1} of {config.turns}")
                    _take_turn(contest, config, vocabulary, threads)
            for line in _report(contests, config, threads):
                print(line, flush=True)
    return 0


def _make_contest(folder: Path, vocabulary: Path, name: str, dtype: str, threads: int) -> Contest:
    """Write a model with random weights and load it; compile the kernels."""
    config = SHAPES[name]
    path = folder / f"{name}-{dtype}.bin"
    _say(f"{name} {dtype}: writing {path}")
    rng = np.random.default_rng(0)
    tensors = {
        spec.name: rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(0.02)
        if len(spec.shape) == 2
        else np.ones(spec.shape, np.float32)
        for spec in format.tensor_specs(1, config)
    }
    format.write(path, VERSIONS[dtype], config, tensors, tokenizer_sha256=None)
    vocabulary.write_bytes(tokenizer.pack(_pieces(config.vocab_size)))
    file = format.read(path)
    transformer = Transformer(file, threads=threads)
    transformer.decode(transformer.new_cache(), tokenizer.BOS_ID)
    return Contest(name, dtype, file, transformer)


def _pieces(vocab_size: int) -> list[tokenizer.Piece]:
    """Return the rows of a tokenizer.bin that llama2.c reads, with made-up words."""
    controls = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    byte_pieces = [f"<0x{byte:02X}>".encode() for byte in range(256)]
    words = [b" "] + [f" w{number}".encode() for number in range(vocab_size - len(controls) - len(byte_pieces) - 1)]
    return [(piece, -float(rank)) for rank, piece in enumerate(controls + byte_pieces + words)]


def _take_turn(contest: Contest, config: BenchConfig, vocabulary: Path, threads: int) -> None:
    """Measure everything once, each figure right after the peer's."""
    measures: dict[str, Callable[[], float | None]] = {
        "peer": lambda: _peer_decode(config.peer(contest.dtype), contest.file.path, vocabulary, config.tokens, threads),
        "decode": lambda: _decode(contest.transformer, config.tokens),
        "read": lambda: _read_bandwidth(contest.weight_bytes, threads),
        "prefill": lambda: _prefill(contest.transformer),
        "start": lambda: _start(contest.file.path, vocabulary, threads),
    }
    for name, measure in measures.items():
        figure = measure()
        if figure is not None:
            contest.figures.setdefault(name, []).append(figure)


def _decode(transformer: Transformer, n_tokens: int) -> float:
    """Return tokens/s of the tokens after the first, chosen greedily, as llama2.c counts them."""
    sampler = Sampler(transformer.config.vocab_size, temperature=0)
    tokens = generate(transformer, [tokenizer.BOS_ID], sampler, max_new_tokens=n_tokens)
    next(tokens)
    start = time.perf_counter()
    n = sum(1 for _ in tokens)
    return n / (time.perf_counter() - start)


def _prefill(transformer: Transformer) -> float:
    """Return tokens/s of a prompt of PREFILL_TOKENS."""
    prompt = np.arange(1, PREFILL_TOKENS + 1)
    cache = transformer.new_cache()
    start = time.perf_counter()
    transformer.prefill(cache, prompt)
    return PREFILL_TOKENS / (time.perf_counter() - start)


def _peer_decode(program: str | None, model: Path, vocabulary: Path, n_tokens: int, threads: int) -> float | None:
    """Return the tokens/s that a program of llama2.c's reports."""
    if program is None:
        return None
    command = [program, str(model), "-z", str(vocabulary), "-t", "0", "-n", str(n_tokens), "-i", ""]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, check=True)
    found = re.search(rb"achieved tok/s: ([0-9.]+)", done.stderr)
    if found is None:
        raise ConfigError(f"{program}: reports no tok/s for {model}; is it llama2.c's?")
    return float(found[1])


def _start(model: Path, vocabulary: Path, threads: int) -> float:
    """Return the seconds from starting sample.py to its first word."""
    command = [
        sys.executable,
        str(SAMPLE),
        str(model),
        "-z",
        str(vocabulary),
        "-t",
        "0",
        "-n",
        "8",
        f"--threads={threads}",
    ]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return time.perf_counter() - start


def _read_bandwidth(n_bytes: int, threads: int) -> float:
    """Return the bytes/s at which all threads together read memory of this size, again and again: the floor."""
    memory = np.ones(n_bytes // 4, np.float32)
    readers = team.Team(_read, threads)
    arguments = (memory, np.zeros(READ_BLOCKS, np.float32))
    readers.run(arguments)
    passes = max(3, int(2e8 / n_bytes))
    start = time.perf_counter()
    for _ in range(passes):
        readers.run(arguments)
    elapsed_s = time.perf_counter() - start
    readers.stop()
    return passes * memory.nbytes / elapsed_s


READ_BLOCKS = 16


@numba.njit(nogil=True)
def _read(memory: Any, sums: Any, shared: Any, binding: int, helping: bool) -> None:
    """Add all of the memory up, a block at a time, as kernels.work goes through a stage."""
    if not helping:
        team.open_job(shared)
    looks = 0
    while not helping or looks < team.LOOKS:
        ticket = team.atomic_load(shared, team.TICKET)
        if team.atomic_load(shared, team.BINDING) != binding:
            return
        stage, block = team.stage_of(ticket), team.block_of(ticket)
        if stage > 0 and not helping:
            return
        if stage > 0 or block >= READ_BLOCKS:
            team.wait(looks)
            looks += 1
        elif team.take(shared, ticket):
            size = len(memory) // READ_BLOCKS
            sums[block] = kernels.total(memory[block * size : (block + 1) * size])
            if team.complete(shared, READ_BLOCKS):
                team.open_next_stage(shared)
            looks = 0


def _arrays(tensor: format.Tensor) -> Sequence[np.ndarray]:
    """Return the arrays of a tensor: itself, or its values and scales."""
    return [tensor] if isinstance(tensor, np.ndarray) else list(tensor)


def _report(contests: Sequence[Contest], config: BenchConfig, threads: int) -> Iterator[str]:
    """Yield the lines about one shape."""
    shape = contests[0].file.config
    yield (
        f"{contests[0].shape}: dim {shape.dim}, {shape.n_layers} layers, vocabulary {shape.vocab_size}; "
        f"{threads} threads, medians of {config.turns} turns"
    )
    for contest in contests:
        decode, read = contest.median("decode"), contest.median("read")
        yield (
            f"  {contest.dtype:8} decode {decode:7.1f} tokens/s, {decode * contest.weight_bytes / read:5.0%} of what "
            f"reading {contest.weight_bytes / 1e6:.1f} MB at {read / 1e9:.1f} GB/s allows; "
            f"prefill {PREFILL_TOKENS}: {contest.median('prefill'):7.1f} tokens/s; "
            f"first word after {contest.median('start'):.2f} s"
        )
        peer = config.peer(contest.dtype)
        if peer is not None:
            rate = contest.median("peer")
            yield f"  {contest.dtype:8} {Path(peer).name:6} {rate:7.1f} tokens/s; ratio {decode / rate:.2f}"


def _say(message: str) -> None:
    """Print a line about the progress."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
