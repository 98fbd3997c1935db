"""tinyshakespeare by its name, and other people's vocabularies over any text."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import vocabularies
from toy import toy_llama3
from vocabularies import byte_level

import export
import tinystories
import train
from corpus import documents, tinyshakespeare
from llamalet import Model, model_file
from llamalet.errors import CheckpointError, ConfigError, DataError, DiskError
from llamalet.shards import Shards
from llamalet.tokenizer import load, pack, write_bin
from llamalet.tokenizer.llama3 import special_names

PLAY = "\n\n".join(f"Speaker {i}:\nThe band and an aardvark's  hat {i},\nand the the the." for i in range(400)) + "\n"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def play(tmp_path, monkeypatch) -> Path:
    """A stand-in for the file on the net."""
    path = tmp_path / "net.txt"
    path.write_text(PLAY)
    monkeypatch.setattr(tinyshakespeare, "URL", path.as_uri())
    monkeypatch.setattr(tinyshakespeare, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def run(*argv: object) -> None:
    assert tinystories.main([*map(str, argv)]) == 0


def text_of(data: Shards, split: str) -> list[str]:
    """The documents of a split, decoded."""
    vocabulary = load(data.tokenizer_path)
    tokens = data.split(split)
    ids = np.asarray(tokens[0 : len(tokens)]).tolist()
    starts = [i for i, id in enumerate(ids) if id == vocabulary.bos_id]
    return [vocabulary.decode(ids[a:b]) for a, b in itertools.pairwise([*starts, len(ids)])]


def test_each_step_is_one_command(play):
    run("train-vocab", "--source=tinyshakespeare", "--vocab-size=320")
    play.unlink()  # by now it is here
    run("pretokenize", "--source=tinyshakespeare")
    data = Shards.open("data/tinyshakespeare/tok320")
    train, val = text_of(data, "train"), text_of(data, "val")
    assert "\n\n".join([*train, *val]) == PLAY.rstrip("\n")
    assert 0.88 < len("\n\n".join(train)) / len(PLAY) < 0.95
    assert all(document.startswith("Speaker ") for document in train + val)
    assert all(len(document) >= tinyshakespeare.PASSAGE_CHARS for document in train)


def test_download_brings_it_once(play, capsys):
    run("download", "tinyshakespeare")
    assert "downloaded, checked" in capsys.readouterr().out
    play.unlink()
    run("download", "--source=tinyshakespeare")
    assert "downloaded" not in capsys.readouterr().out


def test_a_file_put_there_by_hand_will_do(play, monkeypatch):
    monkeypatch.setattr(tinyshakespeare, "URL", "file:///nowhere")
    with pytest.raises(DataError, match="put it there as data/tinyshakespeare/input.txt"):
        run("pretokenize", "tinyshakespeare")
    target = Path("data/tinyshakespeare/input.txt")
    target.parent.mkdir(parents=True)
    shutil.copy(play, target)
    run("pretokenize", "tinyshakespeare", "--vocab-size=300")
    assert Shards.open("data/tinyshakespeare/tok300").meta.source == "tinyshakespeare"


@pytest.mark.parametrize("content", [b"", b"<html>429</html>"])
def test_another_text_is_refused(play, content):
    play.write_bytes(content)
    with pytest.raises(DataError, match=f"received {len(content)} bytes"):
        run("pretokenize", "tinyshakespeare")
    target = Path("data/tinyshakespeare/input.txt")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    with pytest.raises(DataError, match="input.txt: sha256 is"):
        run("pretokenize", "tinyshakespeare")


def test_the_real_text(shared_data, monkeypatch):
    path = shared_data / "tinyshakespeare.txt"
    assert path.stat().st_size == tinyshakespeare.TEXT_BYTES
    monkeypatch.setattr(tinyshakespeare, "URL", path.as_uri())
    record = tinyshakespeare.make_source(Path("data"))
    rows = [json.loads(line) for split in ("train", "val") for line in open(f"data/tinyshakespeare/{split}.jsonl")]
    assert "\n\n".join(row["text"] for row in rows) == path.read_text().rstrip("\n")
    sizes = {split: files[0].bytes for split, files in record.files.items()}
    assert 0.89 < sizes["train"] / sum(sizes.values()) < 0.91


@pytest.fixture(params=["bin", "json"])
def llama3_file(request, tmp_path) -> Path:
    path = tmp_path / f"vocabulary.{request.param}"
    if request.param == "bin":
        write_bin(path, toy_llama3())
    else:
        path.write_text(byte_level().to_str())
    return path


def test_a_llama_3_vocabulary_over_long_documents(llama3_file, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 50)
    text = "The band and\n\n an  aardvark's\t hat, <|eot_id|> \U0001f600 and the 12 the. " * 40
    Path("texts.jsonl").write_text("".join(json.dumps({"text": f"{text}{i}"}) + "\n" for i in range(40)))
    run("pretokenize", "texts.jsonl", f"--vocab={llama3_file}", "--workers=2")
    (folder,) = Path("data/texts").glob("tok*-*")
    data, vocabulary = Shards.open(folder), toy_llama3()
    suffix = {".json": ".bin"}.get(llama3_file.suffix, llama3_file.suffix)  # kept as the rank table that it is
    assert data.meta.tokenizer == f"tokenizer{suffix}"
    assert data.meta.bos_id == vocabulary.bos_id
    tokens = data.split("train")
    ids = np.asarray(tokens[0 : len(tokens)]).tolist()
    # The pieces' ids, joined, are those of the whole documents, and a name in the text is text.
    first = ids[: ids.index(vocabulary.bos_id, 1)]
    assert first == vocabulary.encode(f"{text}0", bos=True)
    assert data.meta.splits["train"].text_bytes == sum(len(f"{text}{i}".encode()) for i in range(40) if i % 20 != 19)


def test_a_large_vocabulary_has_ids_of_four_bytes(tmp_path):
    texts = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    rows = [(piece, float(id)) for id, piece in enumerate([*texts, *(name.encode() for name in special_names())])]
    (tmp_path / "large.bin").write_bytes(pack(rows))
    Path("texts.txt").write_text("\n".join(f"Story {i} of many." for i in range(40)))
    run("pretokenize", "texts.txt", "--document=line", "--vocab=large.bin", "--workers=1")
    (folder,) = Path("data/texts").glob("tok66048-*")
    data = Shards.open(folder)
    assert data.meta.dtype == np.uint32 and data.meta.bos_id == 65792
    assert text_of(data, "train")[0] == "Story 0 of many."

    shape = ["--dim=16", "--n_layers=1", "--n_heads=2", "--max_seq_len=16", "--batch_size=2"]
    steps = ["--max_iters=2", "--warmup_iters=1", "--eval_iters=1", "--threads=1", "--compile=False", "--no-sample"]
    assert train.main([*shape, *steps]) == 0
    assert model_file.read("out/model.bin").config.vocab_size == 66048
    told = "".join(Model.load("out/model.bin", backend="numpy").generate("Story", max_new_tokens=8, seed=1))
    assert len(told) >= 8
    assert export.main(["one.bin", "--dtype=q8", "--no-check"]) == 0
    assert "".join(Model.load("one.bin", backend="numpy").generate("Story", max_new_tokens=8, seed=1))


def test_a_text_is_trained_on_from_scratch_and_a_model_further_with_one_command_each(play, capsys):
    small = ["--source=tinyshakespeare", "--max_seq_len=32", "--batch_size=2", "--warmup_iters=1", "--compile=False"]
    shape = ["--dim=32", "--n_layers=1", "--n_heads=2"]
    assert train.main([*small, *shape, "--max_iters=3"]) == 0
    assert train.main([*small, "--max_iters=5", "--init_from=out/model.bin", "--out_dir=tuned"]) == 0
    said = capsys.readouterr().out
    assert said.count("run it with: python sample.py") == 2 and "with the weights of out/model.bin" in said
    scratch, tuned = Shards.open(next(Path("data").glob("*/tok*[0-9]"))), Model.load("tuned/model.bin")
    assert tuned.tokenizer.sha256 == scratch.tokenizer_sha256
    assert train.main([*small, *shape, "--max_iters=4", "--resume"]) == 0
    with pytest.raises(ConfigError, match="leave --data=elsewhere out"):
        train.main([*small, "--data=elsewhere"])


# Vocabularies that llama2.c's tokenizer.bin cannot hold.
OTHER_KINDS = {
    "unigram": {"model_type": "unigram", "vocab_size": 340},
    "no-bytes": {"byte_fallback": False, "vocab_size": 120},
    "padded": {"pad_id": 3},
    "symbols": {"user_defined_symbols": ["<sep>"]},
}
TINY = [
    "--dim=16", "--n_layers=1", "--n_heads=2", "--max_seq_len=16", "--batch_size=2", "--max_iters=2",
    "--warmup_iters=1", "--eval_iters=1", "--threads=1", "--compile=False", "--no-sample",
]  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_any_vocabulary_goes_from_text_to_a_model(kind, capsys):
    Path("v.model").write_bytes(vocabularies.train(**OTHER_KINDS[kind]))
    Path("texts.txt").write_text("\n".join(f"the ba den {word} \U0001f600" for word in ["na", "mur", "ilo"] * 20))
    run("pretokenize", "texts.txt", "--document=line", "--vocab=v.model", "--workers=1")
    assert train.main(TINY) == 0
    said = capsys.readouterr().out
    assert 0 < said.index("export   without a tokenizer.bin, so not for llama2.c: ") < said.index("step 1/2")
    assert sorted(path.name for path in Path("out").glob("model*")) == ["model.bin", "model.tokenizer.model"]
    model = Model.load("out/model.bin", backend="numpy")
    assert model.tokenizer.sha256 == load("v.model").sha256
    assert "".join(model.generate("the ba", max_new_tokens=8, seed=1))
    assert export.main(["small.bin", "--dtype=q8", "--no-check"]) == 0  # with the tokenizer inside
    assert "".join(Model.load("small.bin", backend="numpy").generate("the ba", max_new_tokens=8, seed=1))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (["--out_dir=file/out"], DiskError, "file/out: cannot be written to: .*file: not a folder"),
        (["--out_dir=used"], CheckpointError, "used: holds the checkpoints of an earlier run"),
        (["--resume"], CheckpointError, "out: no valid checkpoint to resume from"),
        (["--total_batch_tokens=100"], ConfigError, "total_batch_tokens=100: must be a multiple"),
        (["--dim=30", "--n_heads=4"], ConfigError, "dim=30"),
        (["--device=cuda:99"], ConfigError, "device=cuda:99"),
    ],
)
def test_what_stops_a_run_is_known_before_its_text_is_prepared(options, error, words):
    Path("file").write_text("in the way")
    Path("used/checkpoints/step-00000001").mkdir(parents=True)
    Path("texts.txt").write_text("some words\n" * 30)
    with pytest.raises(error, match=words):
        train.main([*TINY, "--source=texts.txt", *options])
    assert not Path("data").exists()
