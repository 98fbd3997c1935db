import dataclasses
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SMALL_MODELS, random_tensors

from llamalet import model_file
from llamalet.config import Llama3Scaling, ModelConfig, rope_tables
from llamalet.errors import ConfigError, FormatError, NonFiniteError
from llamalet.model_file.header import DTYPES, MAGIC
from llamalet.model_file.quantize import pack_q4, pack_q8, quantize, to_bfloat16
from llamalet.model_file.tensors import FEED_FORWARD, MATRICES

SHA = "5e" * 32
STORIES15M = ModelConfig.create(dim=288, n_layers=6, n_heads=6, vocab_size=32000, max_seq_len=256)
TINY = ModelConfig.create(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=8, max_seq_len=4)


# Every version, and v3 in every dtype.
KINDS = [(0, None), (1, None), (2, None), *((3, dtype) for dtype in DTYPES)]
MARKED = [kind for kind in KINDS if kind[0] > 0]
# Rows that are no multiple of 16 or of a group, and a head_dim that only v3 has room for.
ODD = ModelConfig.create(dim=44, n_layers=3, n_heads=5, n_kv_heads=1, head_dim=6, hidden_dim=50, vocab_size=37,
                         max_seq_len=4, tied=False, rope_theta=500.0, norm_eps=1e-6)  # fmt: skip


def write(path, version, config, **kwargs):
    return model_file.write(path, version, config, random_tensors(config), **kwargs)


def encoded(tensor, file):
    """A tensor as the file should have it."""
    if tensor.ndim == 1:
        return tensor
    if file.version == 2:
        return quantize(tensor, file.group_size)
    return {"f32": lambda w: w, "bf16": to_bfloat16, "q8": pack_q8, "q4": pack_q4}[file.dtype](tensor)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(found, tuple):
        assert found[2:] == expected[2:]
        for found_part, expected_part in zip(found[:2], expected[:2], strict=True):
            np.testing.assert_array_equal(found_part, expected_part, strict=True)
    else:
        np.testing.assert_array_equal(found, expected, strict=True)


@pytest.mark.parametrize(("version", "dtype"), KINDS)
def test_what_was_written_is_read(tmp_path, version, dtype, small_config):
    tensors = random_tensors(small_config)
    before = {name: tensor.copy() for name, tensor in tensors.items()}
    model_file.write(tmp_path / "m.bin", version, small_config, tensors, dtype=dtype, tokenizer_sha256=SHA)
    got = model_file.read(tmp_path / "m.bin", verify=True)
    assert (got.version, got.config) == (version, small_config)
    assert got.dtype == (dtype or ("q8" if version == 2 else "f32"))
    assert got.tokenizer_sha256 == (None if version == 0 else SHA)
    assert got.tensors.keys() == tensors.keys() == before.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, before[name])
        assert_same(got.tensors[name], encoded(tensor, got))
    assert list(tmp_path.iterdir()) == [tmp_path / "m.bin"]


def arrays_of(tensor):
    return tensor[:2] if isinstance(tensor, tuple) else (tensor,)


@pytest.mark.parametrize(("version", "dtype"), KINDS)
def test_tensors_are_views_of_the_file(tmp_path, version, dtype):
    got = write(tmp_path / "m.bin", version, TINY, dtype=dtype)
    for tensor in got.tensors.values():
        for array in arrays_of(tensor):
            assert not array.flags.owndata and not array.flags.writeable and array.flags.aligned


@pytest.mark.parametrize("dtype", DTYPES)
def test_v3_carries_every_model(tmp_path, dtype):
    path = tmp_path / "m.bin"
    config = dataclasses.replace(ODD, rope_scaling=SCALING)
    got = write(path, 3, config, dtype=dtype, tokenizer_sha256=SHA)
    assert (got.config, got.dtype, got.tokenizer_sha256) == (config, dtype, SHA)
    for name, tensor in random_tensors(config).items():
        assert_same(got.tensors[name], encoded(tensor, got))


@pytest.mark.parametrize("dtype", DTYPES)
def test_v3_layers_are_aligned_and_equally_far_apart(tmp_path, dtype):
    """So the layers of a matrix are one strided array, without a copy."""
    got = write(tmp_path / "m.bin", 3, ODD, dtype=dtype)
    for name in MATRICES + FEED_FORWARD:
        layers = [got.tensors[name.replace("*", str(layer))] for layer in range(3)]
        for arrays in zip(*map(arrays_of, layers), strict=True):
            addresses = [array.__array_interface__["data"][0] for array in arrays]
            assert not any(address % 64 for address in addresses)
            assert addresses[2] - addresses[1] == addresses[1] - addresses[0] > 0


def test_v3_byte_by_byte(tmp_path):
    """A 4-bit file, taken apart without llamalet, has its header's fields and the matrix where they belong."""
    write(tmp_path / "m.bin", 3, ODD, dtype="q4", tokenizer_sha256=SHA)
    data = (tmp_path / "m.bin").read_bytes()
    assert struct.unpack_from("<Ii7iBi", data) == (0x616B3432, 3, 44, 50, 3, 5, 1, 37, 4, 0, 32)
    assert struct.unpack_from("<4sddB3di", data, 41) == (b"LLMT", 1e-6, 500.0, 0, 0, 0, 0, 0)
    assert data[90:122].hex() == SHA
    payload_crc, head_dim, dtype, header_crc = struct.unpack_from("<IiBI", data, 122)
    assert (payload_crc, head_dim, dtype) == (zlib.crc32(data[256:]), 6, 3)
    assert header_crc == zlib.crc32(data[:131]) and not any(data[135:256])
    # Seven norms of 44 float32, each filled up to 192 bytes; then the embeddings: 3 blocks of rows, 6 chunks, 2 groups.
    values_at = 256 + 7 * 192
    scales_at = values_at + 3 * 6 * 64
    weights = random_tensors(ODD)["tok_embeddings"]
    largest = np.abs(weights).max()
    for row in range(37):
        for col in range(44):
            byte = data[values_at + row // 16 * 6 * 64 + col // 8 * 64 + row % 16 * 4 + col % 4]
            half = byte >> 4 if col % 8 >= 4 else byte & 15
            at = scales_at + 2 * (row // 16 * 2 * 16 + col // 32 * 16 + row % 16)
            (scale,) = struct.unpack("<f", b"\0\0" + data[at : at + 2])
            assert abs((half - 8) * scale - weights[row, col]) < 0.15 * largest
    # Its scales fill whole lines, so the next matrix follows at once.
    assert scales_at + 2 * 3 * 2 * 16 == 256 + 7 * 192 + 3 * 6 * 64 + 192


def test_sizes_and_offsets_of_stories15m():
    """The check vectors of llama2.c's formats, measured on its own files."""
    offsets = {}
    for version, kind in ((0, ("f32", None)), (2, ("q8", 32))):
        header = model_file.Header(version, STORIES15M, *kind)
        offset = header.n_bytes
        for spec in model_file.tensor_specs(version, STORIES15M, *kind):
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
    got = model_file.read(shared_data / "stories260K.bin")
    assert (got.config.dim, got.config.n_layers, got.config.n_kv_heads) == (64, 5, 4)
    assert (got.config.hidden_dim, got.config.vocab_size, got.config.max_seq_len) == (172, 512, 512)
    assert got.config.tied and got.config.norm_eps == 1e-5


SCALING = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)


@pytest.mark.parametrize("version", [1, 2])
def test_facts_that_llama2c_lacks_travel_in_the_header(tmp_path, version):
    config = dataclasses.replace(TINY, norm_eps=1e-6, rope_theta=500000.0, rope_scaling=SCALING)
    write(tmp_path / "m.bin", version, config)
    assert model_file.read(tmp_path / "m.bin").config == config
    assert len(model_file.llama2c_differences(config)) == 3 and not model_file.llama2c_differences(TINY)


@pytest.mark.parametrize("version", [1, 2])
def test_a_header_without_the_marker_has_llama2c_s_values(tmp_path, version):
    write(tmp_path / "m.bin", version, TINY, tokenizer_sha256=SHA)
    data = bytearray((tmp_path / "m.bin").read_bytes())
    data[41:256] = bytes(215)
    (tmp_path / "m.bin").write_bytes(data)
    got = model_file.read(tmp_path / "m.bin")
    assert got.config == TINY and got.tokenizer_sha256 is None


@pytest.mark.parametrize(("version", "dtype"), KINDS)
def test_every_other_length_is_refused(tmp_path, version, dtype):
    path = tmp_path / "m.bin"
    write(path, version, TINY, dtype=dtype)
    n_bytes = path.stat().st_size
    # From the longest down, so that what is there are the file's own bytes; to write it anew each time takes minutes.
    for n in (n_bytes + 4096, n_bytes + 64, n_bytes + 4, n_bytes + 1, *range(n_bytes - 1, -1, -1)):
        os.truncate(path, n)
        with pytest.raises(FormatError, match=r"m\.bin"):
            model_file.read(path)


@pytest.mark.parametrize(("version", "dtype"), MARKED)
def test_every_flipped_bit_is_refused(tmp_path, version, dtype):
    path = tmp_path / "m.bin"
    write(path, version, TINY, dtype=dtype, tokenizer_sha256=SHA)
    n_bytes = path.stat().st_size
    rng = np.random.default_rng(0)
    with open(path, "r+b", buffering=0) as file:
        for bit in (*range(8 * 256), *rng.integers(8 * 256, 8 * n_bytes, 500)):
            (before,) = os.pread(file.fileno(), 1, bit // 8)
            os.pwrite(file.fileno(), bytes([before ^ 1 << bit % 8]), bit // 8)
            with pytest.raises(FormatError):
                model_file.read(path)
            os.pwrite(file.fileno(), bytes([before]), bit // 8)
    assert model_file.read(path).tokenizer_sha256 == SHA


def test_v0_bit_flips_in_the_header_are_refused(tmp_path):
    path = tmp_path / "m.bin"
    write(path, 0, TINY)
    data = bytearray(path.read_bytes())
    for bit in range(8 * 28):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(FormatError):
            model_file.read(path)
        data[bit // 8] ^= 1 << bit % 8


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=0, max_size=400), st.sampled_from([b"", *(struct.pack("<Ii", MAGIC, v) for v in (1, 2, 3))]))
def test_foreign_bytes_are_refused(tmp_path_factory, data, prefix):
    path = tmp_path_factory.getbasetemp() / "foreign.bin"
    path.write_bytes(prefix + data)
    with pytest.raises(FormatError):
        model_file.read(path)


def _patched(path: Path, offset: int, code: str, value: int) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, offset, value)
    data[41:256] = bytes(215)  # as llama2.c writes it, so that no checksum comes before the rule
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("offset", "code", "value", "words"),
    [
        (0, ">I", MAGIC, "byte-swapped"),
        (4, "<i", 4, "version 4 is unknown"),
        (4, "<i", 3, "neither zero nor llamalet's"),
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
        model_file.read(_patched(path, offset, code, value))


@pytest.mark.parametrize(
    ("offset", "code", "value", "words"),
    [
        (12, "<i", 0, "hidden_dim is 0"),
        (20, "<i", 7, "n_heads=7: must be a multiple"),
        (28, "<i", 1 << 21, "vocab_size is 2097152"),
        (37, "<i", 64, "group_size 64: must be 32"),
        (61, "<B", 2, "rope_scaling.factor=0.0: must be a positive number"),
        (61, "<B", 3, "truncated or of another shape"),
        (61, "<B", 4, "RoPE scaling 4: must be one of 0..3 in version 3"),
        (70, "<d", 1.0, "must be zero"),
        (126, "<i", 3, "head_dim=3: must be even"),
        (126, "<i", 0, "head_dim is 0"),
        (126, "<i", 1 << 30, "head_dim is 1073741824"),
        (130, "<B", 0, "group_size 32: must be 0"),
        (130, "<B", 2, "group_size 32: must be 64"),
        (130, "<B", 4, "dtype 4: must be one of 0..3"),
        (135, "<B", 1, "the tokenizer's fields does not match"),
        (152, "<B", 1, "the tokenizer's fields does not match"),
        (200, "<B", 1, "the ids that begin and end texts does not match"),
        (255, "<B", 1, "must be zero"),
    ],
)
def test_v3_refusals_name_the_field_and_the_value(tmp_path, offset, code, value, words):
    """Whoever makes a wrong header can make its checksum right, too."""
    path = tmp_path / "m.bin"
    write(path, 3, TINY, dtype="q4")
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, offset, value)
    struct.pack_into("<I", data, 131, zlib.crc32(data[:131]))
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words):
        model_file.read(path)


def test_nothing_hides_between_v3_s_tensors(tmp_path):
    path = tmp_path / "m.bin"
    write(path, 3, ODD, dtype="f32")
    data = bytearray(path.read_bytes())
    data[256 + 4 * 44] = 1  # behind the first norm
    struct.pack_into("<I", data, 122, zlib.crc32(data[256:]))
    struct.pack_into("<I", data, 131, zlib.crc32(data[:131]))
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"after layers\.0\.attention_norm.*must be zero"):
        model_file.read(path)


def test_hostile_context_is_refused_before_anything_is_allocated(tmp_path):
    """A v2 file's size does not depend on max_seq_len, so the size check alone would let it pass."""
    path = tmp_path / "m.bin"
    write(path, 2, TINY)
    with pytest.raises(FormatError, match="max_seq_len"):
        model_file.read(_patched(path, 32, "<i", (1 << 20) + 1))


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
        model_file.read(path)


def test_models_that_a_version_cannot_carry(tmp_path):
    odd_head = dataclasses.replace(TINY, head_dim=4)
    for version in (0, 1, 2):
        with pytest.raises(ConfigError, match="head_dim=4"):
            write(tmp_path / "m.bin", version, odd_head)
    for version in (0, 1, 2):
        with pytest.raises(ConfigError, match=f"dtype=q4: version {version} is .* --version 3"):
            write(tmp_path / "m.bin", version, TINY, dtype="q4")
    with pytest.raises(ConfigError, match="dtype=q5: must be one of f32, bf16, q8, q4"):
        write(tmp_path / "m.bin", 3, TINY, dtype="q5")
    with pytest.raises(ConfigError, match="version 4: must be one of 0, 1, 2, 3"):
        write(tmp_path / "m.bin", 4, TINY)
    assert not list(tmp_path.iterdir())
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
        model_file.write(tmp_path / "m.bin", 2, TINY, tensors)
    assert (tmp_path / "m.bin").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_wrong_tensors_are_named(tmp_path):
    tensors = random_tensors(TINY)
    tensors["output"] = tensors.pop("norm")
    with pytest.raises(FormatError, match="norm is missing; output is not part"):
        model_file.write(tmp_path / "m.bin", 1, TINY, tensors)
    tensors = random_tensors(TINY)
    tensors["norm"] = tensors["norm"][1:]
    with pytest.raises(FormatError, match=r"norm has shape \(15,\)"):
        model_file.write(tmp_path / "m.bin", 1, TINY, tensors)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FormatError, match="no such model file"):
        model_file.read(tmp_path / "gone.bin")
    with pytest.raises(FormatError, match="is a folder"):
        model_file.read(tmp_path)


def test_refusals_do_not_depend_on_assert(tmp_path):
    path = tmp_path / "m.bin"
    write(path, 2, TINY)
    path.write_bytes(path.read_bytes()[:-1])
    code = (
        "import sys; from llamalet import command, model_file\ncommand.run(lambda argv: model_file.read(argv[0]) and 0)"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-O", "-c", code, str(path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 4 and "truncated" in done.stderr and done.stderr.count("\n") == 1


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
