"""The results of the serving benchmark: ratios and required values, as text and chart."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import aligned
from benchmarks.report import OURS, Check, Key, Results
from benchmarks.servers import LLAMA_SERVERS
from llamalet.engine import MAX_BATCH

# In-process batches of the same texts.
BATCH = "generate_batch"
CONTENDERS = (OURS, *LLAMA_SERVERS)

# The required tokens/s of 16 streams as a share of in-process batches', and of any case as a multiple of the best
# llama-server's, by shape and clients.
BATCH_CLIENTS = 16
BATCH_BARS: Mapping[str, float] = {"15M": 0.85, "110M": 0.95}
PEER_BARS: Mapping[str, Mapping[int, float]] = {
    "15M": {1: 1.0, 4: 1.0, 16: 1.5, 64: 1.5},
    "110M": {1: 1.0, 4: 1.0, 16: 2.0, 64: 2.0},
}
# How many times as long the others may wait for a token while a long prompt is read, and that prompt for its first.
OTHERS_BAR, LATE_BAR = 2.0, 3.0

RATE, CACHED, RESIDENT, SERVER_CPU, CLIENT_CPU = "tokens/s", "cached", "resident", "server cpu/s", "client cpu/s"
FIRST, BETWEEN = "first", "between"
SHARES = {"p50": 0.5, "p99": 0.99}
# Of a long prompt that comes late: the others' time between tokens before and while it is read, its first token alone
# and among the others.
BEFORE, WHILE, ALONE, LATE = "between before", "between while", "first alone", "first among others"
LONG_PROMPT = "long prompt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kind of load.

    Attributes:
        clients: that each send a request when they have an answer; of random arrivals, the most that are expected.
        prompt: number of tokens of each prompt.
        stream: whether answers come as events.
        temperature: 0, or another with top-p 0.9.
        poisson: whether requests come at random times instead, whoever still waits.
    """

    clients: int
    prompt: int
    stream: bool
    temperature: float
    poisson: bool = False

    @property
    def slots(self) -> int:
        """How many texts a server with a fixed number should take at once."""
        return MAX_BATCH if self.poisson else self.clients

    @property
    def batch(self) -> str:
        """The name of what in-process batches have in common with this case."""
        return f"{self.clients} x {self.prompt}, T={self.temperature:g}{', poisson' if self.poisson else ''}"

    @property
    def name(self) -> str:
        """The name of this case."""
        return f"{self.batch}, {'streamed' if self.stream else 'whole'}"

    def figure(self, what: str) -> str:
        """Return the name of a figure of this case."""
        return f"{self.name}: {what}"


@dataclass
class ServingResults(Results):
    """The figures of all turns, and the cases that were measured, by shape."""

    cases: dict[str, list[Case]] = field(default_factory=dict)

    def of(self, shape: str, dtype: str, case: Case, what: str, contender: str = OURS) -> float | None:
        """Return the median of a figure of a case."""
        return self.median(shape, dtype, case.figure(what), contender)

    def best_peer(self, shape: str, dtype: str, case: Case) -> str | None:
        """Return the setting of llama-server with the most tokens/s, None if there is none."""
        found = self.fastest(shape, dtype, case.figure(RATE), tuple(LLAMA_SERVERS))
        return found and found[0]

    def batch_ratio(self, shape: str, dtype: str, case: Case, contender: str = OURS) -> float | None:
        """Return a server's tokens/s as a share of in-process batches'; None at random arrivals."""
        rate = self.of(shape, dtype, case, RATE, contender)
        base = self.median(shape, dtype, f"{case.batch}: {RATE}", BATCH)
        return None if rate is None or base is None or case.poisson else rate / base

    def peer_ratio(self, shape: str, dtype: str, case: Case) -> float | None:
        """Return our tokens/s as a multiple of the best llama-server's; None at random arrivals."""
        peer = self.best_peer(shape, dtype, case)
        return None if peer is None or case.poisson else self.over(Key(shape, dtype, case.figure(RATE)), peer)

    def batch_bar(self, shape: str, case: Case) -> float | None:
        """Return the share of in-process batches' tokens/s that a case has to reach."""
        return BATCH_BARS.get(shape) if case.clients == BATCH_CLIENTS and case.stream and not case.poisson else None

    def peer_bar(self, shape: str, case: Case) -> float | None:
        """Return the multiple of llama-server's tokens/s that a case has to reach."""
        return None if case.poisson else PEER_BARS.get(shape, {}).get(case.clients)

    def checks(self) -> Iterator[Check]:
        """Yield a check for every bar that has a value."""
        for shape, cases in self.cases.items():
            for dtype in self.dtypes(shape):
                for case in cases:
                    for other, ratio, bar in (
                        (BATCH, self.batch_ratio(shape, dtype, case), self.batch_bar(shape, case)),
                        ("llama-server", self.peer_ratio(shape, dtype, case), self.peer_bar(shape, case)),
                    ):
                        if ratio is not None and bar is not None:
                            yield Check(shape, f"{dtype} {case.name} / {other}", ratio, bar)
                for what, ratio, bar in self.long_prompt_ratios(shape, dtype):
                    yield Check(shape, f"{dtype} {what}", ratio, bar, True)

    def long_prompt_ratios(self, shape: str, dtype: str, contender: str = OURS) -> Iterator[tuple[str, float, float]]:
        """Yield what a long prompt costs the others and itself: its name, the ratio and the most that is allowed."""
        for what, figure, base, bar in (
            ("others' time between tokens, p99", f"{WHILE} p99", f"{BEFORE} p99", OTHERS_BAR),
            ("first token among others", LATE, ALONE, LATE_BAR),
        ):
            key = Key(shape, dtype, f"{LONG_PROMPT}: {figure}", contender)
            if (ratio := self.over(key, contender, f"{LONG_PROMPT}: {base}")) is not None:
                yield f"{LONG_PROMPT}: {what}", ratio, bar


# -- text -------------------------------------------------------------------------------------------------------------


def resident_with(slots: int) -> str:
    """Return the name of the memory of a server after it has made so many texts at once."""
    return f"{RESIDENT} with {slots} slots"


def shape_lines(results: ServingResults, shape: str, dtype: str) -> Iterator[str]:
    """Yield the report lines of one shape: all cases, what a long prompt costs, memory."""
    cases = results.cases.get(shape, [])
    rows = [["clients x prompt", OURS, "llama-server", "ratio", "bar", "", "/ batch", "bar", "",
             "first ms p50/p99", "llama", "between ms p50/p99", "llama", "cached"]]  # fmt: skip
    rows += [_case_row(results, shape, dtype, case) for case in cases]
    if cases:
        yield f"{shape} {dtype}, tokens/s, medians of turns; llama-server with the best of its settings"
        yield from (f"  {line}" for line in aligned(rows))
    for contender in CONTENDERS:
        yield from _long_prompt_lines(results, shape, dtype, contender)
        for slots in dict.fromkeys([*(case.slots for case in cases), MAX_BATCH]):
            resident = results.median(shape, dtype, resident_with(slots), contender)
            if resident is not None:
                yield f"  {contender}: {resident / 1e6:.0f} MB resident after {slots} at once"
    yield from (
        f"  not available: {key.contender}: {text}" for key, text in results.missing.items() if key.shape == shape
    )


def _case_row(results: ServingResults, shape: str, dtype: str, case: Case) -> list[str]:
    """Return the cells of a case."""
    peer = results.best_peer(shape, dtype, case)
    cells = [case.name, _number(results.of(shape, dtype, case, RATE))]
    cells.append("-" if peer is None else f"{results.of(shape, dtype, case, RATE, peer):.0f}{_setting(peer)}")
    cells += _verdict(results.peer_ratio(shape, dtype, case), results.peer_bar(shape, case))
    cells += _verdict(results.batch_ratio(shape, dtype, case), results.batch_bar(shape, case))
    for what in (FIRST, BETWEEN):
        for contender in (OURS, peer):
            times = [
                results.of(shape, dtype, case, f"{what} {share}", contender) if contender else None for share in SHARES
            ]
            cells.append("/".join("-" if time is None else f"{time * 1e3:.3g}" for time in times))
    cached = results.of(shape, dtype, case, CACHED)
    return [*cells, "-" if cached is None else f"{cached:.0%}"]


def _setting(peer: str) -> str:
    """Return what is said of a setting after its tokens/s."""
    return peer.removeprefix("llama-server")


def _number(value: float | None) -> str:
    """Return the cell of a rate."""
    return "-" if value is None else f"{value:.0f}"


def _verdict(ratio: float | None, bar: float | None) -> list[str]:
    """Return the cells of a ratio, its bar and whether it is met."""
    if ratio is None or bar is None:
        return ["-" if ratio is None else f"{ratio:.2f}", "", ""]
    return [f"{ratio:.2f}", f"{bar:.2f}", "met" if ratio >= bar else "MISSED"]


def _long_prompt_lines(results: ServingResults, shape: str, dtype: str, contender: str) -> Iterator[str]:
    """Yield what a long prompt costs with one server."""
    times = {
        what: results.median(shape, dtype, f"{LONG_PROMPT}: {what}", contender)
        for what in (f"{BEFORE} p99", f"{WHILE} p99", ALONE, LATE)
    }
    if None not in times.values():
        before, during, alone, late = (f"{(time or 0) * 1e3:.1f}" for time in times.values())
        ratios = ", ".join(f"{ratio:.2f} times" for _, ratio, _ in results.long_prompt_ratios(shape, dtype, contender))
        yield (
            f"  {contender}: a long prompt: the others' time between tokens, p99: {before} -> {during} ms; "
            f"its first token {alone} -> {late} ms ({ratios})"
        )


# -- chart ------------------------------------------------------------------------------------------------------------


def draw(figure: Any, results: ServingResults, shapes: Sequence[str]) -> None:
    """Draw, for each shape and prompt, tokens/s by the number of clients, streamed, at the highest temperature."""
    prompts = sorted({case.prompt for shape in shapes for case in results.cases[shape] if case.stream})
    if not prompts:
        return
    figure.set_size_inches(4.5 * len(prompts), 3.5 * len(shapes))
    axes = figure.subplots(len(shapes), len(prompts), squeeze=False)
    for row, shape in enumerate(shapes):
        for column, prompt in enumerate(prompts):
            axis = axes[row, column]
            _draw_rates(axis, results, shape, prompt)
            axis.set(title=f"{shape}, prompts of {prompt}", xlabel="clients", ylabel="tokens/s", xscale="log")
            axis.set_ylim(bottom=0)


def _draw_rates(axis: Any, results: ServingResults, shape: str, prompt: int) -> None:
    """Draw a line for each contender and dtype."""
    cases = [case for case in results.cases[shape] if case.prompt == prompt and case.stream and not case.poisson]
    hottest = max((case.temperature for case in cases), default=0)
    cases = sorted((case for case in cases if case.temperature == hottest), key=lambda case: case.clients)
    for dtype in results.dtypes(shape):
        for contender in (*CONTENDERS, BATCH):
            figure_of = (
                (lambda case: f"{case.batch}: {RATE}") if contender == BATCH else (lambda case: case.figure(RATE))
            )
            rates = [(case.clients, results.median(shape, dtype, figure_of(case), contender)) for case in cases]
            if found := [(clients, rate) for clients, rate in rates if rate is not None]:
                axis.plot(*zip(*found, strict=True), marker="o", label=f"{contender} {dtype}")
    if cases:
        ticks = [case.clients for case in cases]
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.legend(fontsize="small")
