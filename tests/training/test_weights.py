import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import SMALL_MODELS, random_tensors

from llamalet import tokenizer
from llamalet.config import ModelConfig
from llamalet.convert import bin_file, formats
from llamalet.convert.imported_model import ImportedModel
from llamalet.errors import NonFiniteError, TokenizerError
from llamalet.model_file import companions
from llamalet.model_file.quantize import dequantize
from model import Llama
from training import weights

LETTERS = [" ", *(chr(97 + i % 26) * (1 + i // 26) for i in range(40))]


@pytest.fixture
def vocabulary(tmp_path):
    """A tokenizer.bin of 300 entries, the size of the small models'."""
    entries = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), *LETTERS]
    path = tmp_path / "letters.bin"
    path.write_bytes(tokenizer.pack([(entry.encode(), float(-i)) for i, entry in enumerate(entries)]))
    return path


def model_of(config: ModelConfig, tensors: Mapping[str, np.ndarray], vocabulary: Path) -> ImportedModel:
    return formats.with_tokenizer(ImportedModel(name="toy", config=config, tensors=tensors), vocabulary)


@pytest.mark.parametrize(
    ("version", "dtype"), [(0, None), (1, None), (2, None), (3, "f32"), (3, "bf16"), (3, "q8"), (3, "q4")]
)
def test_the_training_model_loads_every_version(tmp_path, version, dtype, small_config, vocabulary):
    torch.manual_seed(0)
    model = Llama(small_config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = model_of(small_config, weights.to_arrays(model.state_dict()), vocabulary)
    file = bin_file.write(tmp_path / "m.bin", source, version, dtype=dtype)
    loaded = weights.load_model(file.config, weights.to_state_dict(bin_file.tensors_of(file)))
    assert loaded.config == small_config and not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[name], before[name])  # exporting changed nothing
        np.testing.assert_array_equal(tensor.numpy(), dequantize(file.tensors[name.removesuffix(".weight")]))
        if file.dtype == "f32" or tensor.dim() == 1:
            assert torch.equal(tensor, before[name])
        elif file.dtype == "bf16":
            assert torch.equal(tensor, before[name].to(torch.bfloat16).float())
        else:
            share = {"q8": 0.51 / 127, "q4": 0.15}[file.dtype]
            assert (tensor - before[name]).abs().max() <= share * before[name].abs().max()


def test_the_tokenizer_goes_beside_the_file(tmp_path, vocabulary):
    config = SMALL_MODELS["gqa-tied"]
    written = bin_file.write(tmp_path / "story.bin", model_of(config, random_tensors(config), vocabulary), 1)
    assert companions.beside(tmp_path / "story.bin") == tmp_path / "story.tokenizer.bin"
    assert (tmp_path / "story.tokenizer.bin").read_bytes() == vocabulary.read_bytes()
    assert written.tokenizer_sha256 == tokenizer.load(vocabulary).sha256


def test_llama2c_s_layout_of_the_tokenizer_is_for_its_versions(tmp_path, shared_data):
    config = dataclasses.replace(SMALL_MODELS["gqa-tied"], vocab_size=32000)
    source = model_of(config, random_tensors(config), shared_data / "llama2-tokenizer.model")
    for version, expected in ((1, {".bin", ".model"}), (3, set())):
        folder = tmp_path / str(version)
        bin_file.write(folder / "m.bin", source, version)
        assert {path.suffix for path in folder.glob("m.tokenizer.*")} == expected


def test_a_tokenizer_of_another_size_is_refused(vocabulary):
    config = SMALL_MODELS["gqa-tied"]
    vocabulary.write_bytes(tokenizer.pack([*tokenizer.load(vocabulary).pieces(), (b"one more", -999.0)]))
    with pytest.raises(TokenizerError, match="301"):
        model_of(config, random_tensors(config), vocabulary)


def test_a_non_finite_model_is_not_exported(tmp_path, vocabulary):
    config = SMALL_MODELS["gqa-tied"]
    tensors = random_tensors(config)
    tensors["layers.1.feed_forward.w2"][3, 4] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.feed_forward\.w2"):
        bin_file.write(tmp_path / "m.bin", model_of(config, tensors, vocabulary), 1)


def test_unknown_and_missing_names_are_refused():
    config = SMALL_MODELS["gqa-tied"]
    state = weights.to_state_dict(random_tensors(config))
    state["_orig_mod.norm.weight"] = state.pop("norm.weight")
    with pytest.raises(RuntimeError, match="norm.weight"):
        weights.load_model(config, state)


def test_an_earlier_exports_tokenizer_does_not_stay_beside_the_model(tmp_path, small_config, vocabulary):
    (tmp_path / "m.tokenizer.model").write_bytes(b"of an earlier export")
    bin_file.write(tmp_path / "m.bin", model_of(small_config, random_tensors(small_config), vocabulary), 1)
    assert companions.beside(tmp_path / "m.bin") == tmp_path / "m.tokenizer.bin"
