"""What the server counts, in Prometheus's text format.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper bounds of the buckets of every histogram."""


class Histogram:
    """Counts durations in buckets."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        """Return the samples of this histogram: buckets count all shorter durations too."""
        found, n = [], 0
        for bound, count in zip([*map(str, SECONDS), "+Inf"], self._counts, strict=True):
            n += count
            found.append(f'{name}_bucket{{le="{bound}"}} {n}')
        return [*found, f"{name}_sum {self._sum:.6f}", f"{name}_count {n}"]


class ServerMetrics:
    """The server's counters.

    Attributes:
        n_new_tokens: tokens that were made.
        n_prompt_tokens: tokens of prompts that were read or came from the prefix cache.
        n_cached_tokens: those from the prefix cache.
        n_busy: requests that were refused because too much waited, or given up after waiting.
        ended: texts, by the reason of their end.
        answers: HTTP requests, by route and status.
        first_token_s: from a request's arrival to its first event.
        request_s: from a request's arrival to its end.
    """

    def __init__(self) -> None:
        self.n_new_tokens = self.n_prompt_tokens = self.n_cached_tokens = self.n_busy = 0
        self.ended: Counter[str] = Counter(dict.fromkeys(("stop", "length", "cancelled", "error"), 0))
        self.answers: Counter[tuple[str, int]] = Counter()
        self.first_token_s, self.request_s = Histogram(), Histogram()

    def render(self, gauges: Mapping[str, tuple[float, str]]) -> str:
        """Return all metrics as text.

        Args:
            gauges: other values of this moment, each with what it is.
        """
        lines = []

        def add(name: str, kind: str, what: str, samples: list[str]) -> None:
            lines.extend([f"# HELP llamalet_{name} {what}", f"# TYPE llamalet_{name} {kind}", *samples])

        for name, n, what in (
            ("new_tokens", self.n_new_tokens, "Tokens that were made."),
            ("prompt_tokens", self.n_prompt_tokens, "Tokens of prompts, those from the prefix cache included."),
            ("cached_tokens", self.n_cached_tokens, "Tokens of prompts that came from the prefix cache."),
            ("busy", self.n_busy, "Requests that were refused or given up because too much waited."),
        ):
            add(f"{name}_total", "counter", what, [f"llamalet_{name}_total {n}"])
        ended = [f'llamalet_texts_total{{reason="{reason}"}} {n}' for reason, n in self.ended.items()]
        add("texts_total", "counter", "Texts that ended, by reason.", ended)
        answers = [
            f'llamalet_requests_total{{route="{route}",status="{status}"}} {n}'
            for (route, status), n in sorted(self.answers.items())
        ]
        add("requests_total", "counter", "HTTP requests, by route and status.", answers)
        for name, (value, what) in gauges.items():
            add(name, "gauge", what, [f"llamalet_{name} {value}"])
        for name, histogram, what in (
            ("first_token_seconds", self.first_token_s, "From a request's arrival to its first event."),
            ("request_seconds", self.request_s, "From a request's arrival to its end."),
        ):
            add(name, "histogram", what, histogram.lines(f"llamalet_{name}"))
        return "\n".join(lines) + "\n"
