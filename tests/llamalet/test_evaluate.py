import numpy as np
import pytest
from toy import SMALL_MODELS, toy_model, toy_tokenizer

from llamalet import Model, cli, evaluate
from llamalet.errors import ConfigError, DataError, FormatError, TokenizerError, UsageError
from llamalet.scoring import NOTHING, Evaluation, evaluate_windows, read_documents
from llamalet.shards import Entropy, Meta, Shards, Split, TokenBlock, write_meta, write_shard
from llamalet.tokenizer import write_bin

CONFIG = SMALL_MODELS["gqa-tied"]  # vocabulary 300, context 32
TEXTS = ["a band and a ban", "", "dent \u00e9\U0001f600", "ban. " * 9, "and  the end", "  a b"]


def encode(text: str) -> np.ndarray:
    """A document as evaluation wants it: closed by the BOS of the next."""
    return np.array([*toy_tokenizer().encode(text, bos=True), 1])


def prepare(folder, texts=TEXTS, vocab_size: int = 300, entropy: Entropy | None = None) -> None:
    vocabulary = toy_tokenizer(vocab_size)
    write_bin(folder / "tokenizer.model", vocabulary)
    blocks = [TokenBlock(np.array(vocabulary.encode(text, bos=True)), 1, len(text.encode())) for text in texts]
    shards = {name: write_shard(folder / f"{name}_00000.bin", blocks, vocab_size) for name in ("train", "val")}
    meta = Meta(
        source="test",
        recipe={},
        bos_id=1,
        eos_id=2,
        vocab_size=vocab_size,
        tokenizer="tokenizer.model",
        tokenizer_sha256=vocabulary.sha256,
        splits={name: Split((shard,)) for name, shard in shards.items()},
        entropy=entropy,
    )
    write_meta(folder / "meta.json", meta)


@pytest.fixture
def data(tmp_path):
    prepare(tmp_path / "data" / "toy" / "tok300")
    return tmp_path / "data" / "toy" / "tok300"


def run(*argv: object) -> int:
    return cli.main(["evaluate", *map(str, argv), "--backend=numpy"])


def numbers(text: str, name: str) -> list[float]:
    return next([float(word) for word in line.split()[-3:]] for line in text.splitlines() if line.startswith(name))


def test_the_command_scores_the_validation_documents(tmp_path, data, capsys):
    assert run(toy_model(tmp_path, CONFIG), data) == 0
    out = capsys.readouterr().out
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert f"6 stories, {sum(len(encode(text)) - 1 for text in TEXTS)} tokens, {n_bytes} bytes" in out
    per_token, per_byte, per_story = numbers(out, "model")
    assert 5 < per_token < 8
    assert per_byte * n_bytes == pytest.approx(per_story * 6, rel=1e-3)
    assert "entropy" not in out


def test_the_newest_data_are_taken(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(toy_model(tmp_path, CONFIG), "--windows", "--split=train", "--max_tokens", 20) == 0
    captured = capsys.readouterr()
    assert "20 tokens" in captured.out and "on the train split of data/toy/tok300" in captured.out


def test_the_distance_to_the_entropy(tmp_path, capsys):
    entropy = Entropy(stories=6, nats_per_token=2.5, bits_per_byte=1.5, bits_per_story=30.0)
    prepare(tmp_path / "data", entropy=entropy)
    model = toy_model(tmp_path, CONFIG)
    run(model, tmp_path / "data")
    out = capsys.readouterr().out
    scored, floor, distance = (numbers(out, name) for name in ("model", "corpus entropy", "distance"))
    assert floor == [2.5, 1.5, 30.0]
    assert distance == pytest.approx(np.subtract(scored, floor), abs=2e-4)
    assert f"{100 * distance[0] / 2.5:.1f}"[:4] in out.splitlines()[-1]
    # Of some stories, or of windows, the entropy is not known.
    run(model, tmp_path / "data", "--max-tokens=30")
    run(model, tmp_path / "data", "--windows")
    run(model, tmp_path / "data", "--split=train")
    assert "\ndistance" not in capsys.readouterr().out


def test_a_number_of_tokens_ends_at_a_document(tmp_path, data, capsys):
    first, second = len(encode(TEXTS[0])) - 1, len(encode(TEXTS[1])) - 1
    model = toy_model(tmp_path, CONFIG)
    for limit, stories in ((1, 1), (first, 1), (first + second - 1, 1), (first + second, 2)):
        run(model, data, f"--max-tokens={limit}")
        assert f"{stories} stories" in capsys.readouterr().out


def test_progress_is_told_on_long_runs(tmp_path, data, monkeypatch, capsys):
    clock = iter(range(1000))
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    run(toy_model(tmp_path, CONFIG), data)
    captured = capsys.readouterr()
    assert captured.err.count("tokens/s") == 2 and "tokens/s" not in captured.out


def test_wrong_input_is_told(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = toy_model(tmp_path, CONFIG)
    with pytest.raises(DataError, match="meta.json"):
        run(model, tmp_path)
    with pytest.raises(FormatError, match="no such model file"):
        run(tmp_path / "missing.bin", data)
    prepare(tmp_path / "other", vocab_size=301)
    with pytest.raises(TokenizerError, match="301 entries where the model has vocab_size=300"):
        run(model, tmp_path / "other")
    prepare(tmp_path / "silent", texts=["", ""])
    with pytest.raises(DataError, match="no text to score"):
        run(model, tmp_path / "silent")
    for words in ([], [model, data, "more"], [model, "--max-tokens=0"], [model, "--frob"]):
        with pytest.raises(UsageError, match="see --help"):
            run(*words)
    with pytest.raises(UsageError, match="--split=test: must be one of train, val"):
        run(model, "--split=test")
    with pytest.raises(DataError, match="gone.txt.*: no such text file or folder of prepared data"):
        run(model, "gone.txt")
    (tmp_path / "data").rename(tmp_path / "away")
    (tmp_path / "other").rename(tmp_path / "away2")
    with pytest.raises(DataError, match="no prepared data below data/"):
        run(model)


def test_shards_and_documents_agree(data):
    shards = Shards.open(data)
    documents = list(read_documents(shards.split("val"), 1))
    assert [document.tolist() for document in documents] == [encode(text).tolist() for text in TEXTS]


# --- a text file ---

TEXT = "a band and a ban\n\ndent \u00e9\U0001f600. "


@pytest.mark.parametrize("text", [TEXT, TEXT * 9])
def test_a_text_file_is_scored_whole(tmp_path, capsys, text):
    path, file = toy_model(tmp_path, CONFIG), tmp_path / "story.txt"
    file.write_bytes(text.encode())
    assert run(path, file) == 0
    out = capsys.readouterr().out
    score = Model.load(path, backend="numpy").score(text)
    assert out.splitlines()[0] == f"{path} on {file}"
    assert f"{score.tokens} tokens, {len(text.encode())} bytes of text" in out and "stor" not in out.split("\n", 1)[1]
    row = next(line for line in out.splitlines() if line.startswith("model "))
    assert [float(word) for word in row.split()[1:]] == pytest.approx(
        [score.nats_per_token, score.bits_per_byte], abs=1e-4
    )


def test_a_text_file_is_scored_in_part_and_in_windows(tmp_path, capsys):
    path, file = toy_model(tmp_path, CONFIG), tmp_path / "story.txt"
    file.write_text(TEXT * 9)
    model = Model.load(path, backend="numpy")
    ids = np.array(model.tokenizer.encode(TEXT * 9, bos=True))
    assert len(ids) > 3 * 32
    for words, expected in (
        (["--windows"], sum(evaluate_windows(model.transformer, model.tokenizer, ids), NOTHING)),
        (["--max_tokens", 7], sum(evaluate_windows(model.transformer, model.tokenizer, ids[:8]), NOTHING)),
    ):
        run(path, file, *words)
        out = capsys.readouterr().out
        assert f"{expected.tokens} tokens" in out and f"{expected.nats_per_token:.4f}" in out


def test_wrong_texts_are_refused(tmp_path):
    path, file = toy_model(tmp_path, CONFIG), tmp_path / "story.txt"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="story.txt: not text in UTF-8"):
        run(path, file)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="no text to score"):
        run(path, file)
    file.write_text("a")
    with pytest.raises(ConfigError, match="split=val: only prepared data has splits"):
        run(path, file, "--split=val")


def test_a_tokenizer_can_be_named_for_a_text_and_not_for_data(tmp_path, data, capsys):
    path, file = toy_model(tmp_path, CONFIG), tmp_path / "story.txt"
    file.write_text("a band")
    other = (tmp_path / "model.tokenizer.bin").rename(tmp_path / "other")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        run(path, file)
    assert run(path, file, "-z", other) == 0
    with pytest.raises(ConfigError, match="prepared data brings its own"):
        run(path, data, "-z", other)


def test_a_report_on_text_outside_the_vocabulary_says_so():
    with pytest.raises(DataError, match="no text to score: none of it is in the vocabulary: all tokens are <unk>"):
        evaluate.report(Evaluation(nats=9.0, tokens=3, text_bytes=0, documents=1))
    with pytest.raises(DataError, match="no text to score: the split has none"):
        evaluate.report(Evaluation(nats=9.0, tokens=3, text_bytes=0, documents=3))


def test_without_a_stderr_the_progress_goes_nowhere(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "PROGRESS_AFTER_S", -1.0)
    assert sum(evaluate.with_progress(iter([NOTHING]), 9), NOTHING) == NOTHING
    assert capsys.readouterr().err == "0 of about 9 tokens, 0 tokens/s\n"
    monkeypatch.setattr("sys.stderr", None)
    assert list(evaluate.with_progress(iter([NOTHING]), 9)) == [NOTHING]
    assert capsys.readouterr().out == ""
