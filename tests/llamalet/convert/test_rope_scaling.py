"""RoPE scaling in every format: read, computed, written again. The values are transformers' or an separate pass's."""

import dataclasses
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from other_programs import FACTOR, LLAMA_CPP_FACTORS, OLD, TYPE, logits, transformers_logits, write_gguf
from toy import random_tensors, toy_tokenizer

from llamalet import model_file
from llamalet.config import LinearScaling, Llama3Scaling, ModelConfig, RopeDivisors, RopeScaling, rope_frequencies
from llamalet.convert import bin_file, formats, gguf_file, huggingface, target
from llamalet.convert.imported_model import ImportedModel, llama3_scaling
from llamalet.errors import ConfigError, FormatError
from llamalet.reference import NumpyTransformer
from llamalet.tokenizer import pack
from parity import in_torch

CONFIG = ModelConfig.create(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=300, max_seq_len=64, tied=False
)
TENSORS = random_tensors(CONFIG, seed=5, scale=0.2)
IDS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 60)
PLAIN = rope_frequencies(CONFIG)
TOLERANCE = 1e-4  # of logits up to 8, in float32; a wrong scaling is off by more than 1
DIVISORS = (1.0, 1.25, 1.5, 2.25, 3.0, 0.75, 9.5, 70.0)


def llama3_of(original_max_seq_len: int) -> Llama3Scaling:
    return dataclasses.replace(llama3_scaling(8.0), original_max_seq_len=original_max_seq_len)


SCALINGS: dict[str, RopeScaling] = {
    "linear": LinearScaling(factor=4.0),
    "a third": LinearScaling(factor=8 / 3),
    "llama3": llama3_scaling(8.0),
    "llama3, another context": llama3_of(64),
    "divisors": RopeDivisors(divisors=DIVISORS),
}
VOCABULARY = toy_tokenizer(CONFIG.vocab_size)


def source_of(scaling: RopeScaling | None) -> ImportedModel:
    return ImportedModel(
        name="toy", config=dataclasses.replace(CONFIG, rope_scaling=scaling), tensors=TENSORS, tokenizer=VOCABULARY,
        tokenizer_data=pack(VOCABULARY.pieces()),
    )  # fmt: skip


def our_logits(source: ImportedModel) -> np.ndarray:
    """What the runtime computes, in whose tables PyTorch's model agrees."""
    file = model_file.in_memory(Path(source.name), source.config, source.tensors, "f32")
    found = NumpyTransformer(file).logits(IDS)
    np.testing.assert_allclose(
        in_torch.TorchLogits(bin_file.tensors_of(file), file.config).logits(IDS), found, atol=TOLERANCE
    )
    return found


def check_logits(source: ImportedModel, divisors: np.ndarray | float) -> None:
    """The model computes what one does whose frequencies are rope_theta's by these divisors."""
    expected = logits(CONFIG, TENSORS, PLAIN / divisors, IDS)
    np.testing.assert_allclose(our_logits(source), expected, atol=TOLERANCE)


# -- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "factor"), LLAMA_CPP_FACTORS)
def test_gguf_scales_as_llama_cpp_does(tmp_path, keys, factor):
    write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, keys=keys)
    found = gguf_file.read(str(tmp_path / "m.gguf"))
    assert found.config.rope_scaling == (None if factor == 1 else LinearScaling(factor=factor))
    check_logits(found, factor)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_gguf_divides_by_any_tensor_of_factors(tmp_path, factor):
    tensor = np.array(DIVISORS, np.float32)
    write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, keys={FACTOR: factor}, more={"rope_freqs.weight": tensor})
    found = gguf_file.read(str(tmp_path / "m.gguf"))
    assert found.config.rope_scaling == RopeDivisors(divisors=tuple(factor * tensor))
    check_logits(found, factor * tensor)


@pytest.mark.parametrize("factor", [8.0, 32.0, 3.3, 8.123456])
def test_llama3_s_factors_are_known_again_as_converters_compute_them(tmp_path, factor):
    """Source: llama.cpp, conversion of LlamaForCausalLM, `generate_extra_tensors`: torch's float32."""
    config = dataclasses.replace(CONFIG, rope_theta=500000.0)
    frequencies = 1.0 / (500000.0 ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim))
    factors = []
    for frequency in frequencies:
        wavelen = 2 * math.pi / frequency
        smooth = (8192 / wavelen - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if wavelen < 8192 / 4 else factor if wavelen > 8192 else between)
    more = {"rope_freqs.weight": np.array(factors, np.float32)}
    write_gguf(tmp_path / "m.gguf", config, TENSORS, more=more)
    assert gguf_file.read(str(tmp_path / "m.gguf")).config.rope_scaling == llama3_scaling(factor)


@pytest.mark.parametrize("value", [1.0, 3.0])
def test_equal_divisors_are_one_factor(tmp_path, value):
    more = {"rope_freqs.weight": np.full(8, value, np.float32)}
    write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, more=more)
    found = gguf_file.read(str(tmp_path / "m.gguf")).config.rope_scaling
    assert found == (None if value == 1 else LinearScaling(factor=value))


ROPE_FREQS = np.array(DIVISORS, np.float32)


@pytest.mark.parametrize(
    ("keys", "factors", "words"),
    [
        ({TYPE: "yarn", FACTOR: 4.0}, None, "scaling.type is 'yarn', the factor 4: only 'linear' can be read"),
        ({TYPE: "longrope", FACTOR: 2.0}, None, "scaling.type is 'longrope', the factor 2"),
        ({TYPE: "yarn", OLD: 2.0}, None, "scaling.type is 'yarn', the factor 2"),
        ({TYPE: "dynamic", FACTOR: 1.0}, None, "scaling.type is 'dynamic'"),
        ({TYPE: 1, FACTOR: 2.0}, None, "scaling.type is 1"),
        ({FACTOR: -4.0}, None, "scaling.factor is -4: must be a positive number"),
        ({FACTOR: math.inf}, None, "scaling.factor is inf: must be"),
        ({OLD: math.nan}, None, "scale_linear is nan: must be"),
        ({FACTOR: "4"}, None, "scaling.factor='4': must be a number"),
        ({FACTOR: [4.0, 4.0]}, None, r"scaling.factor=\[4.0, 4.0\]: must be a number"),
        ({FACTOR: True}, None, "scaling.factor=True: must be a number"),
        ({FACTOR: 2.0, "llama.rope.scaling.attn_factor": 1.25}, None, "attn_factor is 1.25: only 1 can be read"),
        ({}, ROPE_FREQS[:4], r"rope_freqs.weight is F32 of shape \(4,\): must be F32 of shape \(8,\)"),
        ({}, ROPE_FREQS.astype(np.float16), r"rope_freqs.weight is F16 of shape \(8,\)"),
        ({}, ROPE_FREQS.reshape(2, 4), r"rope_freqs.weight is F32 of shape \(2, 4\)"),
        ({}, -ROPE_FREQS, r"rope_freqs.weight: rope_scaling.divisors\[0\]=-1.0: must be a positive float32 number"),
        ({}, ROPE_FREQS * [1, 1, 0, 1, 1, 1, 1, 1], r"divisors\[2\]=0.0: must be"),
        ({}, ROPE_FREQS * [1, 1, 1, np.nan, 1, 1, 1, 1], r"divisors\[3\]=nan: must be"),
        ({}, ROPE_FREQS * [1, 1, 1, 1, np.inf, 1, 1, 1], r"divisors\[4\]=inf: must be"),
        ({TYPE: "longrope"}, "rope_factors_long.weight", "rope_factors_long.weight is not part of a Llama model"),
    ],
)
def test_other_scalings_in_gguf_are_refused_by_name(tmp_path, keys, factors, words):
    if isinstance(factors, np.ndarray):
        dtype = np.float16 if factors.dtype == np.float16 else np.float32
        more = {"rope_freqs.weight": factors.astype(dtype)}
    else:
        more = {} if factors is None else {factors: ROPE_FREQS}
    write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, keys=keys, more=more)
    with pytest.raises(FormatError, match=words) as error:
        gguf_file.read(str(tmp_path / "m.gguf"))
    assert "\n" not in str(error.value) and "m.gguf: " in str(error.value)


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def folder_with(tmp_path: Path, **changes: object) -> Path:
    """Write an unscaled model as a folder and change its config.json; None takes a field away."""
    huggingface.write(tmp_path / "hf", dataclasses.replace(source_of(None), tokenizer=None))
    path = tmp_path / "hf" / "config.json"
    fields = json.loads(path.read_text()) | {"rope_scaling": None, "rope_parameters": None} | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return tmp_path / "hf"


LONGROPE = {
    "rope_type": "longrope", "short_factor": list(DIVISORS), "long_factor": list(DIVISORS), "attention_factor": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
FULL_LLAMA3 = LLAMA3 | {"original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("changes", "scaling", "note"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, LinearScaling(factor=4.0), ""),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, LinearScaling(factor=4.0), ""),
        ({"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 4}}, LinearScaling(factor=4.0), ""),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5, "rope_theta": 5e5}},
            LinearScaling(factor=0.5),
            "",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
            LinearScaling(factor=2.0),
            "",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, None, ""),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, LinearScaling(factor=2.0), "beta"),
        ({"rope_scaling": {"factor": 4.0}}, None, "factor"),
        ({"rope_parameters": LONGROPE}, RopeDivisors(divisors=DIVISORS), ""),
        ({"rope_scaling": LLAMA3}, llama3_of(64), ""),
        ({"rope_scaling": FULL_LLAMA3}, llama3_of(16), ""),
        ({"rope_scaling": FULL_LLAMA3, "original_max_position_embeddings": 24}, llama3_of(24), ""),
    ],
)
def test_a_folder_computes_what_transformers_does(tmp_path, changes, scaling, note):
    folder = folder_with(tmp_path, **changes)
    found = huggingface.read(str(folder))
    assert found.config.rope_scaling == scaling
    assert [note in line for line in found.notes] == ([True] if note else [])
    np.testing.assert_allclose(our_logits(found), transformers_logits(folder, IDS), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is of type 'dynamic', factor 2.0: only"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling is of type 'yarn', factor 2.0: only"),
        ({"rope_scaling": {"type": "ntk-aware", "factor": 2.0}}, "of type 'ntk-aware', factor 2.0"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters is of type 'proportional'"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, r"of type \['linear'\]"),
        ({"rope_scaling": LONGROPE | {"long_factor": DIVISORS[::-1]}}, "of type 'longrope', factor None: only"),
        ({"rope_scaling": LONGROPE | {"attention_factor": 1.1}}, "of type 'longrope'"),
        ({"rope_scaling": LONGROPE | {"attention_factor": None, "factor": 4.0}}, "of type 'longrope', factor 4.0"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1, "2"], "long_factor": [1, "2"]}}, r"divisors\[1\]='2'"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0], "long_factor": [1.0]}}, "has 1 divisors: must have half"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None: must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor='4': must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling.factor=True: must be"),
        ({"rope_scaling": {"type": "linear", "factor": [4.0]}}, r"rope_scaling.factor=\[4.0\]: must be"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor=0: must be"),
        ({"rope_scaling": {"type": "linear", "factor": math.inf}}, "rope_scaling.factor=inf: must be"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-300}}, "rope_scaling.factor=1e-300: must be"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor=1000.*: must be"),
        (
            {"rope_scaling": FULL_LLAMA3 | {"original_max_position_embeddings": 1 << 32}},
            "must be a whole number in 1..",
        ),
        ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "rope_scaling.factor=nan: must be"),
        ({"rope_scaling": FULL_LLAMA3 | {"factor": "8"}}, "rope_scaling.factor='8': must be a number, at least 1"),
        ({"rope_scaling": FULL_LLAMA3 | {"factor": math.inf}}, "rope_scaling.factor=inf: must be a finite number"),
        ({"rope_scaling": FULL_LLAMA3 | {"original_max_position_embeddings": 8192.5}}, "original_max_seq_len=8192.5"),
        ({"rope_scaling": FULL_LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor=None must be a positive number"),
        ({"rope_scaling": ["linear", 2.0]}, r"rope_scaling is \['linear', 2.0\]: must be an object"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear': must be an object"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters has an object 'full_attention': only the same for all layers",
        ),
    ],
)
def test_other_scalings_in_a_folder_are_refused_by_name(tmp_path, changes, words):
    folder = folder_with(tmp_path, **changes)
    with pytest.raises(FormatError, match=words) as error:
        huggingface.read(str(folder))
    assert "\n" not in str(error.value) and "config.json: " in str(error.value)


# -- from one format to another ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("kind", ["v1", "v2", "v3 f32", "v3 q4", "gguf", "hf"])
def test_a_scaling_goes_out_and_comes_back(tmp_path, name, kind):
    source = source_of(SCALINGS[name])
    if name == "divisors" and kind in ("v1", "v2"):
        with pytest.raises(ConfigError, match=f"version {kind[1]} cannot say .* divisors from 0.75 to 70; take --ver"):
            bin_file.write(tmp_path / "m.bin", source, int(kind[1]))
        return
    if kind == "gguf":
        path = tmp_path / "m.gguf"
        gguf_file.write(path, source)
    elif kind == "hf":
        path = tmp_path / "hf"
        huggingface.write(path, source)
    else:
        path = tmp_path / "m.bin"
        version, _, dtype = kind[1:].partition(" ")
        bin_file.write(path, source, int(version), dtype=dtype or None)
    found = formats.read(formats.kind_of(path), str(path))
    np.testing.assert_allclose(rope_frequencies(found.config), rope_frequencies(source.config), rtol=2e-7)
    assert target.read_back(source, target.Target(out=str(path)), path) if kind in ("gguf", "hf") else True
    if kind != "gguf" or name in ("linear", "llama3", "divisors"):
        assert found.config == source.config
    if "q" in kind or kind == "v2":
        return
    check_logits(found, PLAIN / rope_frequencies(source.config))
    if kind == "hf":
        np.testing.assert_allclose(our_logits(found), transformers_logits(path, IDS), atol=TOLERANCE)


def test_another_scaling_is_not_read_back_as_the_same(tmp_path, capsys):
    gguf_file.write(tmp_path / "m.gguf", source_of(LinearScaling(factor=4.0)))
    wanted = source_of(LinearScaling(factor=4.0001))
    assert not target.read_back(wanted, target.Target(out="m.gguf"), tmp_path / "m.gguf")
    assert "NOT what was meant" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["linear", "divisors"])
@pytest.mark.parametrize("force", [False, True])
def test_version_0_has_no_place_for_a_scaling(tmp_path, name, force):
    with pytest.raises(ConfigError, match="linear scaling by 4|scaled|divisors from"):
        bin_file.write(tmp_path / "m.bin", source_of(SCALINGS[name]), 0, force=force)
    assert not (tmp_path / "m.bin").exists()


def test_the_header_says_how_rope_is_scaled(tmp_path):
    written = {}
    for name, scaling in (("none", None), *SCALINGS.items()):
        bin_file.write(tmp_path / "m.bin", source_of(scaling), 3, dtype="f32")
        data = (tmp_path / "m.bin").read_bytes()
        written[name] = (*struct.unpack_from("<B3di", data, 61), len(data))
    size = written["none"][-1]
    assert written["none"] == (0, 0.0, 0.0, 0.0, 0, size)
    assert written["llama3"] == (1, 8.0, 1.0, 4.0, 8192, size)
    assert written["linear"] == (2, 4.0, 0.0, 0.0, 0, size)
    assert written["divisors"] == (3, 0.0, 0.0, 0.0, 0, size + 64)  # 8 float32, filled up to 64 bytes
    offset = struct.unpack_from("<Q", data, 135)[0]  # of the tokenizer, which follows
    assert data[offset - 64 : offset] == np.array(DIVISORS, np.float32).tobytes() + bytes(32)


def test_damaged_divisors_are_refused(tmp_path):
    file = model_file.write(tmp_path / "m.bin", 3, source_of(SCALINGS["divisors"]).config, TENSORS, dtype="f32")
    data = bytearray(file.path.read_bytes())
    for damage in (0.0, -1.0, math.nan, math.inf):
        struct.pack_into("<f", data, len(data) - 64, damage)
        file.path.write_bytes(data)
        with pytest.raises(FormatError, match="weights' checksum"):
            model_file.read(file.path)
        with pytest.raises(FormatError, match=r"m.bin: rope_scaling.divisors\[0\]=.*: must be a positive float32"):
            model_file.read(file.path, verify=False)


def test_llama2_c_s_differences_name_the_scaling():
    config = source_of(LinearScaling(factor=4.0)).config
    assert model_file.llama2c_differences(config) == ["rope_scaling is linear scaling by 4 (llama2.c: none)"]


@pytest.mark.parametrize("name", SCALINGS)
def test_a_checkpoint_s_config_keeps_the_scaling(name):
    config = source_of(SCALINGS[name]).config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(source_of(SCALINGS[name]).config)


@pytest.mark.parametrize(
    "fields", [{}, [], "linear", {"factor": 1, "more": 2}, {"factor": "4"}, {"divisors": 3}, {"divisors": [1, 2]}]
)
def test_a_checkpoint_s_damaged_scaling_is_refused(fields):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(CONFIG.to_dict() | {"rope_scaling": fields})
    assert "\n" not in str(error.value)
