import dataclasses
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_MODELS, random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalet import format
from llamalet.config import ModelConfig, RopeScaling, rope_tables
from llamalet.errors import ConfigError, FormatError, NonFiniteError
from llamalet.quantize import dequantize, quantize

SHA = "5e" * 32
STORIES15M = ModelConfig.create(dim=288, n_layers=6, n_heads=6, vocab_size=32000, max_seq_len=256)
TINY = ModelConfig.create(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=8, max_seq_len=4)


def write(path, version, config, **kwargs):
    return format.write(path, version, config, random_tensors(config), **kwargs)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_what_was_written_is_read(tmp_path, version, small_config):
    tensors = random_tensors(small_config)
    before = {name: tensor.copy() for name, tensor in tensors.items()}
    format.write(tmp_path / "m.bin", version, small_config, tensors, tokenizer_sha256=SHA)
    got = format.read(tmp_path / "m.bin", verify=True)
    assert (got.version, got.config) == (version, small_config)
    assert got.tokenizer_sha256 == (None if version == 0 else SHA)
    assert got.tensors.keys() == tensors.keys() == before.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, before[name])
        if version == 2 and tensor.ndim == 2:
            expected = quantize(tensor, got.group_size)
            np.testing.assert_array_equal(got.tensors[name].values, expected.values)
            np.testing.assert_array_equal(got.tensors[name].scales, expected.scales)
        else:
            np.testing.assert_array_equal(got.tensors[name], tensor)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.bin"]


def test_tensors_are_views_of_the_file(tmp_path):
    got = write(tmp_path / "m.bin", 2, TINY)
    for tensor in got.tensors.values():
        for array in tensor if isinstance(tensor, tuple) else (tensor,):
            assert not array.flags.owndata and not array.flags.writeable and array.flags.aligned


def test_sizes_and_offsets_of_stories15m():
    """The check vectors of llama2.c's formats, measured on its own files."""
    offsets = {}
    for version, group_size in ((0, None), (2, 32)):
        header = format.Header(version, STORIES15M, group_size)
        offset = header.n_bytes
        for spec in format.tensor_specs(version, STORIES15M, group_size):
            offsets[version, spec.name] = offset
            offset += spec.n_bytes
        offsets[version, "end"] = offset
    expected = {
        (0, "tok_embeddings"): 28, (0, "layers.0.attention_norm"): 36_864_028, (0, "layers.0.attention.wq"): 36_870_940,
        (0, "layers.0.ffn_norm"): 44_833_564, (0, "norm"): 60_765_724, (0, "rope_cos"): 60_766_876,
        (0, "rope_sin"): 60_791_452, (0, "end"): 60_816_028, (2, "tok_embeddings"): 15_232,
        (2, "layers.0.attention.wq"): 10_383_232, (2, "layers.0.feed_forward.w1"): 12_622_720, (2, "end"): 17_101_696,
    }  # fmt: skip
    assert {key: offsets[key] for key in expected} == expected


def test_v2_header_is_llama2c_s(tmp_path):
    config = dataclasses.replace(TINY, dim=32, n_heads=2, n_kv_heads=2, head_dim=16, hidden_dim=64)
    write(tmp_path / "m.bin", 2, config)
    head = (tmp_path / "m.bin").read_bytes()[:256]
    expected = "32346b61 02000000 20000000 40000000 01000000 02000000 02000000 08000000 04000000 01 20000000"
    assert head[:41] == bytes.fromhex(expected)


def test_v0_flags_an_untied_output_by_its_sign(tmp_path):
    config = SMALL_MODELS["gqa-untied"]
    for name, tied in (("a", False), ("b", False), ("c", True)):
        one = dataclasses.replace(config, tied=tied)
        write(tmp_path / name, 0, one)
        vocab_size = struct.unpack_from("<7i", (tmp_path / name).read_bytes())[5]
        assert vocab_size == (300 if tied else -300)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_real_file(shared_data):
    got = format.read(shared_data / "stories260K.bin")
    assert (got.config.dim, got.config.n_layers, got.config.n_kv_heads) == (64, 5, 4)
    assert (got.config.hidden_dim, got.config.vocab_size, got.config.max_seq_len) == (172, 512, 512)
    assert got.config.tied and got.config.norm_eps == 1e-5


SCALING = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)


@pytest.mark.parametrize("version", [1, 2])
def test_facts_that_llama2c_lacks_travel_in_the_header(tmp_path, version):
    config = dataclasses.replace(TINY, norm_eps=1e-6, rope_theta=500000.0, rope_scaling=SCALING)
    write(tmp_path / "m.bin", version, config)
    assert format.read(tmp_path / "m.bin").config == config
    assert len(format.llama2c_differences(config)) == 3 and not format.llama2c_differences(TINY)


@pytest.mark.parametrize("version", [1, 2])
def test_a_header_without_the_marker_has_llama2c_s_values(tmp_path, version):
    write(tmp_path / "m.bin", version, TINY, tokenizer_sha256=SHA)
    data = bytearray((tmp_path / "m.bin").read_bytes())
    data[41:256] = bytes(215)
    (tmp_path / "m.bin").write_bytes(data)
    got = format.read(tmp_path / "m.bin")
    assert got.config == TINY and got.tokenizer_sha256 is None


@pytest.mark.parametrize("version", [0, 1, 2])
def test_every_other_length_is_refused(tmp_path, version):
    path = tmp_path / "m.bin"
    write(path, version, TINY)
    data = path.read_bytes()
    for n in (*range(len(data)), len(data) + 1, len(data) + 4, len(data) + 4096):
        path.write_bytes(data[:n].ljust(n, b"\0"))
        with pytest.raises(FormatError, match=r"m\.bin"):
            format.read(path)


@pytest.mark.parametrize("version", [1, 2])
def test_every_flipped_bit_is_refused(tmp_path, version):
    path = tmp_path / "m.bin"
    write(path, version, TINY, tokenizer_sha256=SHA)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for bit in (*range(8 * 256), *rng.integers(8 * 256, 8 * len(data), 500)):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(FormatError):
            format.read(path)
        data[bit // 8] ^= 1 << bit % 8


def test_v0_bit_flips_in_the_header_are_refused(tmp_path):
    path = tmp_path / "m.bin"
    write(path, 0, TINY)
    data = bytearray(path.read_bytes())
    for bit in range(8 * 28):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(FormatError):
            format.read(path)
        data[bit // 8] ^= 1 << bit % 8


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=0, max_size=400), st.sampled_from([b"", struct.pack("<Ii", format.MAGIC, 2)]))
def test_foreign_bytes_are_refused(tmp_path_factory, data, prefix):
    path = tmp_path_factory.getbasetemp() / "foreign.bin"
    path.write_bytes(prefix + data)
    with pytest.raises(FormatError):
        format.read(path)


def _patched(path: Path, offset: int, code: str, value: int) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, offset, value)
    data[41:256] = bytes(215)  # as llama2.c writes it, so that no checksum comes before the rule
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("offset", "code", "value", "words"),
    [
        (0, ">I", format.MAGIC, "byte-swapped"),
        (4, "<i", 3, "version 3 is unknown"),
        (8, "<i", 0, "dim is 0"),
        (16, "<i", -1, "n_layers is -1"),
        (20, "<i", 3, "n_heads 3"),
        (32, "<i", 2**31 - 1, "max_seq_len is 2147483647"),
        (36, "<B", 2, "tied flag is 2"),
        (37, "<i", 12, "group_size 12"),
        (37, "<i", 32, "group_size 32"),
    ],
)
def test_refusals_name_the_field_and_the_value(tmp_path, offset, code, value, words):
    path = tmp_path / "m.bin"
    write(path, 2, TINY)
    with pytest.raises(FormatError, match=words):
        format.read(_patched(path, offset, code, value))


def test_hostile_context_is_refused_before_anything_is_allocated(tmp_path):
    """A v2 file's size does not depend on max_seq_len, so the size check alone would let it pass."""
    path = tmp_path / "m.bin"
    write(path, 2, TINY)
    with pytest.raises(FormatError, match="max_seq_len"):
        format.read(_patched(path, 32, "<i", (1 << 20) + 1))


def test_v0_carries_rope_theta_in_its_tables_alone(tmp_path):
    path = tmp_path / "m.bin"
    config = dataclasses.replace(TINY, rope_theta=500000.0, norm_eps=1e-6)
    with pytest.raises(ConfigError, match="norm_eps is 1e-06.*rope_theta is 500000"):
        write(path, 0, config)
    assert write(path, 0, config, force=True).config == dataclasses.replace(config, norm_eps=1e-5)
    with pytest.raises(ConfigError, match="scaled"):
        write(path, 0, dataclasses.replace(TINY, rope_scaling=SCALING), force=True)


@pytest.mark.parametrize("theta", [10.0, 10000.0, 500000.0, 1e6, 1234.5])
def test_v0_finds_rope_theta(tmp_path, theta):
    config = dataclasses.replace(STORIES15M, dim=96, n_heads=2, n_kv_heads=2, vocab_size=8, rope_theta=theta)
    assert write(tmp_path / "m.bin", 0, config, force=True).config == config


def test_v0_with_meaningless_rope_tables_is_refused(tmp_path):
    path = tmp_path / "m.bin"
    write(path, 0, TINY)
    data = bytearray(path.read_bytes())
    struct.pack_into("<f", data, len(data) - 8 * 4 * 4 + 4 * 4, 0.25)  # row 1 of the cosines
    path.write_bytes(data)
    with pytest.raises(FormatError, match="RoPE tables"):
        format.read(path)


def test_models_that_a_version_cannot_carry(tmp_path):
    odd_head = dataclasses.replace(TINY, head_dim=4)
    for version in (0, 1, 2):
        with pytest.raises(ConfigError, match="head_dim=4"):
            write(tmp_path / "m.bin", version, odd_head)
    stories260k = ModelConfig.create(dim=64, n_layers=1, n_heads=8, hidden_dim=172, vocab_size=8, max_seq_len=4)
    with pytest.raises(ConfigError, match="hidden_dim=172.*192"):
        write(tmp_path / "m.bin", 2, stories260k)
    stories42m = ModelConfig.create(dim=512, n_layers=1, n_heads=8, vocab_size=8, max_seq_len=4)
    assert stories42m.hidden_dim == 1376
    assert write(tmp_path / "m.bin", 2, stories42m).group_size == 32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["layers.0.attention.wk", "norm"])
def test_non_finite_weights_are_never_written(tmp_path, bad, name):
    tensors = random_tensors(TINY)
    tensors[name].flat[-1] = bad
    (tmp_path / "m.bin").write_bytes(b"old")
    with pytest.raises(NonFiniteError, match=name):
        format.write(tmp_path / "m.bin", 2, TINY, tensors)
    assert (tmp_path / "m.bin").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_wrong_tensors_are_named(tmp_path):
    tensors = random_tensors(TINY)
    tensors["output"] = tensors.pop("norm")
    with pytest.raises(FormatError, match="norm is missing; output is not part"):
        format.write(tmp_path / "m.bin", 1, TINY, tensors)
    tensors = random_tensors(TINY)
    tensors["norm"] = tensors["norm"][1:]
    with pytest.raises(FormatError, match=r"norm has shape \(15,\)"):
        format.write(tmp_path / "m.bin", 1, TINY, tensors)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FormatError, match="no such model file"):
        format.read(tmp_path / "gone.bin")
    with pytest.raises(FormatError, match="is a folder"):
        format.read(tmp_path)


def test_refusals_do_not_depend_on_assert(tmp_path):
    path = tmp_path / "m.bin"
    write(path, 2, TINY)
    path.write_bytes(path.read_bytes()[:-1])
    code = "import sys; from llamalet import errors, format\nerrors.run(lambda argv: format.read(argv[0]) and 0)"
    root = Path(__file__).parent.parent
    command = [sys.executable, "-O", "-c", code, str(path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 4 and "truncated" in done.stderr and done.stderr.count("\n") == 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 4), st.sampled_from([16, 32, 64]), st.integers(0, 2**32 - 1), st.floats(-30, 8)
)
def test_quantization_error_is_at_most_half_a_step(rows, groups, group_size, seed, magnitude):
    weights = np.random.default_rng(seed).standard_normal((rows, groups * group_size)) * 10.0**magnitude
    weights = weights.astype(np.float32)
    weights[0, :group_size] = 0
    got = quantize(weights, group_size)
    error = np.abs(dequantize(got).astype(np.float64) - weights).reshape(rows, groups, group_size)
    # Half a step, and the roundings of the scale and of the quotient (each 2^-24 of up to 127 steps).
    assert (error <= got.scales[:, :, None] * (0.5 + 127 * 2.0**-22)).all()
    assert np.abs(got.values).max() <= 127 and not got.values[0, :group_size].any()


def test_rope_tables_begin_like_llama2c_s():
    cos, sin = rope_tables(STORIES15M, 2)
    assert (cos[0] == 1).all() and (sin[0] == 0).all()
    assert cos[1, 0] == pytest.approx(0.5403, abs=1e-4) and cos.dtype == np.float32


def test_llama3_scaling_matches_transformers_values():
    """inv_freq of Llama 3.2 1B (head_dim 64, theta 500000) as transformers' _compute_llama3_parameters gives them."""
    from llamalet.config import rope_frequencies

    config = ModelConfig.create(
        dim=2048, n_layers=1, n_heads=32, n_kv_heads=8, vocab_size=8, max_seq_len=8, rope_theta=500000.0,
        rope_scaling=SCALING,
    )  # fmt: skip
    base = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    wavelength = 2 * np.pi / base
    got = rope_frequencies(config)
    np.testing.assert_allclose(got[wavelength < 8192 / 4], base[wavelength < 8192 / 4])
    np.testing.assert_allclose(got[wavelength > 8192 / 1], base[wavelength > 8192 / 1] / 32)
    between = (wavelength >= 8192 / 4) & (wavelength <= 8192)
    assert between.any() and ((got < base) & (got > base / 32))[between].all()
