from pathlib import Path

import numpy as np
import pytest
from toy import SMALL_MODELS, random_tensors

from llamalet import model_file
from llamalet.config import ModelConfig
from llamalet.convert import safetensors_file
from llamalet.errors import ConfigError, FormatError
from parity import debug_state

GOLDEN = Path(__file__).parents[1] / "golden" / "debug_state.safetensors"
CONFIG = SMALL_MODELS["gqa-untied"]
TINY = ModelConfig.create(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=32, vocab_size=40, max_seq_len=8)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.bin"
    model_file.write(path, 1, CONFIG, random_tensors(CONFIG))
    return path


@pytest.mark.parametrize(("writer", "checker"), [("torch", "numba"), ("numba", "torch")])
def test_each_backend_confirms_what_the_other_wrote(model, tmp_path, capsys, writer, checker):
    state = tmp_path / "s.safetensors"
    assert debug_state.main(["write", str(model), str(state), f"--backend={writer}"]) == 0
    assert debug_state.main(["check", str(model), str(state), f"--backend={checker}"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("overall okay\n") and "BAD" not in shown
    for name in ("layers.1.gate", "logits", "gradients.layers.0.attention.wq", "steps.norms.norm", "steps.loss"):
        assert f"  {name}\n" in shown


def changed(path, name, change):
    tensors, metadata = safetensors_file.read_arrays(path), safetensors_file.read_metadata(path)
    tensors = {key: tensor.copy() for key, tensor in tensors.items()}
    tensors[name].reshape(-1)[0] += np.float32(change) * np.abs(tensors[name]).max()
    debug_state.write(path, tensors, metadata)


@pytest.mark.parametrize(
    "name", ["layers.0.mixed", "logits", "loss", "gradients.norm", "steps.loss", "steps.norms.norm"]
)
def test_a_number_that_is_off_is_found(model, tmp_path, capsys, name):
    state = tmp_path / "s.safetensors"
    debug_state.main(["write", str(model), str(state), "--backend=numba"])
    changed(state, name, 1e-3)
    with pytest.raises(debug_state.Different, match="1 of .* tensors are not what numba computes"):
        debug_state.main(["check", str(model), str(state), "--backend=numba"])
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("BAD")] == [name]


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_both_backends_still_compute_what_is_on_record(tmp_path, backend, capsys):
    """The file was written by PyTorch: debug_state write with --batch_size=2 --positions=6."""
    assert GOLDEN.stat().st_size < 100_000
    model_file.write(tmp_path / "m.bin", 1, TINY, random_tensors(TINY))
    assert debug_state.main(["check", str(tmp_path / "m.bin"), str(GOLDEN), f"--backend={backend}"]) == 0
    assert "overall okay" in capsys.readouterr().out


def test_another_model_is_refused(model, tmp_path):
    state, other = tmp_path / "s.safetensors", tmp_path / "other.bin"
    debug_state.main(["write", str(model), str(state), "--backend=numba"])
    model_file.write(other, 1, CONFIG, random_tensors(CONFIG, seed=1))
    with pytest.raises(FormatError, match="weights_sha256"):
        debug_state.main(["check", str(other), str(state), "--backend=numba"])


def test_damaged_states_are_refused(model, tmp_path):
    state = tmp_path / "s.safetensors"
    debug_state.main(["write", str(model), str(state), "--backend=numba"])
    tensors, metadata = safetensors_file.read_arrays(state), safetensors_file.read_metadata(state)
    for change, words in (
        ({"tokens": np.full((2, 16), 1 << 40)}, "not among the 300"),
        ({"targets": np.full((2, 16), -2)}, "not among the 300"),
        ({"tokens": np.zeros(16, np.int64)}, "must be two equal"),
        ({"targets": np.zeros((2, 3), np.int64)}, "must be two equal"),
    ):
        debug_state.write(tmp_path / "bad.safetensors", tensors | change, metadata)
        with pytest.raises(FormatError, match=words):
            debug_state.main(["check", str(model), str(tmp_path / "bad.safetensors"), "--backend=numba"])
    debug_state.write(tmp_path / "few.safetensors", {key: tensors[key] for key in ("tokens", "targets")}, metadata)
    with pytest.raises(debug_state.Different):
        debug_state.main(["check", str(model), str(tmp_path / "few.safetensors"), "--backend=numba"])


@pytest.mark.parametrize("option", ["--batch_size=0", "--positions=0", "--positions=33"])
def test_batches_that_are_none_are_refused(model, tmp_path, option):
    with pytest.raises(ConfigError, match=option[2:].partition("=")[0]):
        debug_state.main(["write", str(model), str(tmp_path / "s"), "--backend=numba", option])
