"""How a model copes with text far longer than its context: perplexity by position, for several ways to continue.

python -m benchmarks.rolling [MODEL.bin] [--text FILE]

It prints a table and writes a picture and the figures as JSON. All methods read the same texts, token by token:

    roll       as --overflow=roll: keep the first tokens, drop the older half of the others, re-rotate the rest
    no-first   the same, but drop the first tokens too
    cut        drop the older half and leave the keys rotated to their old positions
    grow       drop nothing: positions and memory grow beyond the trained context
    recompute  no cache: compute every token from the preceding half to whole context; slow, and the ideal
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import aligned, save_chart
from configurator import parse
from corpus.documents import pieces
from llamalet.command import run
from llamalet.config import ModelConfig
from llamalet.engine import MAX_BATCH
from llamalet.errors import ConfigError, DataError, note
from llamalet.files import check_writable, write_file
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import cache_bytes
from llamalet.runtime import BACKENDS, Model
from llamalet.sampler import KEEP
from llamalet.scoring import cut, evaluate_streams, losses

# Real files that are not part of the project.
DATA = Path("../shared/data")
ROWS = 16

Losses = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RollingConfig:
    """The options of benchmarks/rolling.py."""

    model: str = str(DATA / "stories260K.bin")
    """The model; may be given without --model."""
    tokenizer: str | None = None
    """Its tokenizer; by default the one next to the model."""
    text: str = str(DATA / "tinystories-sample.jsonl")
    """A .txt, .jsonl or .parquet file; its documents are joined into one long text."""
    tokens: int = 4096
    """Tokens of each text."""
    streams: int = 8
    """Number of texts to take from the file, as far apart as possible."""
    keep: int = KEEP
    """Number of first tokens that `roll` keeps."""
    backend: str = BACKENDS[0]
    """numba or numpy."""
    kv: str | None = None
    """How the caches keep numbers: f32, bf16 or q8; f32 for a float32 model, else bf16, if not given."""
    threads: int | None = None
    """Threads; by default one per physical core."""
    out: str = "out/rolling"
    """Folder for rolling.json and rolling.png."""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = []
        if self.tokens < ROWS:
            problems.append(f"tokens={self.tokens}: must be at least {ROWS}, the rows of the table")
        if not 1 <= self.streams <= MAX_BATCH:
            problems.append(f"streams={self.streams}: must lie between 1 and {MAX_BATCH}")
        if self.keep < 0:
            problems.append(f"keep={self.keep}: must not be negative")
        ConfigError.raise_for(problems)


class CutCache(KVCache):
    """A rolling cache that leaves the keys rotated to their old positions."""

    def roll(self, keep: int, drop: int) -> None:
        """Move the later positions down without rotating the keys."""
        before = [self.read(layer, keep + drop, self.length)[0] for layer in range(self._config.n_layers)]
        super().roll(keep, drop)
        for layer, keys in enumerate(before):
            _, values = self.read(layer, keep, self.length)
            self.write(layer, keep, keys, values)


@dataclass(frozen=True, slots=True)
class Curve:
    """The result of one method."""

    nats: Losses
    """(T, streams): the loss of each token."""
    cache_bytes: int
    """Size of the KV caches at the end; 0 without caches."""
    tokens_per_s: float

    def perplexity(self, begin: int, end: int) -> float:
        """Return the perplexity of the tokens at positions begin .. end - 1."""
        return float(np.exp(self.nats[begin:end].mean()))


def main(argv: Sequence[str]) -> int:
    """Measure, print, write the files; return 0."""
    config = parse(
        RollingConfig, argv, program="python -m benchmarks.rolling", description=__doc__, positional=("model",)
    )
    out = Path(config.out)
    check_writable(out)
    model = Model.load(
        config.model, tokenizer=_tokenizer(config), backend=config.backend, threads=config.threads, kv=config.kv
    )
    context = model.config.max_seq_len
    if config.tokens <= context:
        raise ConfigError(f"tokens={config.tokens}: must be more than the context of {model.path}, {context}")
    if config.keep >= context:
        raise ConfigError(f"keep={config.keep}: must be less than the context of {model.path}, {context}")
    streams = read_streams(model, Path(config.text), config.tokens, config.streams)
    curves = {}
    for name, measure in ways(model, streams, config.keep).items():
        note(f"{name}: {config.streams} texts of {config.tokens} tokens")
        curves[name] = measure()
    heading = f"{model.path.name}, context {context}, on {config.streams} texts of {Path(config.text).name}"
    print(table(heading, curves, context))
    _write_json(out / "rolling.json", config, context, curves)
    drawn = save_chart(out / "rolling.png", lambda figure: draw_perplexities(figure, heading, curves, context))
    print(f"\n{out / 'rolling.json'} has the figures" + (f", {out / 'rolling.png'} the curves." if drawn else "."))
    return 0


def _tokenizer(config: RollingConfig) -> str | None:
    """Return the tokenizer to use; the default model's has another name."""
    small = DATA / "tok512.bin"
    return str(small) if config.tokenizer is None and config.model == RollingConfig().model else config.tokenizer


def read_streams(model: Model, path: Path, n_tokens: int, n_streams: int) -> NDArray[np.int64]:
    """Return texts from all over a file, each starting with BOS: ids (n_streams, n_tokens + 1).

    Documents are joined by line ends, because a BOS would be another first token in the middle of a text.

    Raises:
        DataError: if the file has too few tokens, or its content does not match its suffix.
    """
    read = pieces({"val": [path]}, "val", document="file", column="text", val_fraction=0.5)
    text = "".join(("\n" if piece.starts else " ") + piece.text for piece in read)
    ids = np.array(model.tokenizer.encode(text.strip()))
    if len(ids) < n_tokens:
        raise DataError(f"{path}: has {len(ids)} tokens, fewer than --tokens={n_tokens}")
    starts = np.linspace(0, len(ids) - n_tokens, n_streams).astype(np.int64)
    return np.array([[model.tokenizer.separator_id, *ids[start : start + n_tokens]] for start in starts])


def ways(model: Model, streams: NDArray[np.int64], keep: int) -> Mapping[str, Callable[[], Curve]]:
    """Return a function for each method that measures it.

    Args:
        model: the model.
        streams: ids (B, T + 1).
        keep: number of first positions to keep.
    """
    config = model.config
    longer = dataclasses.replace(config, max_seq_len=max(config.max_seq_len, streams.shape[1] - 1))

    def through(cache_type: type[KVCache], shape: ModelConfig, keep: int) -> Curve:
        caches = [cache_type(shape, kind=model.transformer.kv) for _ in streams]
        start = time.perf_counter()
        nats = np.array(list(_with_progress(evaluate_streams(model.transformer, streams, caches, keep))))
        n_bytes = sum(cache_bytes(model.config, cache.capacity, cache.kind) for cache in caches)
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
    nats = []
    for window, first in cut(stream, model.config.max_seq_len):
        logits = model.transformer.logits(window[:-1])
        nats.append(losses(model.transformer, logits[first - 1 :], window[first:]))
    return np.concatenate(nats)


def table(heading: str, curves: Mapping[str, Curve], context: int) -> str:
    """Return the perplexities, a row for each range of positions, and memory and speed."""
    n_tokens = len(next(iter(curves.values())).nats)
    edges = np.linspace(0, n_tokens, ROWS + 1).astype(int)
    stretches = {f"{begin}-{end - 1}": (begin, end) for begin, end in zip(edges, edges[1:], strict=False)}
    stretches["past the context"] = (context, n_tokens)
    rows = [["positions", *curves]]
    for name, (begin, end) in stretches.items():
        rows.append([name, *(f"{curve.perplexity(begin, end):.2f}" for curve in curves.values())])
    rows.append(["cache, MB", *(f"{curve.cache_bytes / 1e6:.1f}" for curve in curves.values())])
    rows.append(["tokens/s", *(f"{curve.tokens_per_s:.0f}" for curve in curves.values())])
    return "\n".join([f"Perplexity of {heading}", *aligned(rows)])


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
    write_file(path, json.dumps(content).encode())


def draw_perplexities(figure: Any, heading: str, curves: Mapping[str, Curve], context: int) -> None:
    """Draw a curve for each method; a point is the perplexity of a quarter of a context."""
    figure.set_size_inches(9, 5)
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


def _with_progress(scores: Iterator[Losses]) -> Iterator[Losses]:
    """Pass the scores on, and print the position to stderr every few seconds."""
    printed = time.monotonic()
    for position, score in enumerate(scores):
        if time.monotonic() - printed > 5:
            printed = time.monotonic()
            note(f"  position {position}")
        yield score


if __name__ == "__main__":
    run(main)
