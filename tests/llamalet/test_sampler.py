import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llamalet.errors import ConfigError, NonFiniteError
from llamalet.sampler import MASK, Generator, Sampler, SamplingConfig, random_seed

pytestmark = pytest.mark.filterwarnings("error")

SMALL = arrays(np.float32, st.integers(1, 12), elements=st.floats(-8, 8, width=32).map(lambda x: np.float32(round(x))))


def draw(logits: np.ndarray, n: int = 200, **settings) -> list[int]:
    sampler = Sampler(len(logits), SamplingConfig(**{"seed": 1, **settings}))
    return [sampler.sample(logits) for _ in range(n)]


# --- llama2.c's draws ---

# What run.c's own sampler drew (gcc -O3) from these 64 logits, with these settings: temperature, top-p, seed.
LOGITS = ((np.arange(64) * 37 % 101) / 16).astype(np.float32)
RUN_C_DRAWS = {
    (1.0, 0.9, 42): [49, 24, 24, 21, 35, 54, 19, 8, 49, 46, 8, 49, 43, 60, 30, 57],
    (0.7, 0.5, 7): [49, 8, 30, 30, 60, 60, 8, 30, 60, 49, 49, 49, 19, 8, 30, 60],
    (1.0, 1.0, 1): [19, 46, 49, 21, 5, 49, 54, 46, 24, 49, 30, 16, 13, 49, 57, 40],
    (1.5, 0.0, 2147483647): [46, 16, 57, 15, 43, 49, 62, 60, 24, 10, 43, 30, 49, 54, 27, 36],
}


def test_the_generator_is_run_cs():
    generator = Generator(42)
    assert [int(generator.next_float() * (1 << 24)) for _ in range(3)] == [5688906, 13124075, 13256299]


@pytest.mark.parametrize("case", RUN_C_DRAWS)
def test_the_tokens_are_run_cs(case):
    temperature, top_p, seed = case
    assert draw(LOGITS, 16, temperature=temperature, top_p=top_p, seed=seed) == RUN_C_DRAWS[case]


def one_by_one(logits: np.ndarray, coin: np.float32, temperature: float, top_p: float) -> int:
    """The same rule in scalar float32 arithmetic, each sum from left to right."""
    scaled = logits / np.float32(temperature)
    weights = np.exp(scaled - scaled.max())
    total = np.float32(0)
    for weight in weights:
        total += weight
    pairs = [(p / total, i) for i, p in enumerate(weights)]
    threshold, mass = coin, np.float32(0)
    if 0 < top_p < 1:
        least = (np.float32(1) - np.float32(top_p)) / np.float32(max(len(logits) - 1, 1))
        pairs = [pair for pair in pairs if pair[0] >= least] or [max(pairs, key=lambda pair: (pair[0], -pair[1]))]
        pairs.sort(key=lambda pair: (-pair[0], pair[1]))
        for n, (p, _) in enumerate(pairs, 1):
            mass += p
            if mass > np.float32(top_p):
                pairs = pairs[:n]
                break
        threshold = coin * mass
    cumulative = np.float32(0)
    for p, i in pairs:
        cumulative += p
        if threshold < cumulative:
            return i
    return pairs[-1][1]


@settings(max_examples=300, deadline=None)
@given(
    SMALL,
    st.sampled_from([0.3, 0.8, 1.0, 2.0]),
    st.sampled_from([0.0, 0.01, 0.5, 0.9, 0.99, 1.0]),
    st.integers(0, MASK),
)
def test_vectors_draw_what_scalars_draw(logits, temperature, top_p, seed):
    config = SamplingConfig(temperature=temperature, top_p=top_p, seed=seed)
    sampler, generator = Sampler(len(logits), config), Generator(seed)
    for _ in range(10):
        assert sampler.sample(logits) == one_by_one(logits, generator.next_float(), temperature, top_p)


def test_sums_run_from_left_to_right():
    # The rounding of each sum shows: added in pairs, as np.sum does, the same coins fall on other tokens.
    logits = np.zeros(40_000, dtype=np.float32)
    logits[0] = 10.0
    sampler, generator = Sampler(len(logits), SamplingConfig(top_p=1.0, seed=3)), Generator(3)
    for _ in range(5):
        assert sampler.sample(logits) == one_by_one(logits, generator.next_float(), 1.0, 1.0)


# --- the filters ---


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def test_frequencies_are_the_probabilities():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))
    counts = np.bincount(draw(logits, 20_000, top_p=1.0), minlength=4) / 20_000
    assert np.abs(counts - softmax(logits)).max() < 0.015
    counts = np.bincount(draw(logits, 20_000, top_p=1.0, temperature=2.0), minlength=4) / 20_000
    assert np.abs(counts - softmax(logits / 2)).max() < 0.015


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_p": 0.5}, {3, 1}),  # 0.4 does not exceed 0.5, 0.4 + 0.3 does
        ({"top_p": 0.75}, {3, 1, 0}),
        ({"top_p": 0.01}, {3}),
        ({"top_p": 1.0, "top_k": 1}, {3}),
        ({"top_p": 1.0, "top_k": 3}, {3, 1, 0}),
        ({"top_p": 1.0, "top_k": 4}, {3, 1, 0, 2}),
        ({"top_p": 1.0, "top_k": 99}, {3, 1, 0, 2}),
        ({"top_p": 0.0, "min_p": 0.6}, {3, 1}),
        ({"top_p": 0.0, "min_p": 0.3}, {3, 1, 0}),
        ({"top_p": 0.0, "min_p": 1.0}, {3}),
        ({"top_p": 0.5, "top_k": 2}, {3}),  # of the two, 0.4 is already more than half
        ({"top_p": 0.99, "top_k": 3, "min_p": 0.6}, {3, 1}),
        ({"top_p": 0.75, "min_p": 0.6}, {3, 1}),
        ({"top_p": 0.0}, {3, 1, 0, 2}),
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.0}, {3, 1, 0, 2}),
    ],
)
def test_filters_keep_the_most_likely(filters, kept):
    logits = np.log(np.array([0.2, 0.3, 0.1, 0.4], dtype=np.float32))
    assert set(draw(logits, 300, **filters)) == kept


def test_equal_tokens_are_taken_in_their_order():
    assert set(draw(np.zeros(8, dtype=np.float32), top_p=1.0, top_k=3)) == {0, 1, 2}
    assert set(draw(np.zeros(8, dtype=np.float32), top_p=0.3)) == {0, 1, 2}


@settings(max_examples=200, deadline=None)
@given(
    SMALL,
    st.sampled_from([0.0, 1e-6, 0.5, 1.0, 1000.0]),
    st.sampled_from([0.0, 1e-9, 1e-4, 0.5, 0.999999, 1.0]),
    st.integers(0, 14),
    st.sampled_from([0.0, 1e-9, 0.5, 1.0]),
    st.sampled_from([0, 1, MASK]),
)
def test_any_settings_draw_a_token(logits, temperature, top_p, top_k, min_p, seed):
    before = logits.copy()
    tokens = draw(logits, 5, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    assert all(0 <= token < len(logits) for token in tokens)
    assert np.array_equal(logits, before)
    if temperature == 0 or top_k == 1 or min_p == 1 or len(logits) == 1:
        assert all(logits[token] == logits.max() for token in tokens)


# --- the edges ---


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-30])
def test_no_temperature_takes_the_most_likely_token(temperature):
    assert draw(np.array([-3, 6, 7, -90], dtype=np.float32), 20, temperature=temperature, top_p=1.0) == [2] * 20


def test_the_first_of_equally_likely_tokens_is_taken():
    assert draw(np.array([-3, 7, 7, -90], dtype=np.float32), 5, temperature=0.0) == [1] * 5


def test_a_vocabulary_of_one():
    for top_p in (0.0, 0.5, 1.0):
        assert draw(np.array([3.0], dtype=np.float32), 5, top_p=top_p) == [0] * 5


def test_an_empty_nucleus_takes_the_most_likely_token():
    assert draw(np.zeros(5, dtype=np.float32), 5, top_p=1e-9) == [0] * 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad, temperature):
    some, all_bad = LOGITS.copy(), np.full(64, bad, dtype=np.float32)
    some[17] = bad
    for logits, count in ((some, 1), (all_bad, 64)):
        with pytest.raises(NonFiniteError, match=f"{count} of 64 logits"):
            draw(logits, 1, temperature=temperature)


def test_the_last_token_is_drawn_where_rounding_leaves_none(monkeypatch):
    largest = np.float32(1 - 2**-24)
    monkeypatch.setattr(Generator, "next_float", lambda self: largest)
    logits = np.zeros(4001, dtype=np.float32)
    sum_of_probabilities = np.cumsum(np.full(4001, np.float32(1) / np.float32(4001)))[-1]
    assert sum_of_probabilities < largest
    assert draw(logits, 1, top_p=1.0) == [4000]


def test_huge_logits_are_drawn_from():
    logits = np.array([3e38, -3e38, 0], dtype=np.float32)
    assert draw(logits, 5, temperature=0.5) == [0] * 5


def test_seeds_make_texts():
    first = draw(LOGITS, 30, seed=0)
    assert len(set(first)) > 5
    assert draw(LOGITS, 30, seed=0) == first != draw(LOGITS, 30, seed=1)
    # Neighbouring seeds, which --num-samples takes, must not begin alike.
    assert len({draw(LOGITS, 1, seed=seed, top_p=1.0)[0] for seed in range(20)}) > 5


def test_random_seeds_differ_and_fit():
    seeds = {random_seed() for _ in range(20)}
    assert len(seeds) == 20 and all(0 < seed < 1 << 31 for seed in seeds)


def test_all_bad_settings_are_named_at_once():
    bad = {
        "temperature": -1, "top_p": 1.5, "top_k": -2, "min_p": float("nan"), "seed": -2, "max_new_tokens": -1,
        "overflow": "spill", "keep": -1,
    }  # fmt: skip
    for make in (lambda: SamplingConfig(**bad), lambda: SamplingConfig.create(None, bad)):
        with pytest.raises(ConfigError) as caught:
            make()
        for name, value in bad.items():
            assert f"{name}={value!r}" in str(caught.value)
    for seed in (MASK + 1, -2):
        with pytest.raises(ConfigError, match=f"seed={seed}: must be -1"):
            SamplingConfig(seed=seed)


def test_options_replace_fields_and_unknown_ones_name_the_nearest():
    base = SamplingConfig(temperature=0.5, top_k=3)
    assert SamplingConfig.create(base, {}) == base
    assert SamplingConfig.create(base, {"top_k": 4}) == SamplingConfig(temperature=0.5, top_k=4)
    assert SamplingConfig.create(None, {"keep": 2}) == SamplingConfig(keep=2)
    with pytest.raises(ConfigError, match="unknown sampling option temprature; did you mean temperature"):
        SamplingConfig.create(None, {"temprature": 1})
    with pytest.raises(ConfigError, match="unknown sampling option xyzzy; there are temperature, top_p"):
        SamplingConfig.create(base, {"xyzzy": 1})


def test_each_of_several_texts_has_its_own_seed():
    config = SamplingConfig(seed=MASK - 1, top_k=5)
    assert [one.seed for one in config.for_texts(4)] == [MASK - 1, MASK, 0, 1]
    assert {one.top_k for one in config.for_texts(4)} == {5}
    drawn = [[one.seed for one in SamplingConfig().for_texts(2)] for _ in range(3)]
    assert all(second == first + 1 for first, second in drawn) and len({first for first, _ in drawn}) == 3


def test_the_number_of_logits_must_fit():
    with pytest.raises(ValueError, match="sampler was made for"):
        Sampler(5, SamplingConfig()).sample(LOGITS)
