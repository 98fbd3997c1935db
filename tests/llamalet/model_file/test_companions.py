"""Files of version 3 that carry their tokenizer."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from toy import SMALL_MODELS, random_tensors, toy_llama3, toy_tokenizer

from llamalet import Model, model_file
from llamalet.config import ModelConfig
from llamalet.errors import ConfigError, FormatError, TokenizerError
from llamalet.model_file import companions
from llamalet.tokenizer import pack

CONFIG = SMALL_MODELS["gqa-tied"]
TINY = ModelConfig.create(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=300, max_seq_len=4)
ROWS = pack(toy_tokenizer().pieces())


def write(path: Path, config: ModelConfig = TINY, *, kind: str = "bin", data: bytes = ROWS) -> model_file.ModelFile:
    sha256 = toy_tokenizer().sha256
    return model_file.write(path, 3, config, random_tensors(config), tokenizer_sha256=sha256, tokenizer=(kind, data))


def test_one_file_is_enough(tmp_path):
    plain = model_file.write(tmp_path / "plain.bin", 3, CONFIG, random_tensors(CONFIG))
    file = write(tmp_path / "m.bin", CONFIG)
    assert file.tokenizer_data == ROWS and plain.tokenizer_data is None
    before, after = (tmp_path / "plain.bin").read_bytes(), (tmp_path / "m.bin").read_bytes()
    assert after[256:] == before[256:] + ROWS  # the tensors lie where they always do
    model, alone = Model.load(tmp_path / "m.bin", backend="numpy"), toy_tokenizer()
    assert model.tokenizer.sha256 == alone.sha256
    assert "".join(model.generate("a band", seed=1))


def test_a_rank_table_inside(tmp_path):
    ours = toy_llama3()
    config = ModelConfig.create(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=ours.vocab_size, max_seq_len=8)
    data = pack(ours.pieces())
    model_file.write(
        tmp_path / "m.bin", 3, config, random_tensors(config), tokenizer_sha256=ours.sha256, tokenizer=("bin", data)
    )
    model = Model.load(tmp_path / "m.bin", backend="numpy")
    assert model.tokenizer.encode("the band") == ours.encode("the band")
    assert model.stop_tokens == ours.stop_ids


def test_what_is_named_comes_before_what_is_inside_and_that_before_what_lies_beside(tmp_path):
    write(tmp_path / "m.bin")
    (tmp_path / "m.tokenizer.bin").write_bytes(b"damaged")
    assert Model.load(tmp_path / "m.bin", backend="numpy").tokenizer.vocab_size == 300
    with pytest.raises(TokenizerError, match="m.tokenizer.bin"):
        Model.load(tmp_path / "m.bin", backend="numpy", tokenizer=tmp_path / "m.tokenizer.bin")


@pytest.mark.parametrize("version", [0, 1, 2])
def test_other_versions_have_no_place_for_it(tmp_path, version):
    with pytest.raises(ConfigError, match=f"version {version} has no place for a tokenizer"):
        model_file.write(tmp_path / "m.bin", version, TINY, random_tensors(TINY), tokenizer=("bin", ROWS))
    assert not (tmp_path / "m.bin").exists()


def test_every_flipped_bit_and_every_other_length_is_refused(tmp_path):
    path = tmp_path / "m.bin"
    write(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for bit in (*range(8 * 135, 8 * 160), *rng.integers(8 * 256, 8 * len(data), 100), 8 * len(data) - 1):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"m\.bin"):
            model_file.read(path)
    for changed in (data[:-1], data + b"\0", data[: -len(ROWS)], data[:200]):
        path.write_bytes(changed)
        with pytest.raises(FormatError, match=r"m\.bin"):
            model_file.read(path)


@pytest.mark.parametrize(
    ("at", "code", "value", "words"),
    [
        (135, "<Q", 256, "tokenizer offset 256: must be"),
        (135, "<Q", 2**64 - 1, "tokenizer offset 18446744073709551615"),
        (143, "<I", 0, "tokenizer length 0"),
        (143, "<I", 2**32 - 1, "tokenizer length 4294967295"),
        (143, "<I", len(ROWS) - 1, "bytes where the header asks for"),
        (151, "<B", 9, "tokenizer kind 9"),
        (151, "<B", 0, "tokenizer kind 0"),
    ],
)
def test_refusals_name_the_field_and_the_value(tmp_path, at, code, value, words):
    """Whoever makes a wrong header can make its checksum right, too."""
    path = tmp_path / "m.bin"
    write(path)
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, at, value)
    struct.pack_into("<I", data, 152, zlib.crc32(data[:152]))
    path.write_bytes(data)
    with pytest.raises(FormatError, match=words):
        model_file.read(path)


def test_another_kind_than_the_header_says_is_refused(tmp_path):
    write(tmp_path / "m.bin", kind="model")
    with pytest.raises(TokenizerError, match="m.bin, tokenizer inside: is of kind bin, the header says model"):
        Model.load(tmp_path / "m.bin", backend="numpy")


def test_another_vocabulary_inside_is_refused(tmp_path):
    write(tmp_path / "m.bin", data=pack([*toy_tokenizer(299).pieces(), (b"qqq", -1.0)]))
    with pytest.raises(TokenizerError, match="not the vocabulary that .*m.bin was trained with"):
        Model.load(tmp_path / "m.bin", backend="numpy")


def test_the_tokenizer_beside_a_model(tmp_path):
    model = tmp_path / "story.q8.bin"
    assert companions.beside(model) is None
    (tmp_path / "story.q8.tokenizer.bin").touch()
    assert companions.beside(model) == tmp_path / "story.q8.tokenizer.bin"
    (tmp_path / "story.q8.tokenizer.model").touch()
    assert companions.beside(model) == tmp_path / "story.q8.tokenizer.model"
