"""Campaigns: tests with many cases, of which a sample runs every time and all run with `pytest --torture`.

    @pytest.mark.campaign("kill -9 at random moments")
    @pytest.mark.parametrize("seed", range(cases(10, 100)))
    def test_a_killed_run_resumes(seed): ...

`make torture` runs every case and writes one line per campaign to benchmarks/torture.log: the number of cases, the
failures and the minutes. Cases whose parameter `backend` is numba have a line of their own. A test that tries several
cases itself reports them with record_property("cases", n). Of any other recorded number the log gives the largest.
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
    """Return the cases to try: `whole` with --torture, otherwise `sample`."""
    return whole if VARIABLE in os.environ else sample


@dataclass
class Campaign:
    """The results of a campaign so far."""

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
    """Writes the results of the campaigns to a file at the end of the session."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.time()
        self.campaigns: dict[str, Campaign] = {}
        self.names: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if marker := item.get_closest_marker("campaign"):
                parameters = item.callspec.params if hasattr(item, "callspec") else {}
                self.names[item.nodeid] = marker.args[0] + ", numba" * (parameters.get("backend") == "numba")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if name := self.names.get(report.nodeid):
            self.campaigns.setdefault(name, Campaign()).add(report)

    def pytest_sessionfinish(self) -> None:
        self.path.write_text("\n".join(self.lines()) + "\n")

    def lines(self) -> list[str]:
        """Return the lines of the log: date and machine, then one line per campaign."""
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
    """Return the commit under test, with a + if files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """Return the name of the processor, if the system reports one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def torch_version() -> str:
    """Return the version of torch without importing it."""
    from importlib.metadata import version

    return version("torch")
