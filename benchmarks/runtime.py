"""How fast the runtime is on this machine, beside the machine's memory and, if they are named, llama.cpp and llama2.c.

make bench
make bench ARGS="--peer-llama-bench=PATH/llama-bench --peer-run=PATH/run --peer-runq=PATH/runq"
python -m benchmarks.runtime --shapes=15M --dtypes=q8 --figures=decode --turns=3

The models have random weights, which cost as much as trained ones, and no more context than the figures need. Machines
are noisy: all contenders take turns, and every figure is the median of its turns. Build llama.cpp as Release with
GGML_NATIVE, llama2.c with `make runomp`.
"""

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from benchmarks import peers, report
from benchmarks.report import LLAMA2C, POSITION_PREFIX, Key, Results
from configurator import parse
from llamalet import model_file, tokenizer
from llamalet.config import ModelConfig, RopeScaling
from llamalet.errors import ConfigError, UsageError, run
from llamalet.kernels.threads import thread_count
from llamalet.kernels.transformer import Transformer
from llamalet.kv_cache import KVCache
from llamalet.model_file.header import DTYPES

CONTEXT = 1024
FIGURES = ("decode", "positions", "prefill", "batch", "start")
POSITIONS = (1, 128, 256, 512, 1024)
PROMPTS = (128, 512)
BATCHES = (1, 16, 64)

# sample.py's start is measured with a story of so many positions.
START_POSITIONS = 16

# With more load than this at the start, the figures say little about the peers.
BUSY = 0.5

SAMPLE = Path(__file__).parent.parent / "sample.py"
OUT = Path("out") / "bench"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model's shape and how much of each work a turn does, ours and the peers' alike."""

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
    # Llama 3.2 1B. Its float32 file has 5 GB, so it is made on request only.
    "1B": Shape(
        config=ModelConfig.create(
            dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=8192, vocab_size=128256, max_seq_len=CONTEXT,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(
                factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
            ),
        ),
        dtypes=("q8", "q4"),
        tokens=32,
        batch_tokens=8,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """The options of benchmarks/runtime.py."""

    shapes: str = ",".join(SHAPES)
    """The models, with commas between them: 15M, 110M, 1B."""
    dtypes: str | None = None
    """The weights' types: f32, bf16, q8, q4; all of them if not given, of 1B only q8 and q4."""
    figures: str = ",".join(FIGURES)
    """What to measure; start is the time to the first word and the resident memory."""
    turns: int = 5
    """How many turns each contender has."""
    tokens: int | None = None
    """How many tokens a turn decodes; 128, or 32 with the 1B shape, if not given."""
    threads: int | None = None
    """How many threads compute, the peers' too; one for each physical core if not given."""
    out: str = str(OUT)
    """The folder for runtime.json and runtime.png."""
    peer_llama_bench: str | None = None
    """llama.cpp's llama-bench, on GGUF files of the same shapes."""
    peer_batched_bench: str | None = None
    """llama.cpp's llama-batched-bench; the one beside llama-bench if not given."""
    peer_run: str | None = None
    """llama2.c's run, on float32 files of the same shapes."""
    peer_runq: str | None = None
    """llama2.c's runq, on int8 files of the same shapes."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = []
        for option, known in (("shapes", SHAPES), ("dtypes", DTYPES), ("figures", FIGURES)):
            unknown = [name for name in self.names(option) if name not in known]
            problems += [f"{option}={name}: must be one of {', '.join(known)}" for name in unknown]
        if self.tokens is not None and not 2 <= self.tokens <= CONTEXT:
            problems.append(f"tokens={self.tokens}: must lie between 2 and {CONTEXT}")
        if self.turns < 1:
            problems.append(f"turns={self.turns}: must be positive")
        for option in ("peer_llama_bench", "peer_batched_bench", "peer_run", "peer_runq"):
            path = getattr(self, option)
            if path is not None and not os.access(path, os.X_OK):
                problems.append(f"{option}={path}: no program there")
        if problems:
            raise ConfigError.from_problems(problems)

    def names(self, option: str) -> list[str]:
        """Return the names that an option lists."""
        return [name.strip() for name in (getattr(self, option) or "").split(",") if name.strip()]

    def shape(self, name: str) -> Shape:
        """Return a shape as the options want it."""
        shape = SHAPES[name]
        dtypes = tuple(self.names("dtypes")) or shape.dtypes
        return dataclasses.replace(shape, dtypes=dtypes, tokens=self.tokens or shape.tokens)

    @property
    def batched_bench(self) -> str | None:
        """The path of llama-batched-bench, if there is one."""
        if self.peer_batched_bench is not None or self.peer_llama_bench is None:
            return self.peer_batched_bench
        beside = Path(self.peer_llama_bench).with_name("llama-batched-bench")
        return str(beside) if os.access(beside, os.X_OK) else None

    def llama2c(self, dtype: str) -> str | None:
        """Return llama2.c's program for models of this type, if there is one."""
        return {"f32": self.peer_run, "q8": self.peer_runq}.get(dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """A shape and a type of weights: where the files are and our model."""

    name: str
    shape: Shape
    dtype: str
    files: Path
    vocabulary: Path
    threads: int
    transformer: Transformer | None

    def file(self, program: str) -> Path:
        """Return the path of the model for llamalet, llama.cpp or llama2.c."""
        return self.files / f"{self.name}-{self.dtype}.{program}"


def main(argv: Sequence[str]) -> int:
    """Measure and print; return 0."""
    config = parse(BenchConfig, argv, program="python -m benchmarks.runtime", description=__doc__ or "")
    threads = thread_count(config.threads)
    builds = machine(threads) | peer_builds(config)
    for name, text in builds.items():
        print(f"{name}: {text}", flush=True)
    facts: dict[str, Any] = {"builds": builds, "options": config, "shapes": {}, "load": load()}
    if facts["load"] > BUSY:
        say(f"warning: load {facts['load']:.1f}: other programs are busy, which costs the peers more than us")
    results, out, start = Results(), Path(config.out), time.perf_counter()
    for name in config.names("shapes"):
        with tempfile.TemporaryDirectory(prefix="llamalet-bench-") as folder:
            measure_shape(config, name, Path(folder), threads, results)
        for line in report.shape_lines(results, name, SHAPES[name].config, config.turns):
            print(line, flush=True)
        facts["shapes"][name] = config.shape(name)
        report.write_json(out / "runtime.json", results, facts | {"seconds": time.perf_counter() - start})
        report.write_chart(out / "runtime.png", results, list(facts["shapes"]))
    for check in results.checks():
        print(check)
    say(f"{out / 'runtime.json'} and runtime.png written after {time.perf_counter() - start:.0f} s")
    return 0


def machine(threads: int) -> dict[str, str]:
    """Return in words what the figures depend on."""
    model = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "numba", "llvmlite"))
    return {
        "machine": f"{model}, {os.cpu_count()} processors, {threads} threads, load {load():.1f} at the start",
        "versions": f"Python {platform.python_version()}, {versions}; {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    }


def load() -> float:
    """Return how many programs wanted to compute in the last minute; 0 where that is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def peer_builds(config: BenchConfig) -> dict[str, str]:
    """Return the peers' versions and build flags."""
    builds = {}
    for name, program, describe in (
        ("llama-bench", config.peer_llama_bench, peers.llama_cpp_build),
        ("llama-batched-bench", config.batched_bench, peers.llama_cpp_build),
        ("run", config.peer_run, peers.llama2c_build),
        ("runq", config.peer_runq, peers.llama2c_build),
    ):
        if program is not None:
            builds[name] = describe(program)
    return builds


def measure_shape(config: BenchConfig, name: str, folder: Path, threads: int, results: Results) -> None:
    """Make the files of a shape and let all contenders take their turns."""
    contests = [make_contest(config, name, dtype, folder, threads, results) for dtype in config.shape(name).dtypes]
    for turn in range(config.turns):
        for contest in contests:
            found = [*our_turn(config, contest, results), *peer_turns(config, contest)]
            for key, value in found:
                results.add(key, value)
            rates = ", ".join(f"{key.contender} {key.figure} {value:.4g}" for key, value in found)
            say(f"{name} {contest.dtype} turn {turn + 1} of {config.turns}: {rates}")


def make_contest(config: BenchConfig, name: str, dtype: str, folder: Path, threads: int, results: Results) -> Contest:
    """Write the files of ours and the peers', load our model and compile its kernels."""
    shape, rng = config.shape(name), np.random.default_rng(0)
    say(f"{name} {dtype}: writing files")
    vocabulary = folder / "tokenizer.bin"
    contest = Contest(
        name=name, shape=shape, dtype=dtype, files=folder, vocabulary=vocabulary, threads=threads, transformer=None
    )
    peers.write_vocabulary(vocabulary, shape.config.vocab_size)
    if config.peer_llama_bench or config.batched_bench:
        peers.write_gguf(contest.file("gguf"), shape.config, dtype, rng)
    if config.llama2c(dtype) and shape.config.rope_scaling is None:
        peers.write_llama2c(contest.file("llama2c"), shape.config, dtype, rng)
    try:
        peers.write_llamalet(contest.file("bin"), shape.config, dtype, rng)
        transformer = Transformer(model_file.read(contest.file("bin")), threads=threads)
        # Everything once: what is compiled or allocated at its first use is not to count.
        transformer.decode(transformer.new_cache(), tokenizer.BOS_ID)
        transformer.prefill(transformer.new_cache(), range(1, PROMPTS[0] + 1))
    except Exception as error:  # one model that does not run must not cost the figures of the others
        results.missing[Key(name, dtype, "decode")] = one_line(error)
        return contest
    results.add(Key(name, dtype, "file"), contest.file("bin").stat().st_size)
    return dataclasses.replace(contest, transformer=transformer)


# -- turns ------------------------------------------------------------------------------------------------------------


def our_turn(config: BenchConfig, contest: Contest, results: Results) -> Iterator[tuple[Key, float]]:
    """Measure every figure of ours once; note those that cannot be."""
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
        except Exception as error:  # as above
            results.missing[Key(contest.name, contest.dtype, group)] = f"{group}: {one_line(error)}"


def peer_turns(config: BenchConfig, contest: Contest) -> Iterator[tuple[Key, float]]:
    """Let each peer take its turn at what it can do."""
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
    """Yield the tokens/s of the first tokens of a story, the likeliest each, and the memory's bytes/s."""
    cache = transformer.new_cache(contest.shape.tokens)

    def story() -> None:
        cache.truncate(0)
        token = tokenizer.BOS_ID
        for _ in range(contest.shape.tokens):
            token = int(transformer.decode(cache, token).argmax())

    yield "decode", contest.shape.tokens / seconds(story, contest.shape.repeats)
    yield "read", read_bandwidth(contest.file("bin").stat().st_size, contest.threads)


def measure_positions(contest: Contest, transformer: Transformer) -> Iterator[tuple[str, float]]:
    """Yield the tokens/s of decoding at one position; what the cache holds does not matter for that."""
    cache = transformer.new_cache(CONTEXT)
    cache.keys.fill(0.01)
    cache.values.fill(0.01)

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
    """Yield the tokens/s of sequences that decode together, after a short prompt each."""
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
    """Yield the seconds from starting sample.py to its first word, its resident bytes, and those of its KV cache."""
    options = ["-t", "0", "-n", str(START_POSITIONS), "--ignore-eos", f"--threads={contest.threads}"]
    command = [sys.executable, str(SAMPLE), str(contest.file("bin")), "-z", str(contest.vocabulary), *options]
    resident, start = 0, time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if not os.read(process.stdout.fileno(), 1):
            raise UsageError(f"{' '.join(command)}: told no story")
        yield "start", time.perf_counter() - start
        while os.read(process.stdout.fileno(), 4096):
            resident = peak_resident_bytes(process.pid) or resident
    cache = transformer.new_cache()
    cache.reserve(START_POSITIONS)
    if resident:
        yield "resident", resident
        yield "cache", cache.keys.nbytes + cache.values.nbytes


# -- instruments ------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], None], repeats: int = 1) -> float:
    """Return how long `work` takes, on average."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def peak_resident_bytes(process: int) -> int:
    """Return the most memory that a process has held resident, mapped files included; 0 where that is not known.

    Not from getrusage: on Linux a new process inherits there the peak of the one that started it.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(sizes[0]) if sizes else 0


def read_bandwidth(n_bytes: int, threads: int) -> float:
    """Return the bytes/s at which all threads together read memory of this size, again and again."""
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
    """Add everything up, several times; each begins elsewhere, or the compiler would do it once for all."""
    total = np.float32(0)
    for number in range(passes):
        rest = memory[number % 64 :]  # of a slice the compiler knows that it needs no index from the end
        for index in range(len(rest)):
            total += rest[index]
    return float(total)


def one_line(error: Exception) -> str:
    """Return an error's kind and the beginning of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def say(message: str) -> None:
    """Print a line about the progress."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
