"""How fast the runtime is on this machine, compared with its memory and, if given, with llama.cpp and llama2.c.

make bench
make bench ARGS="--peer-llama-bench=PATH/llama-bench --peer-run=PATH/run --peer-runq=PATH/runq"
python -m benchmarks.runtime --shapes=15M --dtypes=q8 --figures=decode --turns=3

The models have random weights, which cost as much as trained ones, and only as much context as the figures need.
Machines are noisy, so all contenders take turns, and every figure is the median over the turns. Build llama.cpp as
Release with GGML_NATIVE, llama2.c with `make runomp`.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import dataclasses
import os
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from benchmarks import peers, report
from benchmarks.harness import OUT, kind_and_message, load_average, machine, peak_resident_bytes, run_benchmark
from benchmarks.report import LLAMA2C, POSITION_PREFIX, Key, Results
from configurator import parse
from llamalet import model_file, tokenizer
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.config import Llama3Scaling, ModelConfig
from llamalet.cores import thread_count
from llamalet.errors import ConfigError, UsageError, note
from llamalet.kernels.transformer import Transformer
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import cache_bytes
from llamalet.model_file.header import DTYPES

CONTEXT = 1024
FIGURES = ("decode", "positions", "prefill", "batch", "start")
POSITIONS = (1, 128, 256, 512, 1024)
PROMPTS = (128, 512)
BATCHES = (1, 16, 64)

# Length of the story with which sample.py's start is measured.
START_POSITIONS = 16

# Above this load at the start, the comparison with the peers is not reliable.
BUSY = 0.5

SAMPLE = Path(__file__).parent.parent / "sample.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model's shape, and the amount of work per turn, the same for us and the peers."""

    config: ModelConfig
    dtypes: tuple[str, ...] = DTYPES
    tokens: int = 128
    batch_tokens: int = 16
    repeats: int = 1


SHAPES = {
    "15M": Shape(
        config=ModelConfig.create(
            dim=288, n_layers=6, n_heads=6, hidden_dim=768, vocab_size=32000, max_seq_len=CONTEXT
        ),
        batch_tokens=32,
        repeats=5,
    ),
    "110M": Shape(
        config=ModelConfig.create(
            dim=768, n_layers=12, n_heads=12, hidden_dim=2048, vocab_size=32000, max_seq_len=CONTEXT
        ),
        repeats=2,
    ),
    # Llama 3.2 1B. Its float32 file has 5 GB, so it is only written on request.
    "1B": Shape(
        config=ModelConfig.create(
            dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=8192, vocab_size=128256, max_seq_len=CONTEXT,
            rope_theta=500000.0,
            rope_scaling=Llama3Scaling(
                factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
            ),
        ),
        dtypes=("q8", "q4"),
        tokens=32,
        batch_tokens=8,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeBenchConfig:
    """The options of benchmarks/runtime.py."""

    shapes: str = ",".join(SHAPES)
    """The models, separated by commas: 15M, 110M, 1B."""
    dtypes: str | None = None
    """The weights' types: f32, bf16, q8, q4. By default all, and q8 and q4 for 1B."""
    figures: str = ",".join(FIGURES)
    """What to measure; start is the time to the first word, and resident memory."""
    turns: int = 5
    """Turns of each contender."""
    tokens: int | None = None
    """Tokens decoded per turn; by default 128, or 32 for 1B."""
    threads: int | None = None
    """Threads, the peers' too; by default one per physical core."""
    out: str = str(OUT)
    """Folder for runtime.json and runtime.png."""
    peer_llama_bench: str | None = None
    """llama.cpp's llama-bench, on GGUF files of the same shapes."""
    peer_batched_bench: str | None = None
    """llama.cpp's llama-batched-bench; by default the one next to llama-bench."""
    peer_run: str | None = None
    """llama2.c's run, on float32 files of the same shapes."""
    peer_runq: str | None = None
    """llama2.c's runq, on int8 files of the same shapes."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = not_positive(self, "turns")
        for option, known in (("shapes", SHAPES), ("dtypes", DTYPES), ("figures", FIGURES)):
            unknown = [name for name in self.names(option) if name not in known]
            problems += [f"{option}={name}: must be one of {', '.join(known)}" for name in unknown]
        if self.tokens is not None and not 2 <= self.tokens <= CONTEXT:
            problems.append(f"tokens={self.tokens}: must lie between 2 and {CONTEXT}")
        for option in ("peer_llama_bench", "peer_batched_bench", "peer_run", "peer_runq"):
            path = getattr(self, option)
            if path is not None and not os.access(path, os.X_OK):
                problems.append(f"{option}={path}: not an executable program")
        ConfigError.raise_for(problems)

    def names(self, option: str) -> list[str]:
        """Return the names listed in an option."""
        return [name.strip() for name in (getattr(self, option) or "").split(",") if name.strip()]

    def shape(self, name: str) -> Shape:
        """Return a shape with the dtypes and tokens that the options ask for."""
        shape = SHAPES[name]
        dtypes = tuple(self.names("dtypes")) or shape.dtypes
        return dataclasses.replace(shape, dtypes=dtypes, tokens=self.tokens or shape.tokens)

    @property
    def batched_bench(self) -> str | None:
        """The path of llama-batched-bench, if there is one."""
        if self.peer_batched_bench is not None or self.peer_llama_bench is None:
            return self.peer_batched_bench
        neighbour = Path(self.peer_llama_bench).with_name("llama-batched-bench")
        return str(neighbour) if os.access(neighbour, os.X_OK) else None

    def llama2c(self, dtype: str) -> str | None:
        """Return llama2.c's program for models of this type, if there is one."""
        return {"f32": self.peer_run, "q8": self.peer_runq}.get(dtype)


@dataclass(frozen=True, slots=True)
class Contest:
    """A shape and a dtype: the paths of the files, and our model, None if it failed."""

    name: str
    shape: Shape
    dtype: str
    files: Path
    vocabulary: Path
    threads: int
    transformer: Transformer | None

    def file(self, program: str) -> Path:
        """Return the model's path for llamalet (bin), llama.cpp (gguf) or llama2.c (llama2c)."""
        return self.files / f"{self.name}-{self.dtype}.{program}"


def main(argv: Sequence[str]) -> int:
    """Measure and print; return 0."""
    config = parse(RuntimeBenchConfig, argv, program="python -m benchmarks.runtime", description=__doc__)
    threads = thread_count(config.threads)
    if (busy := load_average()) > BUSY:
        note(f"warning: load {busy:.1f}: other programs are running, which slows the peers more than us")

    def measure(name: str, folder: Path, results: Results) -> Iterator[str]:
        measure_shape(config, name, folder, threads, results)
        return report.shape_lines(results, name, SHAPES[name].config, config.turns)

    facts = {"builds": machine(threads) | peer_builds(config), "options": config}
    shapes = {name: config.shape(name) for name in config.names("shapes")}
    results = run_benchmark("runtime", facts, shapes, measure, report.draw_runtime, Path(config.out))
    for check in results.checks():
        print(check)
    return 0


def peer_builds(config: RuntimeBenchConfig) -> dict[str, str]:
    """Return the peers' versions and build flags."""
    llama_cpp = {"llama-bench": config.peer_llama_bench, "llama-batched-bench": config.batched_bench}
    llama2c = {"run": config.peer_run, "runq": config.peer_runq}
    builds = {name: peers.llama_cpp_build(program) for name, program in llama_cpp.items() if program is not None}
    return builds | {name: peers.llama2c_build(program) for name, program in llama2c.items() if program is not None}


def measure_shape(config: RuntimeBenchConfig, name: str, folder: Path, threads: int, results: Results) -> None:
    """Write the files of a shape and let all contenders take their turns."""
    contests = [make_contest(config, name, dtype, folder, threads, results) for dtype in config.shape(name).dtypes]
    for turn in range(config.turns):
        for contest in contests:
            found = [*our_turn(config, contest, results), *peer_turns(config, contest)]
            for key, value in found:
                results.add(key, value)
            rates = ", ".join(f"{key.contender} {key.figure} {value:.4g}" for key, value in found)
            note(f"{name} {contest.dtype} turn {turn + 1} of {config.turns}: {rates}")


def make_contest(
    config: RuntimeBenchConfig, name: str, dtype: str, folder: Path, threads: int, results: Results
) -> Contest:
    """Write our file and the peers', load our model and compile its kernels."""
    shape, rng = config.shape(name), np.random.default_rng(0)
    note(f"{name} {dtype}: writing files")
    vocabulary = folder / "tokenizer.bin"
    contest = Contest(name, shape, dtype, files=folder, vocabulary=vocabulary, threads=threads, transformer=None)
    peers.write_vocabulary(vocabulary, shape.config.vocab_size)
    if config.peer_llama_bench or config.batched_bench:
        peers.write_gguf(contest.file("gguf"), shape.config, dtype, rng)
    if config.llama2c(dtype) and shape.config.rope_scaling is None:
        peers.write_llama2c(contest.file("llama2c"), shape.config, dtype, rng)
    try:
        peers.write_llamalet(contest.file("bin"), shape.config, dtype, rng)
        transformer = Transformer(model_file.read(contest.file("bin")), threads=threads)
        # One warm-up of everything that is compiled or allocated at first use.
        transformer.decode(transformer.new_cache(), tokenizer.BOS_ID)
        transformer.prefill(transformer.new_cache(), range(1, PROMPTS[0] + 1))
    except Exception as error:  # the other models are measured even if this one fails
        results.missing[Key(name, dtype, "decode")] = kind_and_message(error)
        return contest
    results.add(Key(name, dtype, "file"), contest.file("bin").stat().st_size)
    return dataclasses.replace(contest, transformer=transformer)


# -- turns ------------------------------------------------------------------------------------------------------------


def our_turn(config: RuntimeBenchConfig, contest: Contest, results: Results) -> Iterator[tuple[Key, float]]:
    """Measure each of our figures once; record why any is missing."""
    if contest.transformer is None:
        return
    measures: Mapping[str, Callable[[Contest, Transformer], Iterator[tuple[str, float]]]] = {
        "decode": measure_decode,
        "positions": measure_positions,
        "prefill": measure_prefill,
        "batch": measure_batches,
        "start": measure_start,
    }
    for group in config.names("figures"):
        try:
            for figure, value in measures[group](contest, contest.transformer):
                yield Key(contest.name, contest.dtype, figure), value
        except Exception as error:  # as in make_contest
            results.missing[Key(contest.name, contest.dtype, group)] = f"{group}: {kind_and_message(error)}"


def peer_turns(config: RuntimeBenchConfig, contest: Contest) -> Iterator[tuple[Key, float]]:
    """Let each peer take its turn at the figures that it can measure."""
    figures, shape = config.names("figures"), contest.shape
    rates: peers.Rates = {}
    prompts, tokens = PROMPTS if "prefill" in figures else (), shape.tokens if "decode" in figures else 0
    if config.peer_llama_bench and (prompts or tokens):
        rates |= peers.llama_bench(
            config.peer_llama_bench, contest.file("gguf"), contest.threads,
            prompts=prompts, tokens=tokens, repeats=shape.repeats,
        )  # fmt: skip
    if config.batched_bench and "batch" in figures:
        rates |= peers.batched_bench(
            config.batched_bench, contest.file("gguf"), contest.threads, batches=BATCHES, tokens=shape.batch_tokens
        )
    program, file = config.llama2c(contest.dtype), contest.file("llama2c")
    if program and tokens and file.exists():
        rate = peers.llama2c_decode(program, file, contest.vocabulary, contest.threads, tokens)
        rates[LLAMA2C, "decode"] = rate
    for (contender, figure), rate in rates.items():
        yield Key(contest.name, contest.dtype, figure, contender), rate


def measure_decode(contest: Contest, transformer: Transformer) -> Iterator[tuple[str, float]]:
    """Yield the tokens/s of greedy decoding from the start of a story, and the memory's bytes/s."""
    cache = transformer.new_cache(contest.shape.tokens)

    def story() -> None:
        cache.truncate(0)
        token = tokenizer.BOS_ID
        for _ in range(contest.shape.tokens):
            token = int(transformer.decode(cache, token).argmax())

    yield "decode", contest.shape.tokens / seconds(story, contest.shape.repeats)
    yield "read", read_bandwidth(contest.file("bin").stat().st_size, contest.threads)


def measure_positions(contest: Contest, transformer: Transformer) -> Iterator[tuple[str, float]]:
    """Yield the tokens/s of decoding at each of POSITIONS; the cache's content does not matter."""
    cache = transformer.new_cache(CONTEXT)
    c = transformer.config
    numbers = np.full((c.n_kv_heads, CONTEXT, c.head_dim), 0.01, np.float32)
    for layer in range(c.n_layers):
        cache.write(layer, 0, numbers, numbers)

    for position in POSITIONS:

        def token(position: int = position) -> None:
            cache.length = position - 1
            transformer.decode(cache, tokenizer.BOS_ID)

        token()
        yield f"{POSITION_PREFIX}{position}", 1 / seconds(token, 4 * contest.shape.repeats)


def measure_prefill(contest: Contest, transformer: Transformer) -> Iterator[tuple[str, float]]:
    """Yield the tokens/s of prompts."""
    cache = transformer.new_cache(max(PROMPTS))
    for length in PROMPTS:
        tokens = np.arange(1, length + 1) % contest.shape.config.vocab_size

        def prompt(tokens: Any = tokens) -> None:
            cache.truncate(0)
            transformer.prefill(cache, tokens)

        yield f"prefill {length}", length / seconds(prompt, contest.shape.repeats)


def measure_batches(contest: Contest, transformer: Transformer) -> Iterator[tuple[str, float]]:
    """Yield the tokens/s of sequences decoded together, each after a short prompt."""
    n_tokens = contest.shape.batch_tokens
    for size in BATCHES:
        caches = [transformer.new_cache(peers.BATCH_PROMPT + n_tokens) for _ in range(size)]
        for cache in caches:
            transformer.prefill(cache, range(1, peers.BATCH_PROMPT + 1))
        ids = [(1 + 7 * number) % contest.shape.config.vocab_size for number in range(size)]

        def together(n_tokens: int, caches: list[KVCache] = caches, ids: list[int] = ids) -> None:
            for cache in caches:
                cache.truncate(peers.BATCH_PROMPT)
            for _ in range(n_tokens):
                transformer.decode_batch(caches, ids)

        together(1)
        yield f"batch {size}", size * n_tokens / seconds(partial(together, n_tokens))


def measure_start(contest: Contest, transformer: Transformer) -> Iterator[tuple[str, float]]:
    """Yield the seconds from starting sample.py to its first word, its resident bytes, and its KV cache's bytes."""
    options = ["-t", "0", "-n", str(START_POSITIONS), "--ignore-eos", f"--threads={contest.threads}"]
    command = [sys.executable, str(SAMPLE), str(contest.file("bin")), "-z", str(contest.vocabulary), *options]
    resident, start = 0, time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if not os.read(process.stdout.fileno(), 1):
            raise UsageError(f"{' '.join(command)}: printed nothing")
        yield "start", time.perf_counter() - start
        while os.read(process.stdout.fileno(), 4096):
            resident = peak_resident_bytes(process.pid) or resident
    cache = transformer.new_cache()
    cache.reserve(START_POSITIONS)
    if resident:
        yield "resident", resident
        yield "cache", cache_bytes(transformer.config, cache.capacity, cache.kind)


# -- instruments ------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], None], repeats: int = 1) -> float:
    """Return the mean duration of `work`."""
    return timeit.timeit(work, number=repeats) / repeats


def read_bandwidth(n_bytes: int, threads: int) -> float:
    """Return the bytes/s at which all threads together read memory of this size, repeatedly."""
    memory = np.ones(n_bytes // 4, np.float32)
    shares = np.array_split(memory, threads)
    passes = max(2, int(4e9 / n_bytes))
    with ThreadPoolExecutor(threads) as pool:

        def read_all(n_passes: int) -> None:
            list(pool.map(lambda share: _sum(share, n_passes), shares))

        read_all(1)
        return passes * memory.nbytes / seconds(lambda: read_all(passes))


@numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _sum(memory: Any, passes: int) -> float:
    """Sum an array several times; each pass starts elsewhere, or the compiler would compute only one."""
    total = np.float32(0)
    for number in range(passes):
        rest = memory[number % 64 :]  # with a slice the compiler knows that no index is negative
        for index in range(len(rest)):
            total += rest[index]
    return float(total)


if __name__ == "__main__":
    run(main)
