import os
from pathlib import Path

import numpy as np
import pytest
import torture

from llamalet.config import ModelConfig
from llamalet.format import tensor_specs

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"

# One small model of each kind that Llama files come in.
SMALL_MODELS = {
    "gqa-tied": ModelConfig.create(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=192, vocab_size=300, max_seq_len=32
    ),
    "gqa-untied": ModelConfig.create(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=300, max_seq_len=32, tied=False
    ),
    "mqa-tied": ModelConfig.create(
        dim=96, n_layers=2, n_heads=6, n_kv_heads=1, hidden_dim=160, vocab_size=300, max_seq_len=32
    ),
    "mha-untied": ModelConfig.create(
        dim=48, n_layers=2, n_heads=3, hidden_dim=112, vocab_size=300, max_seq_len=32, tied=False
    ),
}


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


def random_tensors(config: ModelConfig, seed: int = 0, scale: float = 0.1) -> dict[str, np.ndarray]:
    """Every tensor of a model by its checkpoint name, float32: norms around one, matrices around zero."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for spec in tensor_specs(1, config):
        centre = 1.0 if len(spec.shape) == 1 else 0.0
        tensors[spec.name] = (centre + scale * rng.standard_normal(spec.shape)).astype(np.float32)
    return tensors


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real files of ../shared/data")
    return SHARED_DATA


@pytest.fixture(params=SMALL_MODELS)
def small_config(request) -> ModelConfig:
    return SMALL_MODELS[request.param]
