"""What other people's programs import."""

import dataclasses
import math

import numpy as np
import pytest
import vocabularies
from toy import random_tensors, toy_llama3, toy_model, toy_tokenizer

import llamalet
from llamalet import Model, Tokenizer, errors, model_file
from llamalet.config import ModelConfig
from llamalet.errors import FormatError, UsageError
from llamalet.tokenizer import BinTokenizer, pack, parse

CONFIG = ModelConfig.create(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=300, max_seq_len=16)


@pytest.fixture(params=["llama2", "llama3"])
def model(request, tmp_path) -> Model:
    if request.param == "llama2":
        return Model.load(toy_model(tmp_path, CONFIG), backend="numpy")
    vocabulary = toy_llama3()
    config = ModelConfig.create(**{**CONFIG.to_dict(), "vocab_size": vocabulary.vocab_size})
    inside, sha256 = ("bin", pack(vocabulary.pieces())), vocabulary.sha256
    path = tmp_path / "model.bin"
    model_file.write(path, 3, config, random_tensors(config), dtype="f32", tokenizer_sha256=sha256, tokenizer=inside)
    return Model.load(path, backend="numpy")


def nats(model: Model, ids: list[int], first: int) -> float:
    """-log p of ids[first:], each given all before it."""
    logits = model.logits(ids[:-1])[first - 1 :].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_probs[np.arange(len(ids) - first), ids[first:]].sum()


def test_a_draft_is_a_model_a_path_or_a_word(model, tmp_path):
    plain = "".join(model.generate("a band", seed=3, max_new_tokens=9))
    for draft in ("lookup", model, model.path, model.new_draft("lookup")):
        assert "".join(model.generate("a band", seed=3, max_new_tokens=9, draft=draft)) == plain
        texts = model.generate_batch(["a band"], seed=3, max_new_tokens=9, draft=draft)
        assert "".join(text for _, text in texts) == plain
    folder = tmp_path / "other"
    folder.mkdir()
    other = Model.load(toy_model(folder, dataclasses.replace(CONFIG, vocab_size=301)), backend="numpy")
    with pytest.raises(UsageError, match="draft: has 301 tokens, the model"):
        model.generate("a", draft=other)
    rows = toy_tokenizer()._rows
    swapped = BinTokenizer(
        [*rows[:270], (rows[271][0], rows[270][1]), (rows[270][0], rows[271][1]), *rows[272:]], "toy"
    )
    other = Model.load(toy_model(folder, CONFIG, tokenizer=swapped), backend="numpy")
    if model.config.vocab_size == CONFIG.vocab_size:
        with pytest.raises(UsageError, match="draft: has another vocabulary"):
            model.generate("a", draft=other)
    with pytest.raises(FormatError, match="nothing"):
        model.generate("a", draft=tmp_path / "nothing.bin")


def test_the_score_of_a_text(model):
    text = " a band and the\u00e9"
    score = model.score(text)
    ids = model.tokenizer.encode(text, bos=True)
    assert len(ids) <= CONFIG.max_seq_len
    assert score.tokens == len(ids) - 1 and score.text_bytes == len(text.encode())
    expected = nats(model, ids, 1)
    assert score.nats_per_token == pytest.approx(expected / (len(ids) - 1), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_text_longer_than_the_context_is_scored_in_windows_that_overlap(model):
    text = "a band and " * 7
    ids = model.tokenizer.encode(text, bos=True)
    assert 24 < len(ids)
    score = model.score(text)
    assert score.tokens == len(ids) - 1 and score.text_bytes == len(text)
    expected = nats(model, ids[:17], 1)
    for start in range(8, len(ids) - 9, 8):
        expected += nats(model, ids[start : start + 17], 9)
    assert score.nats == pytest.approx(expected, rel=1e-5)


def test_no_text_has_no_score(model):
    with pytest.raises(errors.UsageError, match="no text to score"):
        model.score("")


def with_vocabulary(path, **options) -> Model:
    """A model with a SentencePiece vocabulary of any kind."""
    data = vocabularies.train(**options)
    vocabulary = parse(data, "some.model")
    config = ModelConfig.create(**{**CONFIG.to_dict(), "vocab_size": vocabulary.vocab_size})
    inside = ("model", data)
    model_file.write(
        path, 3, config, random_tensors(config), dtype="f32", tokenizer_sha256=vocabulary.sha256, tokenizer=inside
    )
    return Model.load(path, backend="numpy")


def test_text_outside_the_vocabulary_has_a_score_but_no_bytes(tmp_path):
    model = with_vocabulary(tmp_path / "model.bin", byte_fallback=False, vocab_size=120)
    score = model.score("\U0001f600")
    assert (score.tokens, score.text_bytes, score.bits_per_byte) == (2, 0, math.inf)  # a space, and <unk>
    assert score.nats_per_token == pytest.approx(nats(model, model.tokenizer.encode("\U0001f600", bos=True), 1) / 2)
    assert math.isfinite(model.score("the \U0001f600").bits_per_byte)


def test_text_that_becomes_no_token_has_no_score(tmp_path):
    model = with_vocabulary(tmp_path / "model.bin", remove_extra_whitespaces=True)
    with pytest.raises(errors.UsageError, match="no text to score: in this vocabulary it has no tokens"):
        model.score("  ")


def test_the_names_that_are_offered(model, tmp_path):
    assert set(llamalet.__all__) == {"Chat", "Model", "SamplingConfig", "Tokenizer"}
    for name in llamalet.__all__:
        assert getattr(llamalet, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Modell'"):
        llamalet.Modell  # noqa: B018
    (tmp_path / "t").write_bytes(pack(toy_llama3().pieces()))
    assert Tokenizer.load(tmp_path / "t").encode("the") == toy_llama3().encode("the")
    ids = model.tokenizer.encode("a band", bos=True)
    assert model.logits(ids).shape == (len(ids), model.config.vocab_size)
    assert isinstance(next(model.generate("a", seed=1)), str)


@pytest.mark.parametrize("tokens", [[1.5], [2**70], "abc", [[1], [2, 3]], 5, ["a"], [True], [-1], []])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_what_is_no_token_is_refused(tmp_path, backend, tokens):
    with pytest.raises(errors.UsageError, match="token"):
        Model.load(toy_model(tmp_path, CONFIG), backend=backend).logits(tokens)
