"""The results of a benchmark, turn by turn: medians, ratios and required minimums, as text, JSON and chart."""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llamalet.config import ModelConfig
from llamalet.files import write_file
from llamalet.model_file.header import DTYPES

# The contenders; "fa" is flash attention.
OURS, LLAMA_CPP, LLAMA_CPP_FLASH, LLAMA2C = "llamalet", "llama.cpp", "llama.cpp fa", "llama2.c"
CONTENDERS = (OURS, LLAMA_CPP, LLAMA_CPP_FLASH, LLAMA2C)

# The required tokens/s, as a multiple of the fastest rival's, by dtype, figure and shape.
BARS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("f32", "decode"): {"15M": 1.0, "110M": 1.0},
    ("q8", "decode"): {"15M": 1.8, "110M": 1.25, "1B": 1.15},
    ("q4", "decode"): {"15M": 1.8, "110M": 1.25, "1B": 1.05},
    ("f32", "prefill 128"): {"15M": 1.0, "110M": 0.85},
    ("q8", "prefill 128"): {"15M": 1.0, "110M": 1.2, "1B": 1.0},
    ("q4", "prefill 128"): {"15M": 1.0, "110M": 1.2, "1B": 1.0},
    ("q8", "batch 16"): {"15M": 2.0, "110M": 1.5},
    ("q8", "batch 64"): {"15M": 2.0, "110M": 1.5},
    ("q4", "batch 16"): {"15M": 2.0, "110M": 1.5},
    ("q4", "batch 64"): {"15M": 2.0, "110M": 1.5},
}
# The required speed and size of our q8 relative to our f32, and the allowed memory besides file and cache.
Q8_BARS = {"15M": 2.5, "110M": 3.0, "1B": 3.0}
Q8_SIZE_BAR = 0.28
REST_BAR_BYTES = 200e6

POSITION_PREFIX = "decode at "


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
        return f"{self.shape:5} {self.what:58} {self.value:7.2f} {sign} {self.bar:6.2f} {verdict}"


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
        return [figure for figure in dict.fromkeys(found) if figure.split()[0] in RATES and not at_position(figure)]

    def rival(self, shape: str, dtype: str, figure: str) -> tuple[str, float] | None:
        """Return the fastest rival and its tokens/s.

        llama2.c's run is a rival; its runq uses another kind of q8 (version 2) and is only reported.
        """
        names = (LLAMA_CPP, LLAMA_CPP_FLASH, LLAMA2C) if dtype == "f32" else (LLAMA_CPP, LLAMA_CPP_FLASH)
        rates = [(name, self.median(shape, dtype, figure, name)) for name in names]
        found = [(name, rate) for name, rate in rates if rate is not None]
        return max(found, key=lambda pair: pair[1], default=None)

    def ratio(self, shape: str, dtype: str, figure: str) -> float | None:
        """Return our tokens/s as a multiple of the rival's."""
        ours, rival = self.median(shape, dtype, figure), self.rival(shape, dtype, figure)
        return None if ours is None or rival is None else ours / rival[1]

    def checks(self) -> Iterator[Check]:
        """Yield a check for every bar that has a value."""
        for (dtype, figure), bars in BARS.items():
            for shape, bar in bars.items():
                ratio, rival = self.ratio(shape, dtype, figure), self.rival(shape, dtype, figure)
                if ratio is not None and rival is not None:
                    yield Check(shape, f"{dtype} {figure} / {rival[0]}", ratio, bar)
        for shape, bar in Q8_BARS.items():
            for figure, limit, at_most in (("decode", bar, False), ("file", Q8_SIZE_BAR, True)):
                ours, other = self.median(shape, "q8", figure), self.median(shape, "f32", figure)
                if ours is not None and other is not None:
                    yield Check(shape, f"q8 {figure} / f32 {figure}", ours / other, limit, at_most)
            rest = self.rest_bytes(shape, "q8")
            if rest is not None:
                what = "q8 resident memory besides file and cache, MB"
                yield Check(shape, what, rest / 1e6, REST_BAR_BYTES / 1e6, True)

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


# -- text -------------------------------------------------------------------------------------------------------------


def shape_lines(results: Results, shape: str, config: ModelConfig, turns: int) -> Iterator[str]:
    """Yield the report lines of one shape."""
    yield (
        f"{shape}: {config.n_params / 1e6:.0f}M parameters, dim {config.dim}, {config.n_layers} layers, "
        f"{config.n_heads} heads, hidden_dim {config.hidden_dim}, vocabulary {config.vocab_size}"
    )
    shown = [name for name in CONTENDERS if any(key.shape == shape and key.contender == name for key in results.turns)]
    head = "".join(f"{name:>14}" for name in shown)
    yield f"  {f'tokens/s, medians of {turns} turns':28}{head}{'ratio':>8}{'bar':>7}"
    for dtype in results.dtypes(shape):
        for figure in results.rates(shape, dtype):
            cells = "".join(_cell(results, Key(shape, dtype, figure, name)) for name in shown)
            yield f"  {dtype:5}{figure:23}{cells}{_verdict(results, shape, dtype, figure)}".rstrip()
        yield from (f"       {line}" for line in _own_lines(results, shape, dtype))


def _cell(results: Results, key: Key) -> str:
    """Return the table cell of a median."""
    rate = results.median(*key)
    text = "not available" if key in results.missing else "-"
    return f"{text:>14}" if rate is None else f"{rate:14.1f}"


def _verdict(results: Results, shape: str, dtype: str, figure: str) -> str:
    """Return the table cells of the ratio and its bar."""
    ratio, bar = results.ratio(shape, dtype, figure), BARS.get((dtype, figure), {}).get(shape)
    if ratio is None:
        return ""
    if bar is None:
        return f"{ratio:8.2f}"
    return f"{ratio:8.2f}{bar:7.2f} {'met' if ratio >= bar else 'MISSED'}"


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
    start, resident, cache = (results.median(shape, dtype, figure) for figure in ("start", "resident", "cache"))
    if start:
        yield f"sample.py's first word after {start:.2f} s"
    rest = results.rest_bytes(shape, dtype)
    if resident and file and cache and rest is not None:
        yield (
            f"resident memory {resident / 1e6:.0f} MB: file {file / 1e6:.1f}, cache {cache / 1e6:.1f}, "
            f"rest {rest / 1e6:.0f}"
        )
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
