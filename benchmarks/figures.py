"""What the runtime benchmark measures of llamalet itself, a figure at a time."""

import os
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from benchmarks import peers
from benchmarks.harness import peak_resident_bytes
from benchmarks.report import ANY_DTYPE, CACHES, NUMPY, OURS, PASSES, POSITION_PREFIX, Key, after
from benchmarks.shapes import Shape
from llamalet import tokenizer
from llamalet.errors import UsageError
from llamalet.kernels.sampling import TokenChooser
from llamalet.kernels.transformer import Transformer
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import cache_bytes
from llamalet.sampler import Rule, SamplingConfig, choose_token

POSITIONS = (1, 128, 256, 512, 1024)
PROMPTS = (128, 512)
BATCHES = (1, 16, 64)

# A prompt that follows a long text: this long, after this many positions. Shapes without this depth have none.
LATE_PROMPT, PROMPT_DEPTH = 512, 4096

# Positions before a pass over a few tokens, and how often such a pass is repeated for each of Shape.repeats.
PASS_DEPTH = 16
PASS_REPEATS = 20

# Length of the story with which sample.py's start is measured.
START_POSITIONS = 16

# Positions of the caches whose bytes are compared.
CACHE_POSITIONS = 8192

# Deviations of normal logits. At 32,000 tokens a nucleus of 0.9 then has tens of tokens, as in trained models, some
# thousand, or most.
LOGITS = {"peaked": 5.0, "spread": 3.0, "flat": 1.0}
SAMPLED_ROWS = 4
SAMPLES = 32

SAMPLE = Path(__file__).parent.parent / "sample.py"

Found = Iterator[tuple[Key, float]]


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

    def key(self, figure: str, contender: str = OURS) -> Key:
        """Return the key of a figure."""
        return Key(self.name, self.dtype, figure, contender)


# -- speed ------------------------------------------------------------------------------------------------------------


def measure_decode(contest: Contest, transformer: Transformer) -> Found:
    """Yield the tokens/s of greedy decoding from the start of a story, and the memory's bytes/s."""
    cache = transformer.new_cache(contest.shape.tokens)

    def story() -> None:
        cache.truncate(0)
        token = tokenizer.BOS_ID
        for _ in range(contest.shape.tokens):
            token = int(transformer.decode(cache, token).argmax())

    yield contest.key("decode"), contest.shape.tokens / seconds(story, contest.shape.repeats)
    yield contest.key("read"), read_bandwidth(contest.file("bin").stat().st_size, contest.threads)


def measure_positions(contest: Contest, transformer: Transformer) -> Found:
    """Yield the tokens/s of decoding at each of POSITIONS."""
    cache = filled_cache(transformer, max(POSITIONS), transformer.kv)
    for position in POSITIONS:

        def token(position: int = position) -> None:
            cache.length = position - 1
            transformer.decode(cache, tokenizer.BOS_ID)

        token()
        yield contest.key(f"{POSITION_PREFIX}{position}"), 1 / seconds(token, 4 * contest.shape.repeats)


def measure_depths(contest: Contest, transformer: Transformer) -> Found:
    """Yield the tokens/s of decoding after many positions with each kind of cache, and of a prompt there."""
    shape = contest.shape
    room = max(max(shape.depths) + shape.depth_tokens, late_prompt(shape) and PROMPT_DEPTH + LATE_PROMPT)
    for kind, contender in CACHES.items():
        cache = filled_cache(transformer, room, kind)
        for depth in shape.depths:

            def tokens(n_tokens: int, cache: KVCache = cache, depth: int = depth) -> None:
                cache.length = depth
                for _ in range(n_tokens):
                    transformer.decode(cache, tokenizer.BOS_ID)

            tokens(1)
            rate = shape.depth_tokens / seconds(partial(tokens, shape.depth_tokens))
            yield contest.key(after("decode", depth), contender), rate
        if kind == transformer.kv and (length := late_prompt(shape)):
            ids = np.arange(1, length + 1) % shape.config.vocab_size

            def prompt(cache: KVCache = cache, ids: Any = ids) -> None:
                cache.length = PROMPT_DEPTH
                transformer.prefill(cache, ids)

            yield contest.key(after(f"prefill {length}", PROMPT_DEPTH)), length / seconds(prompt)


def late_prompt(shape: Shape) -> int:
    """Return the length of the prompt after PROMPT_DEPTH positions, 0 for none."""
    return LATE_PROMPT if PROMPT_DEPTH in shape.depths else 0


def measure_passes(contest: Contest, transformer: Transformer) -> Found:
    """Yield the seconds of a decode and of passes over a few positions of one sequence, in turns."""
    cache = transformer.new_cache(PASS_DEPTH + max(PASSES))
    ids = list(range(1, PASS_DEPTH + max(PASSES) + 1))
    transformer.prefill(cache, ids[:PASS_DEPTH])

    def one() -> None:
        cache.truncate(PASS_DEPTH)
        transformer.decode(cache, ids[PASS_DEPTH])

    def several(n: int) -> None:
        cache.truncate(PASS_DEPTH)
        transformer.extend(cache, ids[PASS_DEPTH : PASS_DEPTH + n])

    works = {"pass of 1": one} | {f"pass of {n}": partial(several, n) for n in PASSES}
    times: dict[str, list[float]] = {figure: [] for figure in works}
    for _ in range(PASS_REPEATS * contest.shape.repeats):
        for figure, work in works.items():
            times[figure].append(seconds(work))
    for figure, found in times.items():
        yield contest.key(figure), statistics.median(found)


def measure_prefill(contest: Contest, transformer: Transformer) -> Found:
    """Yield the tokens/s of prompts."""
    cache = transformer.new_cache(max(PROMPTS))
    for length in PROMPTS:
        tokens = np.arange(1, length + 1) % contest.shape.config.vocab_size

        def prompt(tokens: Any = tokens) -> None:
            cache.truncate(0)
            transformer.prefill(cache, tokens)

        yield contest.key(f"prefill {length}"), length / seconds(prompt, contest.shape.repeats)


def measure_batches(contest: Contest, transformer: Transformer) -> Found:
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
        yield contest.key(f"batch {size}"), size * n_tokens / seconds(partial(together, n_tokens))


def measure_start(contest: Contest, transformer: Transformer) -> Found:
    """Yield the seconds from starting sample.py to its first word, its resident bytes, and its KV cache's bytes."""
    options = ["-t", "0", "-n", str(START_POSITIONS), "--ignore-eos", f"--threads={contest.threads}"]
    command = [sys.executable, str(SAMPLE), str(contest.file("bin")), "-z", str(contest.vocabulary), *options]
    resident, start = 0, time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if not os.read(process.stdout.fileno(), 1):
            raise UsageError(f"{' '.join(command)}: printed nothing")
        yield contest.key("start"), time.perf_counter() - start
        while os.read(process.stdout.fileno(), 4096):
            resident = peak_resident_bytes(process.pid) or resident
    cache = transformer.new_cache()
    cache.reserve(START_POSITIONS)
    if resident:
        yield contest.key("resident"), resident
        yield contest.key("cache"), cache_bytes(transformer.config, cache.capacity, cache.kind)


OF_MODEL: Mapping[str, Callable[[Contest, Transformer], Found]] = {
    "decode": measure_decode,
    "positions": measure_positions,
    "depths": measure_depths,
    "passes": measure_passes,
    "prefill": measure_prefill,
    "batch": measure_batches,
    "start": measure_start,
}


# -- what depends on the shape alone ----------------------------------------------------------------------------------


def measure_sampling(name: str, shape: Shape) -> Found:
    """Yield the seconds of choosing a token at temperature 1 and top-p 0.9, compiled and in numpy: medians of draws."""
    vocab_size, rng = shape.config.vocab_size, np.random.default_rng(0)
    rule = Rule.create(SamplingConfig(temperature=1.0, top_p=0.9), vocab_size)
    coins = rng.random(SAMPLES, np.float32)
    compiled = TokenChooser(vocab_size)
    for kind, deviation in LOGITS.items():
        rows = rng.normal(0, deviation, (SAMPLED_ROWS, vocab_size)).astype(np.float32)
        for contender, choose in ((OURS, compiled), (NUMPY, choose_token)):
            choose(rows[0], rule, coins[0])
            times = [
                seconds(partial(choose, rows[number % SAMPLED_ROWS], rule, coin)) for number, coin in enumerate(coins)
            ]
            yield Key(name, ANY_DTYPE, f"sampling {kind}", contender), statistics.median(times)


def count_cache_bytes(name: str, shape: Shape) -> Found:
    """Yield the bytes of a cache of each kind."""
    for kind, contender in CACHES.items():
        yield Key(name, ANY_DTYPE, "cache", contender), cache_bytes(shape.config, CACHE_POSITIONS, kind)


OF_SHAPE: Mapping[str, Callable[[str, Shape], Found]] = {"sampling": measure_sampling, "caches": count_cache_bytes}


# -- instruments ------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """Return the mean duration of `work`."""
    return timeit.timeit(work, number=repeats) / repeats


def filled_cache(transformer: Transformer, n_positions: int, kind: str) -> KVCache:
    """Return a cache of a kind, a name of KINDS, with numbers in n_positions; decoding costs the same with any."""
    c = transformer.config
    cache = KVCache(c, n_positions, kind)
    numbers = np.full((c.n_kv_heads, n_positions, c.head_dim), 0.01, np.float32)
    for layer in range(c.n_layers):
        cache.write(layer, 0, numbers, numbers)
    return cache


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
