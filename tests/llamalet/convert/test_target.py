"""What goes along with a converted model: its tokenizer, or an error, and nothing of the model that it replaces."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_makes import CHATML, byte_pairs, made
from toy import random_tensors, toy_tokenizer

import export
from llamalet import Model, cli, tokenizer
from llamalet.config import ModelConfig
from llamalet.convert import bin_file, formats, gguf_file, huggingface, target
from llamalet.convert.imported_model import ImportedModel
from llamalet.errors import ConfigError, TokenizerError
from llamalet.model_file.companions import load_tokenizer
from llamalet.tokenizer import Tokenizer, pack
from llamalet.tokenizer.rows import unpack

VOCABULARY = toy_tokenizer(300)
CONFIG = ModelConfig.create(dim=32, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=300, max_seq_len=16)


def source_of(vocabulary: Tokenizer | None = VOCABULARY, data: bytes = b"", **fields: object) -> ImportedModel:
    if vocabulary is not None and not data:
        data = pack(vocabulary.pieces())
    values = {"config": CONFIG, "tensors": random_tensors(CONFIG), "tokenizer": vocabulary, "tokenizer_data": data}
    return ImportedModel(**{"name": "toy", **values, **fields})


def write(path: Path, source: ImportedModel) -> Path:
    """Write a model without its checks."""
    if path.suffix == ".gguf":
        gguf_file.write(path, source)
    elif path.suffix == ".bin":
        bin_file.write(path, source, 1)
    else:
        huggingface.write(path, source)
    return path


def convert(model: Path, out: Path, *words: str, capsys: pytest.CaptureFixture[str] | None = None) -> str:
    """Convert as the command does; return what it printed."""
    assert cli.main(["convert", str(model), str(out), *words]) == 0
    return "" if capsys is None else capsys.readouterr().out


# -- a tokenizer that is lost is an error -----------------------------------------------------------------------------


def broken(kind: str, folder: Path) -> Path:
    """Return a model of a format whose own tokenizer cannot be read, or is missing where there should be one."""
    path = write(folder / {"hf": "hf", "gguf": "m.gguf", "missing": "hf"}.get(kind, "m.bin"), source_of())
    if kind == "hf":
        (path / "tokenizer.json").write_text("{")
    elif kind == "missing":
        (path / "tokenizer.json").unlink()
    elif kind == "gguf":
        path.write_bytes(path.read_bytes().replace(b"<0x41>", b"<0y41>"))
    elif kind == "bin, damaged":
        path.with_suffix(".tokenizer.bin").write_bytes(b"\1\0\0\0")
    else:  # another model's
        rows = [*VOCABULARY.pieces()]
        rows[-1] = (b"qqq", rows[-1][1])
        path.with_suffix(".tokenizer.bin").write_bytes(pack(rows))
    return path


KINDS = ("hf", "gguf", "bin, damaged", "bin, another's")


@pytest.mark.parametrize("out", ["new.bin", "new.gguf", "new"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_cannot_be_taken_along_is_an_error_with_two_remedies(tmp_path, kind, out, capsys):
    path, good = broken(kind, tmp_path), tmp_path / "good.bin"
    good.write_bytes(pack(VOCABULARY.pieces()))
    with pytest.raises(TokenizerError, match=r"cannot be taken along: .*--tokenizer FILE.*--no-tokenizer$") as refused:
        convert(path, tmp_path / out)
    assert refused.value.exit_code == 4 and "\n" not in str(refused.value) and not (tmp_path / out).exists()
    if kind != "bin, another's":  # that says which one it was trained with
        shown = convert(path, tmp_path / out, "--tokenizer", str(good), capsys=capsys)
        assert re.search(r"read back: .*, and \d\d texts give the same ids", shown)
        found = formats.read(formats.kind_of(tmp_path / out), str(tmp_path / out)).tokenizer
        assert found.encode("a band", bos=True) == VOCABULARY.encode("a band", bos=True)
    convert(path, tmp_path / f"without-{out}", "--no-tokenizer")
    model = Model.load(tmp_path / f"without-{out}", backend="numpy")
    assert model.logits([1, 2]).shape == (2, 300) and not model.undrawn
    with pytest.raises(TokenizerError, match="no tokenizer"):
        model.score("a band")


def test_a_model_that_comes_without_a_tokenizer_has_none_to_lose(tmp_path, capsys):
    path = broken("missing", tmp_path)
    for out in ("new.bin", "new"):
        assert "without a tokenizer" in convert(path, tmp_path / out, capsys=capsys)
    with pytest.raises(TokenizerError, match="llama.cpp needs a tokenizer .*--no-tokenizer$"):
        convert(path, tmp_path / "new.gguf")


def test_export_says_the_same(tmp_path):
    path = broken("hf", tmp_path)
    with pytest.raises(TokenizerError, match="cannot be taken along: .*--no-tokenizer$"):
        export.main([str(tmp_path / "m.bin"), "--hf", str(path)])
    assert export.main([str(tmp_path / "m.bin"), "--hf", str(path), "--no-tokenizer"]) == 0
    assert load_tokenizer(formats.model_file.read(tmp_path / "m.bin")) is None


def test_what_the_target_cannot_carry_is_an_error_with_two_remedies(tmp_path):
    built = byte_pairs(lstrip=True)
    path = write(tmp_path / "hf", padded(*made(built)))
    with pytest.raises(TokenizerError, match="has lstrip, which GGUF cannot say; .*--tokenizer FILE.*--no-tokenizer$"):
        convert(path, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    convert(path, tmp_path / "m.gguf", "--no-tokenizer")
    convert(path, tmp_path / "m.bin", "--dtype=f32")
    assert formats.read("bin", str(tmp_path / "m.bin")).tokenizer.special == made(built)[0].special


def test_a_model_that_never_had_a_tokenizer_has_nothing_to_lose(tmp_path, capsys):
    formats.model_file.write(tmp_path / "alone.bin", 1, CONFIG, random_tensors(CONFIG))
    state = {f"{name}.weight": torch.tensor(tensor) for name, tensor in random_tensors(CONFIG).items()}
    arguments = {name: getattr(CONFIG, name) for name in ("dim", "n_layers", "n_heads", "vocab_size", "max_seq_len")}
    torch.save({"model": state, "model_args": arguments | {"n_kv_heads": 2}}, tmp_path / "ckpt.pt")
    for name in ("alone.bin", "ckpt.pt"):
        shown = convert(tmp_path / name, tmp_path / "new.bin", "--version=3", capsys=capsys)
        assert "note: without a tokenizer, because the model has none; name one with --tokenizer" in shown
        with pytest.raises(TokenizerError, match="llama.cpp needs a tokenizer inside a GGUF file.*--no-tokenizer$"):
            convert(tmp_path / name, tmp_path / "new.gguf")


def test_a_tokenizer_and_none_contradict_each_other(tmp_path):
    path = write(tmp_path / "m.bin", source_of())
    with pytest.raises(ConfigError, match="--no-tokenizer writes none"):
        convert(path, tmp_path / "n.bin", "--no-tokenizer", "--tokenizer", str(tmp_path / "m.tokenizer.bin"))


@pytest.mark.parametrize("out", ["n.bin", "n.gguf", "hf"])
def test_without_its_tokenizer_a_model_stops_where_it_did(tmp_path, out):
    path = write(tmp_path / "m.bin", source_of(VOCABULARY.with_stops([7, 8])))
    convert(path, tmp_path / out, "--no-tokenizer")
    assert Model.load(tmp_path / out, backend="numpy").stop_tokens == {7, 8}


# -- ids are compared before success is said --------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["m.bin"], ["m.bin", "--version=0"], ["m.bin", "--dtype=q8"], ["m.gguf"], ["hf"]])
def test_a_tokenizer_that_reads_back_differently_is_an_error(tmp_path, words, monkeypatch, capsys):
    path = write(tmp_path / "src.bin", source_of())
    rows = [*VOCABULARY.pieces()]
    rows[-1] = (b"qqq", rows[-1][1])
    (tmp_path / "other.bin").write_bytes(pack(rows))
    other = tokenizer.load(tmp_path / "other.bin")
    shown = convert(path, tmp_path / words[0], *words[1:], capsys=capsys)
    assert re.search(r"read back: every (byte|weight) is equal, and \d\d texts give the same ids", shown)
    monkeypatch.setattr(target, "load_tokenizer", lambda file: other)
    read = formats.read
    monkeypatch.setattr(
        target.formats, "read", lambda kind, name: dataclasses.replace(read(kind, name), tokenizer=other)
    )
    source = dataclasses.replace(read("bin", str(path)), name=str(path))
    aimed = target.Target(out=str(tmp_path / words[0]), named_version=0 if "--version=0" in words else None)
    with pytest.raises(TokenizerError, match=f"{words[0]}: its tokenizer would cut .* into"):
        target.write(source, aimed, tmp_path / words[0])
        target.read_back(source, aimed, tmp_path / words[0])
    assert "the same ids" not in capsys.readouterr().out


def test_what_llama2c_s_programs_cut_differently_is_said(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "m.bin", source_of())
    monkeypatch.setattr(target, "TEXTS", ("a band", "  \ufb01sh"))
    monkeypatch.setattr(target, "load", lambda path: dataclasses_like_nfkc())
    assert "note: llama2.c's programs cut '  \ufb01sh' into" in convert(path, tmp_path / "n.bin", capsys=capsys)


class dataclasses_like_nfkc:  # noqa: N801
    """A tokenizer.bin whose original folds characters."""

    def encode(self, text: str) -> list[int]:
        return VOCABULARY.encode(text.replace("\ufb01", "fi"))


# -- nothing of the model that was replaced ---------------------------------------------------------------------------


def test_a_replaced_bin_leaves_nothing_to_the_new_one(tmp_path, capsys):
    path = tmp_path / "m.bin"
    write(path, source_of(VOCABULARY.with_stops([7]), chat_template="{{ old }}"))
    assert (tmp_path / "m.generation_config.json").exists()
    formats.model_file.write(tmp_path / "alone.bin", 1, CONFIG, random_tensors(CONFIG))
    shown = convert(tmp_path / "alone.bin", path, "--version=3", capsys=capsys)
    assert "renamed" in shown and shown.count("it belongs to the model that was replaced") == 2
    found = formats.read("bin", str(path))
    assert (found.tokenizer, found.chat_template, found.stop_tokens) == (None, None, ())
    assert (tmp_path / "m.chat_template.jinja.old").read_text() == "{{ old }}"
    assert (tmp_path / "m.tokenizer.bin.old").exists()


def test_a_replaced_bin_leaves_no_tokenizer_bin_for_llama2c(tmp_path):
    path = write(tmp_path / "m.bin", source_of())
    write(path, padded(*made(byte_pairs())))
    assert not (tmp_path / "m.tokenizer.bin").exists() and (tmp_path / "m.tokenizer.json").exists()


def test_a_replaced_folder_leaves_nothing_to_the_new_one(tmp_path):
    folder = write(tmp_path / "hf", source_of(chat_template="{{ old }}"))
    (folder / "chat_template.jinja").write_text("{{ older }}")
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 300}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "a"}')
    write(folder, source_of())
    found = formats.read("hf", str(folder))
    assert found.tokenizer.ids == VOCABULARY.ids and found.tokenizer.added == {} and found.chat_template is None
    write(folder, source_of(None))
    found = formats.read("hf", str(folder))
    assert (found.tokenizer, found.tokenizer_problem, found.stop_tokens) == (None, "", ())


def test_files_that_the_user_put_there_first_stay(tmp_path):
    (tmp_path / "m.chat_template.jinja").write_text("mine")
    (tmp_path / "m.tokenizer.bin").write_bytes(pack(VOCABULARY.pieces()))
    write(tmp_path / "m.bin", source_of(None))
    assert formats.read("bin", str(tmp_path / "m.bin")).chat_template == "mine"
    assert load_tokenizer(formats.model_file.read(tmp_path / "m.bin")) is not None


# -- padded vocabularies ----------------------------------------------------------------------------------------------


def padded(vocabulary: Tokenizer, data: bytes, n_pads: int = 0) -> ImportedModel:
    config = dataclasses.replace(CONFIG, vocab_size=vocabulary.vocab_size + n_pads)
    return source_of(vocabulary, data, config=config, tensors=random_tensors(config))


@pytest.mark.parametrize("make", ["tokenizer.bin", "tokenizer.json"])
def test_a_padded_vocabulary_stays_one_through_every_format(tmp_path, make):
    if make == "tokenizer.bin":
        vocabulary = toy_tokenizer(321)
        source = padded(vocabulary, pack(vocabulary.pieces()), 384 - 321)
    else:
        vocabulary, data = made(byte_pairs("smollm", special=("<bos>", "<|endoftext|>"), added=CHATML))
        source = padded(vocabulary, data, 384 - vocabulary.vocab_size)
    before = write(tmp_path / "hf", source)
    assert json.loads((before / "config.json").read_text())["vocab_size"] == 384
    steps = [("1.bin", "--version=1"), ("2.bin", "--version=2"), ("3.bin", "--dtype=q8"), ("m.gguf", "--dtype=q8_0"),
             ("4.bin", "--dtype=q8"), ("5.bin", "--version=2"), ("hf2", "--format=hf")]  # fmt: skip
    for out, option in steps:
        convert(before, tmp_path / out, option)
        before = tmp_path / out
        model = Model.load(before, backend="numpy")
        assert model.config.vocab_size == 384 and model.logits([1]).shape == (1, 384), out
        assert model.tokenizer.vocab_size == vocabulary.vocab_size, out
        assert model.undrawn == set(range(vocabulary.vocab_size, 384)), out
        assert model.tokenizer.ids == vocabulary.ids, out
        for text in ("a band  12345 \u00e9", "<|im_start|>a<|im_end|>"):
            assert model.tokenizer.encode(text, bos=True) == vocabulary.encode(text, bos=True), out
    if make == "tokenizer.bin":  # llama2.c's run reads a row for each row of the embeddings
        data = (tmp_path / "5.tokenizer.bin").read_bytes()
        assert data.count(b"\n<unused ") == 384 - 321 and len(unpack(data, "x")) == 321


# -- weights that were rounded are rounded again ----------------------------------------------------------------------


def random_q4_k(weights: np.ndarray) -> np.ndarray:
    """Blocks of 256 weights: two float16, 12 bytes of scales, 128 of values."""
    rng = np.random.default_rng(len(weights))
    blocks = rng.integers(0, 256, (len(weights), weights.shape[1] // 256, 144), np.uint8)
    blocks[..., :4] = np.array([1e-3, 5e-3], np.float16).view(np.uint8)
    return blocks.reshape(len(weights), -1)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_an_import_says_what_rounding_again_costs(tmp_path, kind, capsys, monkeypatch):
    gguf = pytest.importorskip("gguf")
    config = dataclasses.replace(CONFIG, dim=256, head_dim=128, hidden_dim=256)
    source = source_of(config=config, tensors=random_tensors(config))
    if kind == "Q4_K":  # which the package only reads
        types = {1: gguf.GGMLQuantizationType.F32, 2: gguf.GGMLQuantizationType.Q4_K}
        monkeypatch.setattr(gguf_file, "_type_for", lambda shape, _: types[len(shape)])
        monkeypatch.setattr(gguf.quants, "quantize", lambda x, kind: x if kind.name == "F32" else random_q4_k(x))
    gguf_file.write(tmp_path / "m.gguf", source, "q8_0")
    monkeypatch.undo()
    shown = convert(tmp_path / "m.gguf", tmp_path / "m.bin", "--dtype=q4", capsys=capsys)
    (line,) = [line for line in shown.splitlines() if "rounded again" in line]
    assert f"its weights were {kind} and are now rounded again, to q4: off by another" in line and "--dtype q8" in line
    stored, found = formats.read("gguf", str(tmp_path / "m.gguf")).tensors, formats.read("bin", str(tmp_path / "m.bin"))
    losses = {}
    for name, tensor in found.tensors.items():
        if len(tensor.shape) == 2:
            original = stored[name][0 : tensor.shape[0]]
            losses[name] = np.linalg.norm(tensor[0 : len(original)] - original) / np.linalg.norm(original)
    worst = max(losses, key=lambda name: losses[name])
    assert f"({worst}, the worst: {losses[worst]:.2%})" in line
    assert f"another {np.sqrt(np.mean(np.square(list(losses.values())))):.2%} of" in line

    for out, dtype in (("f.bin", "f32"), ("again.bin", "q4")):  # exact; and copied
        model = tmp_path / ("m.bin" if dtype == "q4" else "m.gguf")
        assert "rounded again" not in convert(model, tmp_path / out, f"--dtype={dtype}", capsys=capsys)
    assert "--dtype bf16" in convert(tmp_path / "m.gguf", tmp_path / "q8.bin", "--dtype=q8", capsys=capsys)
