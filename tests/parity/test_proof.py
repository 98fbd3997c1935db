"""One model, three programs: PyTorch, plain numpy, and the compiled kernels."""

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import SMALL_MODELS, random_tensors

from llamalet import model_file
from llamalet.config import Llama3Scaling, ModelConfig
from llamalet.convert.bin_file import tensors_of
from llamalet.kernels.transformer import Transformer
from llamalet.reference import NumpyTransformer
from training import weights

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPE_FIELDS = ("dim", "n_heads", "n_kv_heads", "hidden_dim")

# Rounding in another order, relative to the largest logit; seen: below 2e-6.
FLOAT32_BOUND = 2e-5
# q8 and q4 round the activations of every product too, on weights as wild as random ones; seen: below 0.03.
INT8_BOUND = 0.08


def preset(name: str) -> ModelConfig:
    """The shape of a preset, with two layers and a small vocabulary: neither changes what its rows look like."""
    table = tomllib.loads((CONFIGS / f"{name}.toml").read_text())
    shape = {field: table[field] for field in SHAPE_FIELDS if field in table}
    return ModelConfig.create(**shape, n_layers=2, vocab_size=300, max_seq_len=32)


PRESETS = {name: preset(name) for name in ("stories260K", "stories15M", "stories42M", "stories110M")}
LLAMA3 = dataclasses.replace(
    SMALL_MODELS["gqa-tied"],
    rope_theta=500000.0,
    norm_eps=1e-6,
    rope_scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16),
)
MODELS = {**SMALL_MODELS, **PRESETS, "llama3": LLAMA3}
VERSIONS = ((0, None), (1, None), (2, None), (3, "f32"), (3, "bf16"), (3, "q8"), (3, "q4"))
LARGE = ("stories42M", "stories110M")
CASES = [
    pytest.param(name, version, dtype, marks=[pytest.mark.slow] if name in LARGE else [])
    for name in MODELS
    for version, dtype in VERSIONS
    if (name, version) not in {("stories260K", 2), ("llama3", 0)}
]


@pytest.mark.parametrize(("name", "version", "dtype"), CASES)
def test_torch_numpy_and_kernels_agree(tmp_path, name, version, dtype):
    config = MODELS[name]
    file = model_file.write(tmp_path / "m.bin", version, config, random_tensors(config, scale=0.05), dtype=dtype)
    rounds = file.dtype in ("q8", "q4")
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, config.max_seq_len)
    with torch.inference_mode():
        model = weights.load_model(config, weights.to_state_dict(tensors_of(file)))
        expected = model(torch.from_numpy(tokens)[None])[0].numpy()
    in_numpy = NumpyTransformer(file, kv="f32").logits(tokens)
    in_kernels = Transformer(file, kv="f32").logits(tokens)
    one_by_one = Transformer(file, kv="f32")
    cache = one_by_one.new_cache()
    decoded = np.stack([one_by_one.decode(cache, int(token)).copy() for token in tokens])

    scale = np.abs(expected).max()
    bound = (INT8_BOUND if rounds else FLOAT32_BOUND) * scale
    assert np.abs(in_numpy - expected).max() < bound
    # The three torch-free passes round the same activations, so even there they differ by float32 rounding alone,
    # but for activations that lie halfway between two integers.
    near = (INT8_BOUND / 4 if rounds else FLOAT32_BOUND) * scale
    assert np.abs(in_kernels - in_numpy).max() < near
    assert np.abs(decoded - in_numpy).max() < near


def test_stories42m_needs_groups_of_32_and_stories260k_none(tmp_path):
    config = PRESETS["stories42M"]
    assert config.hidden_dim == 1376
    assert model_file.write(tmp_path / "m.bin", 2, config, random_tensors(config)).group_size == 32
    with pytest.raises(ValueError, match="hidden_dim=172"):
        model_file.write(tmp_path / "m.bin", 2, PRESETS["stories260K"], random_tensors(PRESETS["stories260K"]))
