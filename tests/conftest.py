import os
from pathlib import Path

import pytest
import torture
from toy import SMALL_MODELS

from llamalet.config import ModelConfig

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="run the campaigns, and nothing else, whole")
    parser.addoption("--torture-log", metavar="FILE", help="leave a line for each campaign in FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "campaign(name): tries many cases; all of them with --torture")
    if config.getoption("--torture"):
        os.environ[torture.VARIABLE] = "1"
    if path := config.getoption("--torture-log"):
        config.pluginmanager.register(torture.Log(Path(path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--torture"):
        items[:] = [item for item in items if item.get_closest_marker("campaign")]


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real files of ../shared/data")
    return SHARED_DATA


@pytest.fixture(params=SMALL_MODELS)
def small_config(request) -> ModelConfig:
    return SMALL_MODELS[request.param]
