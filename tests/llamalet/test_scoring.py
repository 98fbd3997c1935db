import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from toy import SMALL_MODELS, Counting, random_tensors, toy_model, toy_tokenizer

from llamalet import model_file, reference, scoring
from llamalet.errors import NonFiniteError
from llamalet.scoring import NOTHING, Evaluation, evaluate_documents, evaluate_streams, evaluate_windows

CONFIG = SMALL_MODELS["gqa-tied"]  # vocabulary 300, context 32
TEXTS = ["a band and a ban", "", "dent \u00e9\U0001f600", "ban. " * 9, "and  the end", "  a b"]


def encode(text: str) -> np.ndarray:
    """A document as evaluation wants it: closed by the BOS of the next."""
    return np.array([*toy_tokenizer().encode(text, bos=True), 1])


def exact_losses(tokens: np.ndarray) -> np.ndarray:
    """-log p of every token but the first, in float64, from the reference forward pass."""
    logits = reference.forward(random_tensors(CONFIG), CONFIG, tokens[None, :-1])[0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.fixture
def transformer(tmp_path) -> reference.NumpyTransformer:
    return reference.NumpyTransformer(model_file.read(toy_model(tmp_path, CONFIG)))


def test_documents_are_scored_whole_and_alone(transformer):
    documents = [encode(text) for text in TEXTS if text != TEXTS[3]]
    scores = list(evaluate_documents(transformer, toy_tokenizer(), documents))
    for document, score in zip(documents, scores, strict=True):
        assert score.nats == pytest.approx(exact_losses(document).sum(), abs=1e-3)
        assert (score.tokens, score.documents) == (len(document) - 1, 1)


def test_bytes_are_those_of_the_text():
    texts = [*TEXTS, " ", "  two", "end "]
    scores = evaluate_documents(Counting(CONFIG), toy_tokenizer(), map(encode, texts))
    assert [score.text_bytes for score in scores] == [len(text.encode()) for text in texts]


@pytest.mark.parametrize("length", [2, 31, 32, 33, 34, 48, 49, 50, 65, 200])
def test_every_token_of_a_long_document_is_scored_once_with_half_a_context_before_it(transformer, length):
    document = np.append(np.random.default_rng(length).integers(3, 300, length), 1)
    document[0] = 1
    expected = exact_losses(document[:33]).sum()
    for position in range(33, len(document)):
        begin = (position - 17) // 16 * 16  # windows begin at every half context, and score what none did before
        expected += exact_losses(document[begin : position + 1])[-1]
        assert position - begin > 16
    (score,) = evaluate_documents(transformer, toy_tokenizer(), [document])
    assert score.tokens == len(document) - 1
    assert score.nats == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("limit", [None, 1, 40, 999])
@pytest.mark.parametrize("length", [2, 32, 33, 34, 100])
def test_windows_score_every_token_but_the_first(transformer, length, limit):
    tokens = np.random.default_rng(length).integers(1, 300, length)
    end = length if limit is None else min(length, limit + 1)
    expected = sum(exact_losses(tokens[start : min(start + 33, end)]).sum() for start in range(0, end - 1, 32))
    score = sum(evaluate_windows(transformer, toy_tokenizer(), tokens, limit), NOTHING)
    assert score.tokens == end - 1
    assert score.nats == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("keep", [0, 4, 31])
def test_streams_are_scored_with_what_a_rolling_cache_has_left(keep):
    """In a model of one layer the cache after a roll is that of the tokens which are left."""
    config = dataclasses.replace(CONFIG, n_layers=1)
    header, tensors = model_file.Header(1, config), random_tensors(config, scale=0.3)
    model = reference.NumpyTransformer(model_file.ModelFile(Path("memory"), header, tensors))
    streams = np.random.default_rng(keep).integers(0, 300, (3, 101))
    scores = np.array(list(evaluate_streams(model, streams, [model.new_cache() for _ in streams], keep)))
    assert scores.shape == (100, 3)
    for stream, found in zip(streams, scores.T, strict=True):
        left: list[int] = []
        for position, score in enumerate(found):
            if len(left) == 32:
                del left[keep : keep + max(1, (32 - keep) // 2)]
            left.append(stream[position])
            logits = model.logits(left)[-1:]
            assert score == pytest.approx(float(scoring.losses(model, logits, stream[[position + 1]])[0]), abs=1e-3)


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary(monkeypatch):
    uniform = Counting(CONFIG)
    monkeypatch.setattr(uniform, "logits", lambda tokens: np.full((len(tokens), 300), 4.0, dtype=np.float32))
    score = sum(evaluate_windows(uniform, toy_tokenizer(), np.arange(1, 300)), NOTHING)
    assert score.nats_per_token == pytest.approx(math.log(300), abs=1e-5)


def test_units():
    score = Evaluation(nats=80 * math.log(2), tokens=10, text_bytes=40, documents=2)
    assert score.nats_per_token == pytest.approx(8 * math.log(2))
    assert score.bits_per_byte == pytest.approx(2)
    assert score.bits_per_document == pytest.approx(40)
    assert score + score == Evaluation(160 * math.log(2), 20, 80, 4)


def test_units_of_nothing():
    """A score that spells no text is infinitely bad in bits per byte; no score at all is no number."""
    unspelled = Evaluation(nats=3.0, tokens=2, text_bytes=0, documents=0)
    assert unspelled.nats_per_token == 1.5
    assert unspelled.bits_per_byte == unspelled.bits_per_document == math.inf
    assert math.isnan(NOTHING.nats_per_token) and math.isnan(NOTHING.bits_per_byte)
    assert (unspelled + Evaluation(1.0, 1, 8, 1)).bits_per_byte == pytest.approx(0.5 / math.log(2))


def test_weights_that_are_no_numbers_are_refused(transformer, monkeypatch):
    monkeypatch.setattr(transformer, "logits", lambda tokens: np.full((len(tokens), 300), np.nan, dtype=np.float32))
    with pytest.raises(NonFiniteError):
        list(evaluate_windows(transformer, toy_tokenizer(), np.arange(1, 50)))
