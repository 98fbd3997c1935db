"""What becomes of a model on text far longer than its context: perplexity over position, for ways to go on past it.

python -m benchmarks.rolling [MODEL.bin] [--text FILE]

The table, a picture and the figures as JSON. All ways read the same texts, token by token, each through a KV cache:

    roll       as --overflow=roll: keep the first tokens, forget the older half of the others, re-rotate the rest
    no-first   the same, and the first tokens are forgotten too
    cut        plain cutting: forget the older half; the keys stay as they are, turned to the places they had
    grow       forget nothing: positions go on past those that the model has been trained for, and so does memory
    recompute  nothing is rolled: every token anew from the half to whole context before it; slow, and what to aim at
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configurator import parse
from corpus.documents import pieces
from llamalet.config import ModelConfig
from llamalet.errors import ConfigError, DataError, run
from llamalet.files import replacing
from llamalet.generate import MAX_BATCH
from llamalet.kv_cache import KVCache
from llamalet.runtime import BACKENDS, Model
from llamalet.sampler import KEEP
from llamalet.scoring import evaluate_streams, losses

# Real files that are no part of the project.
DATA = Path("../shared/data")
ROWS = 16

Losses = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RollingConfig:
    """The options of benchmarks/rolling.py."""

    model: str = str(DATA / "stories260K.bin")
    """The model, also as the first word."""
    tokenizer: str | None = None
    """Its tokenizer; the one beside the model if not given."""
    text: str = str(DATA / "tinystories-sample.jsonl")
    """A .txt, .jsonl or .parquet file; its documents are joined to one long text."""
    tokens: int = 4096
    """How many tokens each text has."""
    streams: int = 8
    """How many texts to take out of the file, as far apart as possible."""
    keep: int = KEEP
    """How many first tokens `roll` keeps."""
    backend: str = BACKENDS[0]
    """What computes: numba or numpy."""
    threads: int | None = None
    """How many threads compute; one for each physical core if not given."""
    out: str = "out/rolling"
    """The folder for rolling.json and rolling.png."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = []
        if self.tokens < ROWS:
            problems.append(f"tokens={self.tokens}: must be at least {ROWS}, the rows of the table")
        if not 1 <= self.streams <= MAX_BATCH:
            problems.append(f"streams={self.streams}: must lie between 1 and {MAX_BATCH}")
        if self.keep < 0:
            problems.append(f"keep={self.keep}: must not be negative")
        if problems:
            raise ConfigError.from_problems(problems)


class CutCache(KVCache):
    """A cache that forgets as a rolling one does, but leaves the keys turned to the places they had."""

    def roll(self, keep: int, drop: int) -> None:
        """Move the later positions down, and turn nothing."""
        before = self.keys[:, :, keep + drop : self.length].copy()
        super().roll(keep, drop)
        self.keys[:, :, keep : self.length] = before


@dataclass(frozen=True, slots=True)
class Curve:
    """What a way to go on past the context has come to."""

    nats: Losses
    """(T, streams): the loss of each token."""
    cache_bytes: int
    """The KV caches at the end; 0 where there are none."""
    tokens_per_s: float

    def perplexity(self, begin: int, end: int) -> float:
        """Return that of the tokens at positions begin .. end - 1."""
        return float(np.exp(self.nats[begin:end].mean()))


def main(argv: Sequence[str]) -> int:
    """Measure, print, write the files; return 0."""
    config = parse(
        RollingConfig, argv, program="python -m benchmarks.rolling", description=__doc__ or "", positional=("model",)
    )
    model = Model.load(config.model, tokenizer=_tokenizer(config), backend=config.backend, threads=config.threads)
    context = model.config.max_seq_len
    if config.tokens <= context:
        raise ConfigError(f"tokens={config.tokens}: must be more than the context of {model.path}, {context}")
    if config.keep >= context:
        raise ConfigError(f"keep={config.keep}: must be less than the context of {model.path}, {context}")
    streams = read_streams(model, Path(config.text), config.tokens, config.streams)
    curves = {}
    for name, measure in ways(model, streams, config.keep).items():
        _say(f"{name}: {config.streams} texts of {config.tokens} tokens")
        curves[name] = measure()
    heading = f"{model.path.name}, context {context}, on {config.streams} texts of {Path(config.text).name}"
    print(table(heading, curves, context))
    out = Path(config.out)
    _write_json(out / "rolling.json", config, context, curves)
    drawn = draw(out / "rolling.png", heading, curves, context)
    print(f"\n{out / 'rolling.json'} has the figures" + (f", {out / 'rolling.png'} the curves." if drawn else "."))
    return 0


def _tokenizer(config: RollingConfig) -> str | None:
    """Return the tokenizer to use: llama2.c's smallest model has it under another name."""
    small = DATA / "tok512.bin"
    return str(small) if config.tokenizer is None and config.model == RollingConfig().model else config.tokenizer


def read_streams(model: Model, path: Path, n_tokens: int, n_streams: int) -> NDArray[np.int64]:
    """Return texts from all over a file, each begun with BOS: ids (n_streams, n_tokens + 1).

    Documents are joined by line ends and not by BOS, which would be a first token in the middle.

    Raises:
        DataError: if the file has not so many tokens, or is not what its name says.
    """
    read = pieces({"val": [path]}, "val", document="file", column="text", val_fraction=0.5)
    text = "".join(("\n" if piece.starts else " ") + piece.text for piece in read)
    ids = np.array(model.tokenizer.encode(text.strip()))
    if len(ids) < n_tokens:
        raise DataError(f"{path}: has {len(ids)} tokens; --tokens={n_tokens} are asked for")
    starts = np.linspace(0, len(ids) - n_tokens, n_streams).astype(np.int64)
    return np.array([[model.tokenizer.bos_id, *ids[start : start + n_tokens]] for start in starts])


def ways(model: Model, streams: NDArray[np.int64], keep: int) -> Mapping[str, Callable[[], Curve]]:
    """Return what measures each way to go on past the context.

    Args:
        model: the model.
        streams: ids (B, T + 1).
        keep: first positions that are kept.
    """
    config = model.config
    longer = dataclasses.replace(config, max_seq_len=max(config.max_seq_len, streams.shape[1] - 1))

    def through(new_cache: Callable[[ModelConfig], KVCache], shape: ModelConfig, keep: int) -> Curve:
        caches = [new_cache(shape) for _ in streams]
        start = time.perf_counter()
        nats = np.array(list(_with_progress(evaluate_streams(model.transformer, streams, caches, keep))))
        n_bytes = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
        return Curve(nats, n_bytes, nats.size / (time.perf_counter() - start))

    def recompute() -> Curve:
        start = time.perf_counter()
        nats = np.array([_recomputed(model, stream) for stream in streams]).T
        return Curve(nats, 0, nats.size / (time.perf_counter() - start))

    return {
        "roll": lambda: through(KVCache, config, keep),
        "no-first": lambda: through(KVCache, config, 0),
        "cut": lambda: through(CutCache, config, 0),
        "grow": lambda: through(KVCache, longer, keep),
        "recompute": recompute,
    }


def _recomputed(model: Model, stream: NDArray[np.int64]) -> Losses:
    """Return the losses of a text (T + 1,) in windows that overlap by half: (T,)."""
    context, n = model.config.max_seq_len, len(stream) - 1
    step = max(1, context // 2)
    nats = np.empty(n)
    for begin in [0, *range(step, max(n - context + step, step), step)]:
        end = min(begin + context, n)
        first = 0 if begin == 0 else context - step  # those before have been scored in the last window
        logits = model.transformer.logits(stream[begin:end])
        nats[begin + first : end] = losses(logits[first:], stream[begin + first + 1 : end + 1])
    return nats


def table(heading: str, curves: Mapping[str, Curve], context: int) -> str:
    """Return the perplexities, a row for each stretch of positions, and what they cost."""
    n_tokens = len(next(iter(curves.values())).nats)
    edges = np.linspace(0, n_tokens, ROWS + 1).astype(int)
    stretches = {f"{begin}-{end - 1}": (begin, end) for begin, end in zip(edges, edges[1:], strict=False)}
    stretches["past the context"] = (context, n_tokens)
    rows: dict[str, list[str]] = {"positions": list(curves)}
    for name, (begin, end) in stretches.items():
        rows[name] = [f"{curve.perplexity(begin, end):.2f}" for curve in curves.values()]
    rows["cache, MB"] = [f"{curve.cache_bytes / 1e6:.1f}" for curve in curves.values()]
    rows["tokens/s"] = [f"{curve.tokens_per_s:.0f}" for curve in curves.values()]
    lines = [f"{name:>16}" + "".join(f"{cell:>11}" for cell in cells) for name, cells in rows.items()]
    return "\n".join([f"Perplexity of {heading}", *lines])


def _write_json(path: Path, config: RollingConfig, context: int, curves: Mapping[str, Curve]) -> None:
    """Write the options and the mean loss at each position."""
    found: dict[str, Any] = {
        name: {
            "perplexity_past_context": curve.perplexity(context, config.tokens),
            "cache_bytes": curve.cache_bytes,
            "tokens_per_s": curve.tokens_per_s,
            "nats_by_position": [round(float(nats), 4) for nats in curve.nats.mean(axis=1)],
        }
        for name, curve in curves.items()
    }
    content = {"options": dataclasses.asdict(config), "context": context, "curves": found}
    with replacing(path) as file:
        file.write(json.dumps(content).encode())


def draw(path: Path, heading: str, curves: Mapping[str, Curve], context: int) -> bool:
    """Draw the curves, each point the perplexity of a quarter of a context; return whether that could be done."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _say(f"warning: no {path}: matplotlib is not installed")
        return False
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    width = max(1, context // 4)
    for name, curve in curves.items():
        begins = range(0, len(curve.nats) - width + 1, width)
        means = [curve.perplexity(begin, begin + width) for begin in begins]
        axes.plot([begin + width / 2 for begin in begins], means, label=name, linewidth=1.2)
    axes.axvline(context, linestyle="--", color="gray", linewidth=1, label="trained context")
    axes.set(xlabel="position", ylabel="perplexity", yscale="log", title=heading)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _with_progress(scores: Iterator[Losses]) -> Iterator[Losses]:
    """Pass the scores on; tell how far they are on stderr, every few seconds."""
    told = time.monotonic()
    for position, score in enumerate(scores):
        if time.monotonic() - told > 5:
            told = time.monotonic()
            _say(f"  position {position}")
        yield score


def _say(message: str) -> None:
    """Print a line that is no part of the result."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
