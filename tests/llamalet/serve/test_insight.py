import json
import math

import numpy as np
import pytest
from toy import SMALL_MODELS, random_tensors, toy_llama3

from llamalet import story_grammar
from llamalet.backward.reference import forward
from llamalet.config import ModelConfig
from llamalet.errors import LlamaletError, UsageError
from llamalet.model_options import DEMO_MODEL
from llamalet.reference import attention_weights
from llamalet.runtime import Model
from llamalet.sampler import Sampler, SamplingConfig, choose_token
from llamalet.serve import insight

VOCAB = 50
SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 1.0},
    {"top_k": 5, "top_p": 0.0},
    {"top_p": 0.8},
    {"temperature": 1.5, "top_p": 1.0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.7, "min_p": 0.05},
    {"top_k": 1},
    {"temperature": 1e-40},
]
NAMES = [",".join(f"{name}={value}" for name, value in settings.items()) for settings in SETTINGS]


@pytest.fixture(scope="module")
def demo() -> Model:
    return Model.load(DEMO_MODEL, backend="numpy")


def logits_of(seed: int) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal(VOCAB)).astype(np.float32)


def plain_distribution(logits: np.ndarray, settings: SamplingConfig, undrawn: tuple[int, ...]) -> dict[int, float]:
    """The probabilities with which each token is drawn, with nothing but loops."""
    weights = {id: math.exp(float(logit) / settings.temperature) for id, logit in enumerate(logits)}
    for id in undrawn:
        del weights[id]
    total = sum(weights.values())
    ranked = sorted(((weight / total, id) for id, weight in weights.items()), key=lambda pair: -pair[0])
    if settings.top_k:
        ranked = ranked[: settings.top_k]
    if 0 < settings.top_p < 1:
        bound, below = settings.top_p * (sum(p for p, _ in ranked) if settings.top_k else 1), 0.0
        for n, (p, _) in enumerate(ranked, 1):
            below += p
            if below > bound:
                ranked = ranked[:n]
                break
    ranked = [(p, id) for p, id in ranked if p >= settings.min_p * ranked[0][0]]
    total = sum(p for p, _ in ranked)
    return {id: p / total for p, id in ranked}


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
@pytest.mark.parametrize("undrawn", [(), (0, 7, VOCAB - 1)], ids=["all", "undrawn"])
def test_what_can_be_drawn_is_what_plain_loops_find(settings, undrawn):
    for seed in range(10):
        config, logits = SamplingConfig(seed=seed, **settings), logits_of(seed)
        found = insight.distribution(logits, config, n=VOCAB, undrawn=undrawn, choose=choose_token)
        drawn = {row["token"]: row["drawn"] for row in found["rows"] if row["drawn"]}
        if config.temperature < 1e-30:
            assert list(drawn.values()) == [1.0]
        else:
            assert drawn == pytest.approx(plain_distribution(logits, config, undrawn), rel=1e-5)
        assert len(drawn) == found["kept"]["min_p"]
        assert {row["token"] for row in found["rows"] if row["cut_by"] is None} == drawn.keys()
        softmax = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
        assert [row["raw"] for row in found["rows"]] == pytest.approx(sorted(softmax, reverse=True))
        assert found["entropy"] == pytest.approx(-(softmax * np.log(softmax)).sum())
        json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_the_coin_of_a_step_falls_on_the_token_that_the_sampler_draws_then(settings):
    for seed in (0, 1, 2**64 - 1):
        config = SamplingConfig(seed=seed, **settings)
        sampler = Sampler(VOCAB, config, (3,))
        for step in range(30):
            logits = logits_of(step)
            found = insight.distribution(logits, config, step, n=5, undrawn=(3,), choose=choose_token)
            assert found["token"] == sampler.sample(logits)
            (row,) = (row for row in found["rows"] if row["token"] == found["token"])
            assert row["rank"] == np.argsort(-logits).tolist().index(row["token"])
            low, high = row["interval"]
            if found["coin"] is not None:
                assert low - 1e-6 <= found["coin"] <= high + 1e-6
            assert high - low == pytest.approx(row["drawn"])


def test_each_excluded_token_says_which_step_did_it():
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], np.float32))
    config = SamplingConfig(temperature=1.0, top_k=4, top_p=0.8, min_p=0.5, seed=1)
    found = insight.distribution(logits, config, undrawn=(5,), choose=choose_token)
    assert found["kept"] == {"vocabulary": 5, "top_k": 4, "top_p": 3, "min_p": 2}
    cuts = {row["token"]: row["cut_by"] for row in found["rows"]}
    assert cuts == {0: None, 1: None, 2: "min_p", 3: "top_p", 4: "top_k", 5: "vocabulary"}
    listed = insight.distribution(logits, config, n=1, undrawn=(5,), choose=choose_token)
    assert sum(row["raw"] for row in listed["rows"]) + listed["rest"]["raw"] == pytest.approx(1)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(UsageError, match="NaN"):
        insight.distribution(np.array([1, np.nan], np.float32), SamplingConfig(seed=1), choose=choose_token)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_attention_is_that_of_the_whole_pass(name):
    config, tensors = SMALL_MODELS[name], random_tensors(SMALL_MODELS[name])
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 20)
    for n in (1, 2, 20):
        found = insight.attention(tensors, config, tokens[:n].tolist())
        assert found.shape == (config.n_layers, config.n_heads, n)
        assert found.sum(axis=-1) == pytest.approx(np.ones(found.shape[:2]), abs=1e-5)
        for layer, seen in zip(found, forward(tensors, config, tokens[None, :n]).layers, strict=True):
            whole = attention_weights(seen.q, seen.k)[0].reshape(config.n_heads, n, n)
            np.testing.assert_allclose(layer, whole[:, -1], atol=1e-5)


def test_attention_is_bounded(monkeypatch):
    config = ModelConfig.create(dim=32, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=300, max_seq_len=400)
    tensors = random_tensors(config)
    tokens = np.random.default_rng(1).integers(0, 300, 400).tolist()  # more than one chunk
    whole = forward(tensors, config, np.array([tokens])).layers[0]
    last = attention_weights(whole.q, whole.k)[0].reshape(2, 400, 400)[:, -1]
    np.testing.assert_allclose(insight.attention(tensors, config, tokens)[0], last, atol=1e-5)
    for bad, message in [([], "at least one"), ([1] * 401, "1 to 400"), ([300], "token 300")]:
        with pytest.raises(UsageError, match=message):
            insight.attention(tensors, config, bad)
    monkeypatch.setattr(insight, "MAX_PRODUCTS", 10 * config.n_params)
    with pytest.raises(UsageError, match="at most 10 tokens"):
        insight.attention(tensors, config, tokens[:11])


def test_the_truth_is_the_grammars(demo):
    ids = demo.tokenizer.encode_document("Once upon a time there was a kind")
    found = insight.truth(demo.tokenizer, ids)
    shares = story_grammar.next_tokens(demo.tokenizer, ids)
    assert dict(found["rows"]) == shares and found["n_possible"] == 2 and found["problem"] is None
    assert found["entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares.values()))
    # The model has learnt it.
    logits = demo.logits(ids)[-1].astype(float)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert {token: probabilities[token] for token in shares} == pytest.approx(shares, abs=0.05)
    none = insight.truth(demo.tokenizer, demo.tokenizer.encode_document("Hello"))
    assert none["rows"] == [] and "no story" in none["problem"]
    assert len(insight.truth(demo.tokenizer, [], 2)["rows"]) == 2


def test_only_a_model_of_the_grammars_stories_passes_its_test(demo):
    ids, nats = insight.grammar_test(demo)
    losses = demo.transformer.losses(demo.logits(ids[:-1]), np.array(ids[1:]))
    assert nats < losses.sum() < insight.NEAR_TRUTH * nats
    assert 5 * nats < len(ids) * math.log(demo.config.vocab_size)  # one that knows nothing is far from that


def test_a_vocabulary_is_shown_with_bytes_where_there_is_no_text(demo):
    shown = insight.vocabulary(demo.tokenizer)
    assert len(shown) == 2048 and shown[1] is None and shown[demo.tokenizer.encode("Once")[0]] == " Once"
    byte = 3 + 0xE2
    assert shown[byte] == [0xE2]
    data = [bytes(piece) if isinstance(piece, list) else (piece or "").encode() for piece in shown]
    assert data == [demo.tokenizer.token_bytes(id) for id in range(2048)]
    other = insight.vocabulary(toy_llama3())
    assert any(isinstance(piece, list) for piece in other)


def test_facts_are_json(demo):
    facts = insight.facts(demo, "demo", is_chat=False, speaks_grammar=True)
    assert json.loads(json.dumps(facts, allow_nan=False))["begins"] == [1]
    assert facts["stops"] == [1, 2] and facts["context"] == 320 and facts["n_parameters"] == demo.config.n_params


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -1.0}, {"temperature": 1e9}, {"top_p": 2.0}, {"min_p": 1.5}, {"seed": 2**64}],
    ids=lambda fields: next(iter(fields)),
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(LlamaletError, match=next(iter(fields))):
        insight.DistributionAsked(tokens=[1], **fields).sampling()
