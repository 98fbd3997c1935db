"""Models from elsewhere, trained further."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODELS
from toy import toy_data, toy_model

import train
from interchange import formats, huggingface
from llamalet import format
from llamalet.config import ModelConfig, RopeScaling
from llamalet.errors import ConfigError, FormatError
from training import checkpoint

VOCAB = 300
SCALED = ModelConfig.create(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, hidden_dim=48, vocab_size=VOCAB, max_seq_len=4096,
    rope_theta=5e5, tied=False,
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32),
)  # fmt: skip
FEW_STEPS = [
    "--max_iters=2", "--batch_size=2", "--max_seq_len=32", "--warmup_iters=1", "--eval_iters=2", "--threads=1",
    "--compile=False", "--no-sample",
]  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_data(tmp_path / "data" / "toy", VOCAB)
    return tmp_path


def train_further(path: object, *argv: str, out: str = "further") -> checkpoint.Checkpoint:
    """Train two steps and return the checkpoint of before the first."""
    assert train.main([*FEW_STEPS, f"--init_from={path}", f"--out_dir={out}", *argv]) == 0
    return checkpoint.load(f"{out}/checkpoints/step-00000000")


def check_same(state: dict[str, torch.Tensor], path: Path) -> None:
    tensors = format.read(path).tensors
    assert {name + ".weight" for name in tensors} == state.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name + ".weight"], torch.tensor(tensor)), name


@pytest.mark.parametrize("config", [SMALL_MODELS["gqa-tied"], SMALL_MODELS["mha-untied"]], ids=["tied", "untied"])
def test_a_bin_is_trained_further_from_its_own_weights(project, config):
    path = toy_model(project, config)
    before = train_further(path)
    check_same(before.model_state, path)
    after = checkpoint.load("further/checkpoints/step-00000002")
    assert not torch.equal(before.model_state["norm.weight"], after.model_state["norm.weight"])


def test_what_no_option_says_comes_with_the_model_and_stays(project):
    path = toy_model(project, SCALED, version=3, dtype="f32")
    before = train_further(path)
    check_same(before.model_state, path)
    assert before.model_config.rope_scaling == SCALED.rope_scaling
    assert (before.model_config.rope_theta, before.model_config.head_dim) == (5e5, 12)
    assert before.model_config.max_seq_len == 32, "as typed"
    assert train.main(["--resume", "--out_dir=further", "--max_iters=3", "--schedule=cosine"]) == 0
    assert format.read("further/model.bin").config.rope_scaling == SCALED.rope_scaling


def test_large_contexts_are_not_trained_unless_asked_for(project):
    path = toy_model(project, SCALED, version=3, dtype="f32")
    toy_data(project / "data" / "toy", VOCAB, n_tokens=3000)
    options = [option for option in FEW_STEPS if not option.startswith("--max_seq_len")]
    assert train.main([*options, f"--init_from={path}", "--max_iters=1", "--batch_size=1"]) == 0
    assert checkpoint.load("out/checkpoints/step-00000001").model_config.max_seq_len == 1024


def test_runs_and_checkpoints_and_other_formats_are_read(project):
    path = toy_model(project, SMALL_MODELS["gqa-untied"])
    first = train_further(path, out="first")
    best = checkpoint.find_best("first")
    assert best is not None
    ended = checkpoint.load(best).model_state
    for name in ("first", str(best)):
        again = train_further(name, out=f"from-{Path(name).name}")
        assert all(torch.equal(again.model_state[key], ended[key]) for key in ended)
    source = dataclasses.replace(formats.read("bin", str(path)), tokenizer=None, tokenizer_data=b"")
    huggingface.write(project / "folder", source)
    hub = train_further("folder", out="from-hf")
    assert all(torch.equal(hub.model_state[key], first.model_state[key]) for key in ended)


def test_a_resumed_run_does_not_start_over(project, capsys):
    path = toy_model(project, SMALL_MODELS["gqa-tied"])
    train_further(path)
    path.unlink()
    assert train.main([*FEW_STEPS, f"--init_from={path}", "--out_dir=further", "--resume=auto", "--max_iters=3"]) == 0
    assert "after step 2 of 3" in capsys.readouterr().out


def test_another_shape_or_vocabulary_is_refused(project):
    path = toy_model(project, SMALL_MODELS["gqa-tied"])
    with pytest.raises(ConfigError, match=r"dim=32: .*model\.bin has 64"):
        train_further(path, "--dim=32")
    with pytest.raises(FormatError, match="nowhere.bin: no such file"):
        train_further("nowhere.bin")
    path = toy_model(project, dataclasses.replace(SMALL_MODELS["gqa-tied"], vocab_size=VOCAB + 1))
    with pytest.raises(ConfigError, match="vocab_size=300: .* has 301; .*another vocabulary than that of .*--vocab"):
        train_further(path)
