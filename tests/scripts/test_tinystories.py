import hashlib
import itertools
import json
import math
import multiprocessing
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import vocabularies
from hypothesis import given
from hypothesis import strategies as st

import tinystories
from corpus import documents, download, encode, pretokenize, sources, tinyshakespeare, vocabulary
from corpus.documents import Piece
from corpus.record import Record, RecordedFile
from corpus.sources import open_source
from corpus.workers import Workers
from llamalet import story_grammar, tokenizer
from llamalet.errors import ConfigError, DataError, DiskError, LlamaletError, TokenizerError, UsageError
from llamalet.shards import Shards, find_newest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def stories():
    """Small texts with all that is difficult: leading, double and trailing spaces, line ends, digits, rare letters."""
    told = ['Once  upon a time\n\n"Hi," said Tom.', " 12 345\tapples ", "\u4e2d\u6587 caf\u00e9 \U0001f600\r\n"]
    return told * 20 + [f"Story {i}. The dog saw the cat and the cat saw the dog." for i in range(60)]


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run(*argv):
    assert tinystories.main(argv) == 0


def command(*argv, **options):
    """Start tinystories.py as a user does."""
    return subprocess.Popen(
        [sys.executable, ROOT / "tinystories.py", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def decoded(data, split):
    tokens, starts = data.split(split), data.document_starts(split)
    model = tokenizer.load(data.tokenizer_path)
    ends = [*starts[1:], len(tokens)]
    return [model.decode(tokens[start:end]) for start, end in zip(starts, ends, strict=True)]


# --- synthesize ---------------------------------------------------------------------------------------------------


def test_synthesize_writes_the_same_bytes_with_any_number_of_workers(capsys):
    for workers in ("1", "3"):
        run(
            "synthesize",
            "--stories=450",
            "--val-stories=300",
            "--seed=5",
            f"--workers={workers}",
            f"--data-dir={workers}",
        )
    assert "next: python tinystories.py pretokenize" in capsys.readouterr().out
    folder = Path("1/synthetic")
    assert digests(folder) == digests(Path("3/synthetic"))
    rows = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("train", "val")}
    assert len(rows["train"]) == 450 and len(rows["val"]) == 300
    assert len({row["text"] for row in rows["train"] + rows["val"]}) == 750
    for row in rows["val"][::50]:
        assert story_grammar.log_prob(row["text"]) == pytest.approx(row["log_prob"], rel=1e-12)
    entropy = Record.read(folder).entropy
    assert entropy == {"stories": 300, "nats": -math.fsum(row["log_prob"] for row in rows["val"])}
    run("synthesize", "--size=50kB", "--val-stories=1", "--seed=6", "--data-dir=6")
    assert 50_000 <= Path("6/synthetic/train.jsonl").stat().st_size < 53_000
    assert json.loads(Path("6/synthetic/train.jsonl").open().readline())["text"] not in {
        r["text"] for r in rows["train"]
    }


# --- pretokenize --------------------------------------------------------------------------------------------------


def test_synthesize_then_pretokenize_and_nothing_between(capsys):
    run("synthesize", "--stories=300", "--val-stories=40")
    capsys.readouterr()
    run("pretokenize")
    said = capsys.readouterr().out
    assert (
        "source: synthetic" in said
        and "training a vocabulary of 4096 tokens" in said
        and "next: python train.py" in said
    )
    folder = find_newest("data")
    data = Shards.open(folder, verify=True)
    assert f"wrote {folder}" in said and f"{data.meta.splits['train'].tokens:,} tokens" in said
    rows = {
        name: [json.loads(line) for line in Path(f"data/synthetic/{name}.jsonl").open()] for name in ("train", "val")
    }
    for name in ("train", "val"):
        assert decoded(data, name) == [row["text"] for row in rows[name]]
        assert data.meta.splits[name].text_bytes == sum(len(row["text"].encode()) for row in rows[name])
    nats = -math.fsum(row["log_prob"] for row in rows["val"])
    model = tokenizer.load(data.tokenizer_path)
    predicted = sum(len(model.encode(row["text"])) + 1 for row in rows["val"])  # up to and including the closing BOS
    entropy = data.meta.entropy
    assert entropy.stories == 40
    assert entropy.nats_per_token == pytest.approx(nats / predicted)
    assert entropy.bits_per_story == pytest.approx(nats / 40 / math.log(2))
    assert entropy.bits_per_byte == pytest.approx(entropy.bits_per_story * 40 / data.meta.splits["val"].text_bytes)


def test_the_same_bytes_from_any_format_with_any_number_of_workers(stories, monkeypatch):
    monkeypatch.setattr(pretokenize, "SHARD_CHARS", 1000)
    monkeypatch.setattr(pretokenize, "TASK_CHARS", 300)
    write_jsonl(Path("jsonl/train.jsonl"), stories)
    write_jsonl(Path("jsonl/nested/valid.jsonl"), stories[:7])
    for folder, name, texts in (("parquet/deep", "train-0", stories), ("parquet", "validation-0", stories[:7])):
        Path(folder).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), f"{folder}/{name}.parquet", row_group_size=9)
    run("train-vocab", "--source=jsonl", "--vocab-size=320")
    vocab = "--vocab=data/jsonl/tok320.model"
    for source, workers in (("jsonl", "1"), ("jsonl", "2"), ("jsonl", "5"), ("parquet", "2")):
        run("pretokenize", f"--source={source}", vocab, f"--data-dir={source}-{workers}", f"--workers={workers}")
    first, *others = [digests(find_newest(f"{name}")) for name in ("jsonl-1", "jsonl-2", "jsonl-5", "parquet-2")]
    assert len(first) > 6
    assert first == others[0] == others[1]
    del first["meta.json"], others[2]["meta.json"]  # they name their source
    assert first == others[2]
    data = Shards.open(find_newest("jsonl-5"), verify=True)
    assert decoded(data, "train") == stories and decoded(data, "val") == stories[:7]


def test_only_missing_and_damaged_shards_are_made_again(stories, monkeypatch, capsys):
    monkeypatch.setattr(pretokenize, "SHARD_CHARS", 1000)
    write_jsonl(Path("s.jsonl"), stories)
    run("train-vocab", "s.jsonl", "--vocab-size=320")
    run("pretokenize", "s.jsonl")
    folder = find_newest("data")
    before = digests(folder)
    names = sorted(path.name for path in folder.glob("train_*.bin"))
    assert len(names) >= 4
    inodes = {name: (folder / name).stat().st_ino for name in names}
    damaged = bytearray((folder / names[1]).read_bytes())
    damaged[-2] ^= 1
    (folder / names[1]).write_bytes(damaged)
    (folder / names[2]).unlink()
    (folder / "train_00099.bin").write_bytes(b"left over")
    run("pretokenize", "s.jsonl")
    assert digests(folder) == before
    made = {name for name in names if (folder / name).stat().st_ino != inodes[name]}
    assert made <= set(names[1:3]) | {names[1]} and names[0] not in made and names[3] not in made
    assert f"kept: {len(before) - 4} shard(s)" in capsys.readouterr().out
    # Shards that were cut in another way do not fit together: nothing is kept.
    monkeypatch.setattr(documents, "MAX_PIECE_CHARS", 200_000)
    capsys.readouterr()
    run("pretokenize", "s.jsonl")
    assert "kept" not in capsys.readouterr().out
    # Another text under the same name: nothing is kept.
    write_jsonl(Path("s.jsonl"), stories[:-30])
    capsys.readouterr()
    run("pretokenize", "s.jsonl")
    assert "kept" not in capsys.readouterr().out
    assert decoded(Shards.open(folder, verify=True), "train") == [
        s for i, s in enumerate(stories[:-30]) if i % 20 != 19
    ]
    assert {path.name for path in folder.iterdir()} - set(before) == set()


@pytest.mark.parametrize("batches_done", [0, 1, 6])
def test_a_killed_worker_stops_the_command_and_names_the_shard(stories, batches_done, monkeypatch):
    monkeypatch.setattr(pretokenize, "SHARD_CHARS", 1000)
    monkeypatch.setattr(pretokenize, "TASK_CHARS", 40)
    run_options = vocabulary_and_options(stories)
    clean, broken = Path("clean"), Path("broken")
    with Workers(2) as workers:
        meta, _ = pretokenize.pretokenize(
            streams(stories), clean, workers=workers, advance=lambda n: None, **run_options
        )
    calls = itertools.count()

    def kill_one(_):
        if next(calls) == batches_done:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.1)

    with (
        pytest.raises(DataError, match=r"broken/(train|val)_0000\d\.bin: a worker process died"),
        Workers(2) as workers,
    ):
        pretokenize.pretokenize(streams(stories), broken, workers=workers, advance=kill_one, **run_options)
    assert not (broken / "meta.json").exists()
    finished = len(list(broken.glob("*.bin")))
    with Workers(2) as workers:
        again, kept = pretokenize.pretokenize(
            streams(stories), broken, workers=workers, advance=lambda n: None, **run_options
        )
    assert again == meta and kept == finished and digests(broken) == digests(clean)


def vocabulary_and_options(stories):
    model, _ = vocabulary.train(stories, 320)
    found = tokenizer.parse(model, "some.model")
    return {"source": "s", "recipe": {}, "tokenizer": found, "tokenizer_data": model, "entropy_nats": None}


def streams(stories):
    pieces = [Piece(text, True, "s.jsonl", line) for line, text in enumerate(stories, 1)]
    return {"train": iter(pieces[9:]), "val": iter(pieces[:9])}


class Inline:
    """Workers that work in this process."""

    map = staticmethod(map)


def test_a_failing_worker_names_shard_file_and_line(stories, monkeypatch):
    class Failing:
        vocab_size = 320

        def encode(self, text):
            return [1, 5]

        def encode_document(self, text):
            if "Story 7." in text:
                raise ValueError("seven")
            return [1, 5]

        def token_bytes(self, token):
            return b""

    options = vocabulary_and_options(stories)
    monkeypatch.setattr(encode, "_worker_tokenizer", lambda path: Failing())
    line = stories.index("Story 7. The dog saw the cat and the cat saw the dog.") + 1
    words = rf"out/train_00000\.bin: s\.jsonl, line {line}: cannot be encoded: ValueError: seven"
    with pytest.raises(DataError, match=words):
        pretokenize.pretokenize(streams(stories), Path("out"), workers=Inline(), advance=lambda n: None, **options)
    assert not list(Path("out").glob("train*"))


def test_an_exception_in_a_worker_process_comes_back():
    with pytest.raises(DataError, match="gone"), Workers(2) as workers:
        list(workers.map(_fail, ["fine", "gone"]))


def _fail(word):
    if word == "gone":
        raise DataError(word)


def test_results_come_in_order_and_tasks_are_taken_only_as_results_are_used():
    taken = []
    with Workers(2) as workers:
        results = workers.map(_slow_square, (taken.append(n) or n for n in range(100)))
        assert [next(results) for _ in range(3)] == [0, 1, 4]
        assert len(taken) <= 3 + 8
        assert list(results) == [n * n for n in range(3, 100)]


def _slow_square(n):
    time.sleep(0.01 if n % 2 else 0)
    return n * n


def test_documents_without_text_are_left_out_and_reported(capsys):
    write_jsonl(Path("s.jsonl"), ["", "one story about a dog", " ", *["another story about a cat"] * 30])
    run("pretokenize", "s.jsonl")
    assert "left out: 2 document(s) without text (empty or null), the first: s.jsonl, line 1" in capsys.readouterr().out
    data = Shards.open(find_newest())
    assert data.meta.splits["train"].documents + data.meta.splits["val"].documents == 31


def test_a_long_text_of_one_document():
    lines = [f"{i} words in a line, and  more\n" for i in range(8000)]
    Path("novel.txt").write_text("".join(lines))
    run("pretokenize", "novel.txt", "--val-fraction=0.1", "--vocab-size=303")
    data = Shards.open(find_newest())
    (train,), (val,) = decoded(data, "train"), decoded(data, "val")
    assert train + "\n" + val + "\n" == "".join(lines)
    assert data.meta.splits["train"].text_bytes == len(train) and data.meta.splits["val"].text_bytes == len(val)
    assert abs(len(val) / len("".join(lines)) - 0.1) < 0.001
    # In one piece the ids are the same.
    assert data.split("train")[:].tolist() == tokenizer.load(data.tokenizer_path).encode(train, bos=True)


def test_max_documents(stories):
    write_jsonl(Path("s.jsonl"), stories)
    run("pretokenize", "s.jsonl", "--max-documents=7")
    assert decoded(Shards.open(find_newest()), "train") == stories[:7]


def test_a_vocabulary_from_elsewhere(stories, shared_data):
    write_jsonl(Path("s.jsonl"), stories)
    vocab = shared_data / "llama2-tokenizer.model"
    model = tokenizer.load(vocab)
    for path, name in ((vocab, "tokenizer.model"), (shared_data / "llama2-tokenizer.bin", "tokenizer.bin")):
        run("pretokenize", "s.jsonl", f"--vocab={path}")
        data = Shards.open(find_newest(), verify=True)
        assert data.folder.name == f"tok32000-{model.sha256[:8]}" and data.meta.tokenizer == name
        assert data.tokenizer_path.read_bytes() == path.read_bytes()
        assert data.tokenizer_sha256 == model.sha256
        assert data.split("train")[:].tolist() == sum(
            (model.encode(s, bos=True) for i, s in enumerate(stories) if i % 20 != 19), []
        )
        assert {p.name for p in data.folder.iterdir()} == {name, "meta.json", "train_00000.bin", "val_00000.bin"}


def test_real_tinystories_sample(shared_data):
    sample = shared_data / "tinystories-sample.jsonl"
    run("train_vocab", f"--source={sample}", "--vocab_size=2048")
    run("pretokenize", f"--source={sample}")
    data = Shards.open(find_newest(), verify=True)
    texts = [json.loads(line)["text"] for line in sample.open(encoding="utf-8")]
    assert data.vocab_size == 2048
    assert decoded(data, "train") == [text for i, text in enumerate(texts) if i % 20 != 19]
    assert decoded(data, "val") == texts[19::20]
    split = data.meta.splits["train"]
    assert split.text_bytes / split.tokens > 3


# --- vocabulary ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_model(stories, tmp_path_factory):
    model, size = vocabulary.train([line for story in stories for line in story.split("\n") if line], 330)
    path = tmp_path_factory.mktemp("vocabulary") / "tok330.model"
    path.write_bytes(model)
    return tokenizer.load(path, size)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_the_vocabulary_is_lossless(small_model, text):
    assert small_model.decode(small_model.encode(text)) == text


def test_the_vocabulary_is_llama2s_kind(small_model):
    pieces = [piece for piece, _ in small_model.pieces()]
    assert (small_model.bos_id, small_model.eos_id, len(pieces)) == (1, 2, 330)
    assert pieces[3:259] == [b"<0x%02X>" % byte for byte in range(256)]
    learned = [small_model.token_bytes(i) for i in range(259, 330)]
    assert not any(len(piece) > 1 and any(byte in b"0123456789" for byte in piece) for piece in learned)
    assert not any(b" " in piece[1:] or b"\n" in piece for piece in learned)
    assert max(map(len, learned)) > 2


def test_the_same_text_gives_the_same_vocabulary(stories):
    lines = [line for story in stories for line in story.split("\n") if line]
    assert vocabulary.train(lines, 330) == vocabulary.train(iter(lines), 330)


def test_a_vocabulary_learns_from_very_long_lines():
    line = "the dog saw the cat and " * 100_000
    assert vocabulary.train([line], 280)[1] == 280


def test_a_text_of_one_long_document_is_sampled_too():
    pieces = [Piece(f"piece {i}", i == 0, "novel.txt", 1) for i in range(7)]
    assert list(vocabulary.sample_lines(pieces, 3)) == ["piece 0", "piece 3", "piece 6"]
    assert len(list(vocabulary.sample_lines(pieces, 1))) == 7


def test_a_text_too_small_for_the_vocabulary_names_the_largest(stories):
    write_jsonl(Path("s.jsonl"), stories)
    with pytest.raises(DataError, match=r"--vocab-size=9000: .*the largest possible is (\d+)") as caught:
        run("train-vocab", "s.jsonl", "--vocab-size=9000")
    largest = int(str(caught.value).split()[-1])
    run("train-vocab", "s.jsonl", f"--vocab-size={largest}")
    with pytest.raises(DataError, match=f"largest possible is {largest}"):
        run("train-vocab", "s.jsonl", f"--vocab-size={largest + 1}")
    with pytest.raises(DataError, match=r"--vocab-size=260: .* need (\d+)") as caught:
        run("train-vocab", "s.jsonl", "--vocab-size=260")
    assert 260 < int(str(caught.value).rpartition(" need ")[2].split(";")[0]) < 330
    run("pretokenize", "s.jsonl", "--data-dir=other")  # without a wish, the largest possible is taken
    assert Shards.open(find_newest("other")).vocab_size == largest


def test_a_folder_in_the_place_of_a_smaller_vocabulary_is_known_before_the_training(monkeypatch):
    Path("s.txt").write_text("some words\n" * 30)
    Path("data/s/tok322.model").mkdir(parents=True)
    monkeypatch.setattr(vocabulary, "train", must_not_run)
    with pytest.raises(DiskError, match="tok322.model: is in the place of a file"):
        run("pretokenize", "s.txt")


def test_pretokenize_takes_the_vocabulary_that_was_asked_for(stories):
    write_jsonl(Path("s.jsonl"), stories)
    run("train-vocab", "s.jsonl", "--vocab-size=303")
    run("train-vocab", "s.jsonl", "--vocab-size=310")
    os.utime("data/s/tok310.model", (1, 1))
    run("pretokenize", "s.jsonl")
    assert find_newest() == Path("data/s/tok303") and Shards.open(find_newest()).vocab_size == 303
    run("pretokenize", "s.jsonl", "--vocab-size=310")
    assert Shards.open(find_newest()).vocab_size == 310
    run("pretokenize", "s.jsonl", "--vocab_size", "305")
    assert Shards.open(find_newest()).vocab_size == 305


def trained(name, **options):
    """Train a small SentencePiece vocabulary of any kind and return its path."""
    path = Path(f"{name}.model")
    path.write_bytes(vocabularies.train(**options))
    return path


OTHER_KINDS = {
    "unigram": {"model_type": "unigram", "vocab_size": 340},
    "no-bytes": {"byte_fallback": False, "vocab_size": 120},
    "padded": {"pad_id": 3},
    "bos-2-eos-3": {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3},
    "symbols": {"user_defined_symbols": ["<sep>", "the", "dog s"]},
    "control": {"control_symbols": ["<|im_start|>"]},
    "normalizing": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no-prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "wide": {"split_by_whitespace": False},
    "char": {"model_type": "char", "byte_fallback": False, "vocab_size": 40},
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_every_kind_of_vocabulary_encodes_a_long_text_in_pieces(name, monkeypatch):
    """The text comes back as from the whole document at once, without spaces between the pieces or lost ones."""
    monkeypatch.setattr(documents, "PIECE_CHARS", 20)
    monkeypatch.setattr(documents, "MAX_PIECE_CHARS", 30)
    whole = "the dog saw the bas denilo. the dog s mur na the " + "thebademurqu" * 9 + "\nden qu\u00e9 ba the"
    vocab = trained(name, **OTHER_KINDS[name])
    model = tokenizer.load(vocab)
    encode.check_tokenizer(model, str(vocab))
    pieces = list(documents._cut([whole], "s.txt", 1))
    ids = [id for piece in pieces for id in encode.encode_piece(piece, model)]
    assert len(pieces) > 6 and {piece.gap for piece in pieces} == {"", " "}
    assert model.decode(ids) == model.decode(model.encode(whole))
    block = encode.encode_pieces(encode.EncodeTask(vocab, tuple(pieces)))
    assert block.ids.tolist() == [model.bos_id, *ids] and block.text_bytes == len(whole.encode())


@pytest.mark.parametrize(
    "options",
    [{"model_type": "word", "byte_fallback": False, "vocab_size": 100}, {"treat_whitespace_as_suffix": True}],
)
def test_a_vocabulary_whose_pieces_do_not_fit_together_is_refused_before_any_work(options):
    trained("words", **options)
    Path("s.txt").write_text("the dog\n" * 50)
    with pytest.raises(TokenizerError, match=r"words\.model: cannot be used: long documents are encoded in pieces"):
        run("pretokenize", "s.txt", "--vocab=words.model")
    assert not Path("data").exists()


def test_text_outside_the_vocabulary_is_counted_and_said(capsys):
    vocab = trained("no-bytes", **OTHER_KINDS["no-bytes"])
    write_jsonl(Path("s.jsonl"), [*["the ba den \U0001f600 the \u4e2d\u6587 na"] * 39, "the ba"])
    run("pretokenize", "s.jsonl", f"--vocab={vocab}")
    said = capsys.readouterr().out
    folder = find_newest("data")
    meta = Shards.open(folder, verify=True).meta
    train, val = meta.splits["train"], meta.splits["val"]
    assert (train.unknown_tokens, val.unknown_tokens) == (2 * 38, 2)  # neighbours become one <unk>
    assert f"76 of {train.tokens:,} tokens are <unk>" in said and f"2 of {val.tokens:,} tokens are <unk>" in said
    run("pretokenize", "s.jsonl", f"--vocab={vocab}")  # kept shards keep their counts
    assert "kept: 2" in (again := capsys.readouterr().out) and f"76 of {train.tokens:,} tokens are <unk>" in again
    run("pretokenize", "s.jsonl", "--vocab-size=290")  # with bytes nothing is unknown, and nothing is said
    assert "<unk>" not in capsys.readouterr().out
    assert "unknown" not in Path("data/s/tok290/meta.json").read_text()


# --- sources ------------------------------------------------------------------------------------------------------


def record(source, folder, *names):
    entries = tuple(
        RecordedFile(name, (folder / name).stat().st_size, hashlib.sha256((folder / name).read_bytes()).hexdigest())
        for name in names
    )
    Record(source=source, files={"train": entries}).write(folder)


def test_which_source_is_meant(stories):
    data = Path("data")
    with pytest.raises(DataError, match="tinystories.py download.*tinystories.py synthesize"):
        open_source(None, data)
    write_jsonl(data / "synthetic" / "train.jsonl", stories)
    record("synthetic", data / "synthetic", "train.jsonl")
    assert open_source(None, data).label == "synthetic"
    write_jsonl(data / "TinyStories" / "download" / "a.jsonl", stories)
    record("roneneldan/TinyStories", data / "TinyStories", "download/a.jsonl")
    for label in (None, "roneneldan/TinyStories", "TinyStories", "data/TinyStories"):
        source = open_source(label, data)
        assert source.label == "roneneldan/TinyStories" and source.folder == data / "TinyStories"
        assert source.files == {"train": (data / "TinyStories/download/a.jsonl",)}
    assert open_source("synthetic", data).folder == data / "synthetic"
    write_jsonl(Path("own/a.jsonl"), stories)
    assert open_source("own", data).folder == data / "own"
    assert open_source("own/a.jsonl", data).folder == data / "a"


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("some/one", "some/one: not downloaded yet; type: python tinystories.py download --source=some/one"),
        ("other/TinyStories", "holds roneneldan/TinyStories, not other/TinyStories"),
        ("gone.txt", "gone.txt: no such file"),
        ("gone/x.jsonl", "gone/x.jsonl: no such file"),
        ("a b", "a b: no such file"),
        ("", "--source=: is empty"),
        ("image.png", "image.png: a source must be .txt, .jsonl, .parquet"),
        (
            "rows.json",
            "parquet, or a folder of such files; a JSON array becomes one with: jq -c '.[]' rows.json > rows.jsonl",
        ),
        ("empty", "empty: no .txt, .jsonl, .parquet file"),
    ],
)
def test_a_source_that_is_not_there(stories, label, words):
    write_jsonl(Path("data/TinyStories/a.jsonl"), stories)
    record("roneneldan/TinyStories", Path("data/TinyStories"), "a.jsonl")
    Path("image.png").write_bytes(b"png")
    Path("rows.json").write_text('[{"text": "a"}]')
    Path("empty").mkdir()
    with pytest.raises(DataError) as caught:
        open_source(label, Path("data"))
    assert words in str(caught.value)


def test_a_recorded_file_must_be_the_one_recorded(stories):
    path = Path("data/x/a.jsonl")
    write_jsonl(path, stories)
    record("x", path.parent, path.name)
    whole = path.read_text()
    path.write_text(whole.replace("Tom", "Tim"))
    with pytest.raises(DataError, match=r"a\.jsonl: sha256"):
        run("pretokenize", "x")
    path.write_text(whole[:-1])
    with pytest.raises(DataError, match=r"a\.jsonl: \d+ bytes, must be"):
        run("pretokenize", "x")
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: missing"):
        run("pretokenize", "x")
    Path("data/x/source.json").write_text("{")
    with pytest.raises(DataError, match=r"source\.json: not valid JSON: .*; delete it and make the source again"):
        run("pretokenize", "x")


def test_prepared_data_of_another_source_are_not_replaced(stories):
    write_jsonl(Path("a/s.jsonl"), stories)
    write_jsonl(Path("b/s.jsonl"), stories)
    run("pretokenize", "a/s.jsonl", "--vocab-size=303")
    before = digests(Path("data/s/tok303"))
    with pytest.raises(DataError, match=r"tok303: holds data of a/s\.jsonl, not b/s\.jsonl"):
        run("pretokenize", "b/s.jsonl", "--vocab-size=303")
    assert digests(Path("data/s/tok303")) == before
    # Nor is the vocabulary of one taken for the other's text, or replaced.
    for options in (["pretokenize"], ["pretokenize", "--vocab-size=310"], ["train-vocab", "--vocab-size=303"]):
        with pytest.raises(DataError, match=r"holds data of a/s\.jsonl, not b/s\.jsonl"):
            run(*options, "--source=b/s.jsonl")
    assert [path.name for path in Path("data/s").glob("*.model")] == ["tok303.model"]


def test_a_folder_may_be_named_in_other_ways(stories, capsys):
    write_jsonl(Path("s/train.jsonl"), stories)
    os.symlink("s", "link")
    run("pretokenize", "s", "--vocab-size=303")
    before = digests(Path("data/s/tok303"))
    for name in ("link", str(Path("s").resolve()), "link/../s"):
        capsys.readouterr()
        run("pretokenize", name, "--vocab-size=303")
        assert "kept: 2 shard(s)" in capsys.readouterr().out
    assert digests(Path("data/s/tok303")) | {"meta.json": ""} == before | {"meta.json": ""}  # it has the name


def test_the_next_command_repeats_what_was_typed(stories, capsys):
    Path("my poems.txt").write_text("\n\n".join(stories))
    typed = ["--source=my poems.txt", "--document=blankline", "--val-fraction=0.1"]
    run("train-vocab", "my poems.txt", "--vocab-size=303", *typed[1:])
    said = capsys.readouterr().out
    words = shlex.split(said.splitlines()[-1].removeprefix("next: "))
    assert words == ["python", "tinystories.py", "pretokenize", *typed]
    run(*words[2:])
    assert "vocabulary: data/my poems/tok303.model, 303 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text" "b"}\n', "s.jsonl, line 2: not valid JSON"),
        ('{"text": "a"}\n{"story": "b"}\n', "s.jsonl, line 2: no text under the key 'text'"),
        ('{"text": ""}\n\n', "s.jsonl: there is no text to train a vocabulary on"),
        ("", "s.jsonl: there is no text to train a vocabulary on"),
    ],
)
def test_bad_input_ends_in_one_line(content, words):
    Path("s.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        run("pretokenize", "s.jsonl")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_too_little_text_for_a_validation_split():
    Path("s.txt").write_text("word")
    with pytest.raises(DataError, match=r"s\.txt: there is no text for the val split"):
        run("pretokenize", "s.txt")


def must_not_run(*_args, **_options):
    raise AssertionError("this work comes too early")


@pytest.mark.parametrize(
    "argv",
    [
        ["pretokenize", "s.txt"],
        ["pretokenize", "s.txt", "--vocab-size=300"],
        ["train-vocab", "s.txt"],
        ["pretokenize", "tinyshakespeare"],
        ["download", "some/one"],
        ["download", "tinyshakespeare"],
    ],
)
def test_a_folder_that_cannot_be_written_to_is_known_before_any_work(argv, monkeypatch):
    Path("s.txt").write_text("some words\n" * 30)
    Path("file").write_text("in the way")
    for module, name in (
        (download, "_resolve"), (tinyshakespeare, "_download"), (vocabulary, "train"), (documents, "pieces"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, must_not_run)
    with pytest.raises(DiskError, match="file/data.*: cannot be written to: file: not a folder"):
        run(*argv, "--data-dir=file/data")


@pytest.mark.parametrize("name", ["z.jsonl", "z.parquet", "val.jsonl", "z.txt"])
@pytest.mark.parametrize("command", ["train-vocab", "pretokenize"])
def test_a_bad_file_among_many_is_known_before_any_work(name, command, stories, monkeypatch):
    write_jsonl(Path("s/a.jsonl"), stories)
    if name == "z.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"story": stories}), f"s/{name}")
    else:
        Path("s", name).write_bytes('{"story": "caf\u00e9"}\n'.encode("utf-16" if name == "z.txt" else "utf-8"))
    for module, function in ((vocabulary, "train"), (documents, "pieces"), (sources, "sha256_of")):
        monkeypatch.setattr(module, function, must_not_run)
    with pytest.raises(DataError, match=rf"s/{name}"):
        run(command, "s")
    assert not Path("data").exists()


def test_a_validation_split_without_text_is_known_before_the_training_split_is_encoded(stories):
    write_jsonl(Path("s/train.jsonl"), stories)
    write_jsonl(Path("s/val.jsonl"), ["", " "])
    with pytest.raises(DataError, match="s: there is no text for the val split"):
        run("pretokenize", "s", "--vocab-size=303")
    assert not list(Path("data").glob("*/*/train*"))


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "error", "words"),
    [
        (["pretokenise"], UsageError, "did you mean pretokenize?"),
        (["train"], UsageError, "train-vocab"),
        (["--source=x"], UsageError, "unknown command"),
        (["pretokenize", "--vocab=none.model", "s.txt"], LlamaletError, "none.model: no such"),
        (["pretokenize", "--vocabsize=3"], UsageError, "did you mean --vocab-size"),
        (["pretokenize", "--document=page"], UsageError, "page"),
        (["pretokenize", "--val-fraction=0"], ConfigError, "val_fraction=0.0"),
        (["pretokenize", "--val-fraction=nan"], ConfigError, "val_fraction=nan"),
        (
            ["pretokenize", "--workers=0", "--max-documents=-1"],
            ConfigError,
            "max_documents=-1: must be positive; workers=0",
        ),
        (["train-vocab", "--vocab-size=0"], ConfigError, "vocab_size=0: must be at least 260"),
        (["synthesize", "--size=big"], ConfigError, "size=big"),
        (["synthesize", "--size=0"], ConfigError, "size=0"),
        (["synthesize", "--size=1MB", "--stories=3"], ConfigError, "without stories="),
        (["synthesize", "--seed=-1"], ConfigError, "seed=-1"),
        (["download", "--max-files=0"], ConfigError, "max_files=0"),
    ],
)
def test_mistakes_on_the_command_line(argv, error, words):
    Path("s.txt").write_text("some words\n" * 30)
    with pytest.raises(error) as caught:
        tinystories.main(argv)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("500kB", 500_000), ("10MB", 10**7), ("1.5g", 1_500_000_000), ("123", 123), (None, 20_000_000)],
)
def test_sizes(size, expected):
    assert tinystories.SynthesizeConfig(size=size).size_bytes == expected


@pytest.mark.parametrize("name", list(tinystories.COMMANDS))
def test_help_lists_options_and_examples(name, capsys):
    with pytest.raises(SystemExit) as caught:
        tinystories.main([name, "--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and shown.count(f"python tinystories.py {name}") >= 2 and "--data-dir" in shown
    assert tinystories.main(["--help"]) == 0 and name in capsys.readouterr().out


def test_in_a_shell_without_data_the_message_says_what_to_type():
    process = command("pretokenize")
    out, err = process.communicate()
    assert process.returncode == 3 and out == ""
    assert err.count("\n") == 1 and "python tinystories.py download" in err
    process = command()
    out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert err.count("\n") == 1 and "no command" in err and "pretokenize" in err


def test_a_full_disk_is_one_line_that_names_the_file():
    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = command("synthesize", "--size=1MB", preexec_fn=limit_files)
    _, err = process.communicate()
    assert (
        process.returncode == 8
        and err.count("\n") == 1
        and "data/synthetic/train.jsonl: cannot be written: File too large; free" in err
    )
    assert not list(Path("data/synthetic").iterdir())


def test_ctrl_c_waits_while_the_pool_makes_its_thread_and_processes(monkeypatch):
    start, now = threading.Thread.start, threading.Event()

    def interrupt():  # in a thread of its own: any thread may be the one that takes a signal
        now.wait()
        signal.raise_signal(signal.SIGINT)

    def start_interrupted(thread):
        if "ExecutorManagerThread" in type(thread).__name__:  # made, not started: it cannot be joined now
            now.set()
            other.join()
        start(thread)

    other = threading.Thread(target=interrupt)
    other.start()
    monkeypatch.setattr(threading.Thread, "start", start_interrupted)
    with pytest.raises(KeyboardInterrupt), Workers(1) as workers:
        next(workers.map(abs, [-1]))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("sent", "to_group", "status"), [(signal.SIGINT, True, 130), (signal.SIGKILL, False, -9)])
def test_stopping_the_command_stops_its_workers(sent, to_group, status):
    process = command("synthesize", "--size=10GB", "--workers=2", start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(Path().glob("data/synthetic/.train.jsonl.tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    try:
        (os.killpg if to_group else os.kill)(process.pid, sent)
        _, err = process.communicate(timeout=60)  # ends only when the workers, too, have closed the pipes
    finally:
        process.kill()
    assert process.returncode == status, err
    if status == 130:
        assert err == "error: stopped by Ctrl-C\n"
    assert not Path("data/synthetic/source.json").exists()
