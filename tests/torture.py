"""Campaigns: a test that tries many cases, a sample of them each time and all of them with `pytest --torture`.

    @pytest.mark.campaign("kill -9 at random moments")
    @pytest.mark.parametrize("seed", range(cases(10, 100)))
    def test_a_killed_run_goes_on(seed): ...

`make torture` runs the campaigns whole and leaves a line for each in benchmarks/torture.log: how many cases there were,
how many failed, how long it took. A test that tries several cases by itself says so with record_property("cases", n);
of any other property that it records, a number, the log names the largest.
"""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

VARIABLE = "LLAMALET_TORTURE"  # the environment reaches child processes too
Cases = TypeVar("Cases", int, Sequence)


def cases(sample: Cases, whole: Cases) -> Cases:
    """What to try: `whole` with --torture, otherwise `sample`."""
    return whole if VARIABLE in os.environ else sample


@dataclass
class Campaign:
    """What became of a campaign's cases."""

    cases: int = 0
    failures: int = 0
    seconds: float = 0.0
    largest: dict[str, float] = field(default_factory=dict)

    def add(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        self.failures += report.failed
        if report.when == "call" and not report.skipped:
            properties = dict(report.user_properties)
            self.cases += properties.pop("cases", 1)
            for name, value in properties.items():
                self.largest[name] = max(value, self.largest.get(name, value))


class Log:
    """Writes what became of the campaigns of a test session to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.time()
        self.campaigns: dict[str, Campaign] = {}
        self.names: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if marker := item.get_closest_marker("campaign"):
                self.names[item.nodeid] = marker.args[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if name := self.names.get(report.nodeid):
            self.campaigns.setdefault(name, Campaign()).add(report)

    def pytest_sessionfinish(self) -> None:
        self.path.write_text("\n".join(self.lines()) + "\n")

    def lines(self) -> list[str]:
        """The log: when and where, then the campaigns."""
        date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.started))
        lines = [
            f"pytest --torture on {date}, commit {commit()}",
            f"{processor()}, {os.cpu_count()} cores, {platform.system()}, "
            f"Python {platform.python_version()}, torch {torch_version()}",
            "",
            f"{'campaign':60} {'cases':>6} {'failures':>8} {'minutes':>8}",
        ]
        for name, campaign in sorted(self.campaigns.items()):
            largest = "".join(f"  {what.replace('_', ' ')}: {value:g}" for what, value in campaign.largest.items())
            lines.append(f"{name:60} {campaign.cases:6} {campaign.failures:8} {campaign.seconds / 60:8.1f}{largest}")
        total, failures = (sum(getattr(c, name) for c in self.campaigns.values()) for name in ("cases", "failures"))
        lines.append(f"{'together':60} {total:6} {failures:8} {(time.time() - self.started) / 60:8.1f}")
        return lines


def commit() -> str:
    """The commit that the tests ran on, with a + where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def torch_version() -> str:
    """The version of torch, without importing it."""
    from importlib.metadata import version

    return version("torch")
