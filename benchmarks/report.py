"""The results of a benchmark, turn by turn: medians, ratios and required values, as text, JSON and chart."""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llamalet.config import ModelConfig
from llamalet.files import write_file
from llamalet.kv_kinds import KINDS
from llamalet.model_file.header import DTYPES

# The contenders; "fa" is flash attention. llama.cpp keeps keys and values in float16 unless "kv q8" says Q8_0.
OURS, LLAMA_CPP, LLAMA_CPP_FLASH, LLAMA2C = "llamalet", "llama.cpp", "llama.cpp fa", "llama2.c"
LLAMA_CPP_Q8_CACHE, IK_LLAMA_CPP = "llama.cpp fa kv q8", "ik_llama.cpp"
LLAMA_CPPS = (LLAMA_CPP, LLAMA_CPP_FLASH, LLAMA_CPP_Q8_CACHE)
CONTENDERS = (OURS, *LLAMA_CPPS, IK_LLAMA_CPP, LLAMA2C)
# Our contenders with each kind of cache, and those whose better one has to be faster than llama.cpp.
CACHES = {kind: f"{OURS} kv {kind}" for kind in KINDS}
SMALL_CACHES = (CACHES["bf16"], CACHES["q8"])
# Contenders of single figures.
NUMPY, PLAIN, DRAFT_MODEL, LOOKUP = "numpy", "plain", "draft model", "lookup"

# The required tokens/s, as a multiple of the fastest rival's, by dtype, figure and shape.
BARS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("f32", "decode"): {"15M": 1.0, "110M": 1.0},
    ("q8", "decode"): {"15M": 1.8, "110M": 1.25, "1B": 1.15},
    ("q4", "decode"): {"15M": 1.8, "110M": 1.25, "1B": 1.05},
    ("f32", "prefill 128"): {"15M": 1.0, "110M": 0.85},
    ("q8", "prefill 128"): {"15M": 1.0, "110M": 1.2, "1B": 1.0},
    ("q4", "prefill 128"): {"15M": 1.0, "110M": 1.2, "1B": 1.0},
    ("q8", "prefill 512 after 4096"): {"110M": 2.8},
    ("q8", "batch 16"): {"15M": 2.0, "110M": 1.5},
    ("q8", "batch 64"): {"15M": 2.0, "110M": 1.5},
    ("q4", "batch 16"): {"15M": 2.0, "110M": 1.5},
    ("q4", "batch 64"): {"15M": 2.0, "110M": 1.5},
}
# The same as a multiple of ik_llama.cpp's.
IK_BARS: Mapping[tuple[str, str], Mapping[str, float]] = {
    (dtype, figure): {"110M": 1.1} for dtype in ("q8", "q4") for figure in ("decode", "prefill 128")
}
# The same for decoding after many positions, with the better of SMALL_CACHES, and with caches of bfloat16 alone.
DEPTH_BARS: Mapping[tuple[str, int], Mapping[str, float]] = {
    ("q8", 1024): {"110M": 1.4},
    ("q8", 4096): {"110M": 1.7},
    ("q4", 0): {"1B": 1.05},
    ("q4", 2048): {"1B": 1.2},
    ("q4", 8192): {"1B": 1.7},
}
BF16_DEPTH_BARS: Mapping[tuple[str, int], Mapping[str, float]] = {
    ("q8", 1024): {"110M": 1.3},
    ("q8", 4096): {"110M": 1.35},
}
# The required speed and size of our q8 relative to our f32, and the allowed memory besides file and cache.
Q8_BARS = {"15M": 2.5, "110M": 3.0, "1B": 3.0}
Q8_SIZE_BAR = 0.28
REST_BAR_BYTES = 200e6
# The allowed time of a pass over so many positions, relative to a decode, by dtype and positions.
PASSES = (4, 8)
PASS_BARS = {("q8", 4): 1.2, ("q8", 8): 1.6, ("f32", 4): 1.3, ("f32", 8): 1.6}
PASS_SHAPES = ("15M", "110M")
# The required tokens/s with a draft, relative to plain generation.
DRAFT_BARS = {
    ("stories, T=0", DRAFT_MODEL): 1.8,
    ("stories, T=1", DRAFT_MODEL): 1.5,
    ("stories, T=0", LOOKUP): 0.97,
    ("stories, T=1", LOOKUP): 0.97,
    ("repeats, T=0", LOOKUP): 1.5,
    ("repeats, T=1", LOOKUP): 1.5,
}
# The allowed bytes of a cache relative to float32's, and the allowed seconds of choosing a token from peaked logits.
CACHE_BARS = {"bf16": 0.5, "q8": 0.27}
SAMPLING_BARS = {"15M": 30e-6, "110M": 30e-6, "1B": 120e-6}

POSITION_PREFIX = "decode at "
DEPTH_PREFIX = "decode after "
# In place of a shape, for what trained models do; of a dtype, for what does not depend on it.
DRAFTS, ANY_DTYPE = "drafts", ""


class Key(NamedTuple):
    """What was measured: the model, the figure and the contender."""

    shape: str
    dtype: str
    figure: str
    contender: str = OURS


class Check(NamedTuple):
    """A ratio or size, and the bar that it must reach or keep to."""

    shape: str
    what: str
    value: float
    bar: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the value satisfies the bar."""
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        """Return the check as a line."""
        sign, verdict = "<=" if self.at_most else ">=", "met" if self.met else "MISSED"
        return f"{self.shape:6} {self.what:58} {self.value:8.3f} {sign} {self.bar:7.3f} {verdict}"


@dataclass
class Results:
    """The figures of all turns, in tokens/s, seconds or bytes, and the reasons for missing ones."""

    turns: dict[Key, list[float]] = field(default_factory=dict)
    missing: dict[Key, str] = field(default_factory=dict)

    def add(self, key: Key, value: float) -> None:
        """Record the value of one more turn."""
        self.turns.setdefault(key, []).append(value)

    def median(self, shape: str, dtype: str, figure: str, contender: str = OURS) -> float | None:
        """Return the median of a figure over its turns, None if it has none."""
        turns = self.turns.get(Key(shape, dtype, figure, contender))
        return statistics.median(turns) if turns else None

    def dtypes(self, shape: str) -> list[str]:
        """Return the dtypes of a shape that have results."""
        known = {key.dtype for key in [*self.turns, *self.missing] if key.shape == shape}
        return [dtype for dtype in DTYPES if dtype in known]

    def rates(self, shape: str, dtype: str) -> list[str]:
        """Return the figures in tokens/s that contenders share, in the order of measurement."""
        found = (key.figure for key in [*self.turns, *self.missing] if key[:2] == (shape, dtype))
        return [figure for figure in dict.fromkeys(found) if figure.split()[0] in RATES and not is_own_table(figure)]

    def rival(self, shape: str, dtype: str, figure: str) -> tuple[str, float] | None:
        """Return the fastest rival and its tokens/s.

        llama2.c's run is a rival; its runq uses another kind of q8 (version 2) and is only reported.
        """
        names = (*LLAMA_CPPS, LLAMA2C) if dtype == "f32" else LLAMA_CPPS
        return self.fastest(shape, dtype, figure, names)

    def fastest(self, shape: str, dtype: str, figure: str, names: Sequence[str]) -> tuple[str, float] | None:
        """Return the fastest of some contenders and its tokens/s."""
        rates = [(name, self.median(shape, dtype, figure, name)) for name in names]
        found = [(name, rate) for name, rate in rates if rate is not None]
        return max(found, key=lambda pair: pair[1], default=None)

    def ratio(self, shape: str, dtype: str, figure: str) -> float | None:
        """Return our tokens/s as a multiple of the rival's."""
        rival = self.rival(shape, dtype, figure)
        return None if rival is None else self.over(Key(shape, dtype, figure), rival[0])

    def over(self, key: Key, other: str, figure: str | None = None) -> float | None:
        """Return a median relative to another contender's, of another figure if named."""
        value, base = self.median(*key), self.median(key.shape, key.dtype, figure or key.figure, other)
        return None if value is None or base is None else value / base

    def depths(self, shape: str, dtype: str) -> list[int]:
        """Return the numbers of positions after which decoding was measured."""
        found = {key.figure for key in self.turns if key[:2] == (shape, dtype) and key.figure.startswith(DEPTH_PREFIX)}
        return sorted(int(figure.removeprefix(DEPTH_PREFIX)) for figure in found)

    def depth_ratio(self, shape: str, dtype: str, depth: int, names: Sequence[str]) -> tuple[str, float] | None:
        """Return the fastest of our contenders `names` after so many positions and its multiple of llama.cpp's rate."""
        figure = after("decode", depth)
        ours, rival = (self.fastest(shape, dtype, figure, some) for some in (names, LLAMA_CPPS))
        return None if ours is None or rival is None else (ours[0], ours[1] / rival[1])

    def checks(self) -> Iterator[Check]:
        """Yield a check for every bar that has a value."""
        yield from self._rate_checks()
        yield from self._depth_checks()
        yield from self._q8_checks()
        yield from self._own_checks()

    def _rate_checks(self) -> Iterator[Check]:
        """Yield the checks of our tokens/s against the peers'."""
        for (dtype, figure), bars in BARS.items():
            for shape, bar in bars.items():
                ratio, rival = self.ratio(shape, dtype, figure), self.rival(shape, dtype, figure)
                if ratio is not None and rival is not None:
                    yield Check(shape, f"{dtype} {figure} / {rival[0]}", ratio, bar)
        for (dtype, figure), bars in IK_BARS.items():
            for shape, bar in bars.items():
                ratio = self.over(Key(shape, dtype, figure), IK_LLAMA_CPP)
                if ratio is not None:
                    yield Check(shape, f"{dtype} {figure} / {IK_LLAMA_CPP}", ratio, bar)

    def _depth_checks(self) -> Iterator[Check]:
        """Yield the checks of decoding after many positions."""
        for bars_by_depth, names in ((DEPTH_BARS, SMALL_CACHES), (BF16_DEPTH_BARS, SMALL_CACHES[:1])):
            for (dtype, depth), bars in bars_by_depth.items():
                for shape, bar in bars.items():
                    if (found := self.depth_ratio(shape, dtype, depth, names)) is not None:
                        what = f"{dtype} {after('decode', depth)}, {' or '.join(names)} / llama.cpp"
                        yield Check(shape, what, found[1], bar)

    def _q8_checks(self) -> Iterator[Check]:
        """Yield the checks of our q8 against our f32, and of its memory."""
        for shape, bar in Q8_BARS.items():
            for figure, limit, at_most in (("decode", bar, False), ("file", Q8_SIZE_BAR, True)):
                ours, other = self.median(shape, "q8", figure), self.median(shape, "f32", figure)
                if ours is not None and other is not None:
                    yield Check(shape, f"q8 {figure} / f32 {figure}", ours / other, limit, at_most)
            rest = self.rest_bytes(shape, "q8")
            if rest is not None:
                what = "q8 resident memory besides file and cache, MB"
                yield Check(shape, what, rest / 1e6, REST_BAR_BYTES / 1e6, True)

    def _own_checks(self) -> Iterator[Check]:
        """Yield the checks of passes, caches, sampling and drafts."""
        for shape in PASS_SHAPES:
            for (dtype, n), bar in PASS_BARS.items():
                if (ratio := self.over(Key(shape, dtype, f"pass of {n}"), OURS, "pass of 1")) is not None:
                    yield Check(shape, f"{dtype} pass of {n} positions / decode, time", ratio, bar, True)
        for shape, bar in SAMPLING_BARS.items():
            for kind, most in CACHE_BARS.items():
                if (ratio := self.over(Key(shape, ANY_DTYPE, "cache", CACHES[kind]), CACHES["f32"])) is not None:
                    yield Check(shape, f"{kind} cache / f32 cache, bytes", ratio, most, True)
            if (time := self.median(shape, ANY_DTYPE, "sampling peaked")) is not None:
                yield Check(shape, "choosing a token from peaked logits, microseconds", time * 1e6, bar * 1e6, True)
        for (figure, name), bar in DRAFT_BARS.items():
            if (ratio := self.over(Key(DRAFTS, ANY_DTYPE, figure, name), PLAIN)) is not None:
                yield Check(DRAFTS, f"{figure}: {name} / {PLAIN}", ratio, bar)

    def rest_bytes(self, shape: str, dtype: str) -> float | None:
        """Return the resident bytes besides those of the file and the cache."""
        resident, file, cache = (self.median(shape, dtype, figure) for figure in ("resident", "file", "cache"))
        return None if resident is None or file is None or cache is None else resident - file - cache

    def token_ms(self, shape: str, dtype: str) -> dict[int, float]:
        """Return our milliseconds per token by position."""
        return {
            at_position(key.figure): 1e3 / statistics.median(turns)
            for key, turns in self.turns.items()
            if key[:2] == (shape, dtype) and at_position(key.figure)
        }


RATES = ("decode", "prefill", "batch")


def at_position(figure: str) -> int:
    """Return the position in a figure like "decode at 128"; 0 for other figures."""
    return int(figure.removeprefix(POSITION_PREFIX)) if figure.startswith(POSITION_PREFIX) else 0


def after(figure: str, n_positions: int) -> str:
    """Return the name of a figure that is measured after so many positions."""
    return f"{figure} after {n_positions}"


def is_own_table(figure: str) -> bool:
    """Return whether a figure is shown elsewhere than in the table of all contenders."""
    return figure.startswith((POSITION_PREFIX, DEPTH_PREFIX))


def kept_of(figure: str) -> str:
    """Return the name of the share of proposals that were kept in a figure of drafts."""
    return f"{figure}, kept"


# -- text -------------------------------------------------------------------------------------------------------------


def shape_lines(results: Results, shape: str, config: ModelConfig, turns: int) -> Iterator[str]:
    """Yield the report lines of one shape."""
    yield (
        f"{shape}: {config.n_params / 1e6:.0f}M parameters, dim {config.dim}, {config.n_layers} layers, "
        f"{config.n_heads} heads, hidden_dim {config.hidden_dim}, vocabulary {config.vocab_size}"
    )
    rates = [Key(shape, dtype, figure) for dtype in results.dtypes(shape) for figure in results.rates(shape, dtype)]
    known = {**results.turns, **results.missing}
    shown = [name for name in CONTENDERS if any(key._replace(contender=name) in known for key in rates)]
    with_ik = IK_LLAMA_CPP in shown
    if rates:
        head = "".join(f"{name:>{_width(name)}}" for name in shown)
        ik_head = f"{'/ ik':>8}{'bar':>7}" if with_ik else ""
        yield f"  {f'tokens/s, medians of {turns} turns':28}{head}{'ratio':>8}{'bar':>7}{'':7}{ik_head}".rstrip()
    for key in rates:
        cells = "".join(_cell(results, key._replace(contender=name)) for name in shown)
        bars = BARS.get((key.dtype, key.figure), {}), IK_BARS.get((key.dtype, key.figure), {})
        verdict = _verdict(results.ratio(*key[:3]), bars[0].get(shape))
        if with_ik:
            verdict += _verdict(results.over(key, IK_LLAMA_CPP), bars[1].get(shape))
        yield f"  {key.dtype:5}{key.figure:23}{cells}{verdict}".rstrip()
    yield from _depth_lines(results, shape)
    for dtype in results.dtypes(shape):
        yield from (f"  {dtype:5}{line}" for line in _own_lines(results, shape, dtype))
    yield from (f"       {line}" for line in _shape_own_lines(results, shape))


def _depth_lines(results: Results, shape: str) -> Iterator[str]:
    """Yield the table of decoding after many positions: kinds of caches of ours and of llama.cpp."""
    dtypes = [dtype for dtype in results.dtypes(shape) if results.depths(shape, dtype)]
    names = [*CACHES.values(), *LLAMA_CPPS]
    if dtypes:
        head = "".join(f"{name:>{_width(name)}}" for name in names)
        yield f"  {'decode after positions':28}{head}{'ratio':>8}{'bar':>7}{'':7}{'bf16':>8}{'bar':>7}"
    for dtype in dtypes:
        for depth in results.depths(shape, dtype):
            cells = "".join(_cell(results, Key(shape, dtype, after("decode", depth), name)) for name in names)
            for bars, ours in ((DEPTH_BARS, SMALL_CACHES), (BF16_DEPTH_BARS, SMALL_CACHES[:1])):
                found = results.depth_ratio(shape, dtype, depth, ours)
                cells += _verdict(found and found[1], bars.get((dtype, depth), {}).get(shape))
            yield f"  {dtype:5}{depth:<23}{cells}".rstrip()


def draft_lines(results: Results) -> Iterator[str]:
    """Yield the report lines of drafts."""
    figures = list(dict.fromkeys(figure for figure, _ in DRAFT_BARS))
    if any(key.shape == DRAFTS for key in results.turns):
        names = (PLAIN, DRAFT_MODEL, LOOKUP)
        yield f"  {'drafts, tokens/s':28}" + "".join(f"{name:>{_width(name)}}" for name in names)
    for figure in figures:
        key = Key(DRAFTS, ANY_DTYPE, figure, PLAIN)
        if key in results.turns:
            yield f"  {figure:28}" + "".join(_cell(results, key._replace(contender=name)) for name in names)
        for name in (DRAFT_MODEL, LOOKUP):
            ratio = results.over(key._replace(contender=name), PLAIN)
            kept = results.median(DRAFTS, ANY_DTYPE, kept_of(figure), name)
            if ratio is not None and kept is not None:
                verdict = _verdict(ratio, DRAFT_BARS.get((figure, name)))
                yield f"    {f'{name} / {PLAIN}':26}{verdict}, {kept:.0%} of its proposals kept"
    yield from (f"  not available: {reason}" for key, reason in results.missing.items() if key.shape == DRAFTS)


def _width(name: str) -> int:
    """Return the width of a contender's column."""
    return max(14, len(name) + 2)


def _cell(results: Results, key: Key) -> str:
    """Return the table cell of a median."""
    rate, width = results.median(*key), _width(key.contender)
    text = "not available" if key in results.missing else "-"
    return f"{text:>{width}}" if rate is None else f"{rate:{width}.1f}"


def _verdict(ratio: float | None, bar: float | None) -> str:
    """Return the table cells of a ratio, its bar and whether it is met: 22 characters."""
    if bar is None or ratio is None:
        return f"{'' if ratio is None else f'{ratio:.2f}':>8}{'':14}"
    return f"{ratio:8.2f}{bar:7.2f} {'met' if ratio >= bar else 'MISSED':6}"


def _own_lines(results: Results, shape: str, dtype: str) -> Iterator[str]:
    """Yield the figures that only we have: share of memory bandwidth, time by position, start-up, memory."""
    decode, read, file = (results.median(shape, dtype, figure) for figure in ("decode", "read", "file"))
    if decode and read and file:
        yield (
            f"decode reads {file / 1e6:.1f} MB per token: {decode * file / 1e9:.1f} GB/s, {decode * file / read:.0%} "
            f"of the {read / 1e9:.1f} GB/s at which this machine reads that much memory"
        )
    if costs := results.token_ms(shape, dtype):
        cells = ", ".join(f"{milliseconds:.3f} at {position}" for position, milliseconds in costs.items())
        yield f"milliseconds per token by position: {cells}"
    passes = [(n, results.over(Key(shape, dtype, f"pass of {n}"), OURS, "pass of 1")) for n in PASSES]
    if cells := ", ".join(f"{n} positions {ratio:.2f}" for n, ratio in passes if ratio is not None):
        yield f"time of a pass relative to a decode: {cells}"
    start, resident, cache = (results.median(shape, dtype, figure) for figure in ("start", "resident", "cache"))
    if start:
        yield f"sample.py's first word after {start:.2f} s"
    rest = results.rest_bytes(shape, dtype)
    if resident and file and cache and rest is not None:
        yield (
            f"resident memory {resident / 1e6:.0f} MB: file {file / 1e6:.1f}, cache {cache / 1e6:.1f}, "
            f"rest {rest / 1e6:.0f}"
        )
    yield from _missing_lines(results, shape, dtype)


def _shape_own_lines(results: Results, shape: str) -> Iterator[str]:
    """Yield the figures that do not depend on the dtype: choosing a token, bytes of caches."""
    for figure in dict.fromkeys(key.figure for key in results.turns if key[:2] == (shape, ANY_DTYPE)):
        ours, numpy = (results.median(shape, ANY_DTYPE, figure, name) for name in (OURS, NUMPY))
        if ours and numpy:
            yield f"{figure} logits takes {ours * 1e6:.1f} microseconds, in numpy {numpy * 1e6:.0f}"
    sizes = {kind: results.median(shape, ANY_DTYPE, "cache", name) for kind, name in CACHES.items()}
    if cells := ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in sizes.items() if size):
        yield f"caches of 8192 positions: {cells}"
    yield from _missing_lines(results, shape, ANY_DTYPE)


def _missing_lines(results: Results, shape: str, dtype: str) -> Iterator[str]:
    """Yield why figures are missing."""
    reasons = [text for key, text in results.missing.items() if key[:2] == (shape, dtype)]
    yield from (f"not available: {reason}" for reason in dict.fromkeys(reasons))


# -- JSON and chart ---------------------------------------------------------------------------------------------------


def write_json(path: Path, results: Results, facts: Mapping[str, Any]) -> None:
    """Write the facts of the run, every figure with its turns, and the bars."""
    figures = [key._asdict() | {"median": results.median(*key), "turns": turns} for key, turns in results.turns.items()]
    bars = [check._asdict() | {"met": check.met} for check in results.checks()]
    missing = [key._asdict() | {"reason": reason} for key, reason in results.missing.items()]
    whole = {**facts, "figures": figures, "bars": bars, "missing": missing}
    write_file(path, json.dumps(whole, indent=1, default=dataclasses.asdict).encode() + b"\n")


def draw_runtime(figure: Any, results: Results, shapes: Sequence[str]) -> None:
    """Draw, for each shape, decoding speed next to the peers', and the time per token by position."""
    figure.set_size_inches(4.5 * len(shapes), 7)
    axes = figure.subplots(2, len(shapes), squeeze=False)
    for column, shape in enumerate(shapes):
        _draw_decode(axes[0, column], results, shape)
        _draw_positions(axes[1, column], results, shape)


def _draw_decode(axis: Any, results: Results, shape: str) -> None:
    """Draw a bar for each contender and dtype."""
    dtypes = results.dtypes(shape)
    names = [name for name in CONTENDERS if any(results.median(shape, dtype, "decode", name) for dtype in dtypes)]
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        rates = [results.median(shape, dtype, "decode", name) or 0.0 for dtype in dtypes]
        centers = [index + (number - (len(names) - 1) / 2) * width for index in range(len(dtypes))]
        axis.bar(centers, rates, width, label=name)
    axis.set_xticks(range(len(dtypes)), dtypes)
    axis.set(title=shape, ylabel="decode, tokens/s")
    if names:
        axis.legend(fontsize="small")


def _draw_positions(axis: Any, results: Results, shape: str) -> None:
    """Draw the milliseconds per token by position, a line for each dtype."""
    for dtype in results.dtypes(shape):
        if costs := results.token_ms(shape, dtype):
            axis.plot(list(costs), list(costs.values()), marker="o", label=dtype)
            axis.legend(fontsize="small")
    axis.set(xlabel="position", ylabel="ms per token")
    axis.set_ylim(bottom=0)
