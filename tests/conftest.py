"""Command-line options, markers and fixtures that tests of every folder use."""

import os
import signal
import sys
from pathlib import Path

# Before numpy and torch are imported: threads that wait must leave the cores to the tests in the other process.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

import pytest
import torture
from toy import SMALL_MODELS

from llamalet.config import ModelConfig

TEST_DATA = "LLAMALET_TEST_DATA"
NO_TEST_DATA = "the folder with real files is missing"


def data_folder() -> Path:
    """Return the folder with real models, vocabularies and texts, whether it exists or not."""
    default = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get(TEST_DATA) or default).resolve()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="run the campaigns alone, with every one of their cases")
    parser.addoption("--torture-log", metavar="FILE", help="write one line per campaign to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "campaign(name): tries many cases, and all of them with --torture")
    config.addinivalue_line("markers", "simd_path: depends on the processor's instructions; run on every path")
    config.addinivalue_line("markers", "trains: starts training in other processes; not in `make test-fast`")
    config.addinivalue_line("markers", "compiles: compiles kernels afresh for seconds; not in `make test-fast`")
    config.addinivalue_line("markers", "slow: takes seconds for another reason; not in `make test-fast`")
    if os.environ.get(TEST_DATA) and not data_folder().is_dir():
        raise pytest.UsageError(f"{TEST_DATA}={os.environ[TEST_DATA]}: no such folder")
    if config.getoption("--torture"):
        os.environ[torture.VARIABLE] = "1"
    if path := config.getoption("--torture-log"):
        config.pluginmanager.register(torture.Log(Path(path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--torture"):
        items[:] = [item for item in items if item.get_closest_marker("campaign")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if count := sum(NO_TEST_DATA in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"{count} tests were skipped: no real files in {data_folder()} ({TEST_DATA})")


@pytest.fixture(autouse=True)
def signals():
    """command.run, which ends a command's process, leaves signals and hooks as they suit its end."""
    handlers, hook = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, sys.unraisablehook
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real models, vocabularies and texts."""
    if not data_folder().is_dir():
        pytest.skip(NO_TEST_DATA)
    return data_folder()


@pytest.fixture(params=SMALL_MODELS)
def small_config(request) -> ModelConfig:
    return SMALL_MODELS[request.param]
