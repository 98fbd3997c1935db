import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llamalet.kernels import sampling
from llamalet.kernels.jit import kernel
from llamalet.kernels.sampling import TokenChooser
from llamalet.sampler import NOT_FINITE, Rule, Sampler, SamplingConfig, choose_by_weight, choose_token

pytestmark = pytest.mark.compiles


@kernel
def add_in_order(x, first, last, total):
    return sampling.add_in_order(x, first, last, total)


# --- sums in C's order ---


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([0.01, 1, 5, 20]),
    st.sampled_from([None, 2**-20, 2**-10, 2**-3]),
    st.floats(0, 4, width=32),
    st.integers(0, 2**32),
)
def test_sums_are_those_of_a_loop(n, spread, grid, total, seed):
    """Numbers on a coarse grid are often half way between two sums; numbers of a wide spread are mostly tiny."""
    x = np.exp(np.random.default_rng(seed).normal(-spread, spread, n)).astype(np.float32)
    x = np.minimum(x, 1)
    if grid is not None:
        x = (np.round(x / grid) * grid).astype(np.float32)
    expected = np.cumsum(np.append(np.float32(total), x), dtype=np.float32)
    for first in {0, n // 3}:
        start = expected[first]
        assert add_in_order(x, first, n, start) == expected[-1]


def test_a_long_sum_passes_many_powers_of_two():
    x = np.random.default_rng(1).random(100_000).astype(np.float32)
    assert add_in_order(x, 0, len(x), np.float32(0)) == np.cumsum(x)[-1]
    assert np.cumsum(x)[-1] != x.sum()  # so the order shows
    x[:50_000] = 0
    assert add_in_order(x, 0, len(x), np.float32(0)) == np.cumsum(x)[-1]


# --- the same tokens ---

SMALL = arrays(np.float32, st.integers(1, 40), elements=st.floats(-8, 8, width=32).map(lambda x: np.float32(round(x))))
RANDOM = st.builds(
    lambda n, scale, seed: np.random.default_rng(seed).normal(0, scale, n).astype(np.float32),
    st.integers(1, 3000),
    st.sampled_from([1e-4, 0.5, 2, 5, 30]),
    st.integers(0, 2**32),
)
RULES = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-40, 0.3, 1.0, 2.0]),
        "top_p": st.sampled_from([0.0, 0.001, 0.5, 0.9, 0.999, 1.0]),
        "top_k": st.sampled_from([0, 0, 1, 3, 40, 2000]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.9, 1.0]),
    }
)


@settings(max_examples=500, deadline=None)
@given(SMALL | RANDOM, RULES, st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=5), st.data())
def test_tokens_are_those_of_the_plain_rule(logits, options, coins, data):
    """Given the compiled powers, which may differ from numpy's in their last bit, the token is that of the rule."""
    undrawn = data.draw(st.sets(st.integers(0, len(logits) - 1), max_size=len(logits) - 1) | st.just(set()))
    chooser, vocab_size = TokenChooser(len(logits)), len(logits)
    rule = Rule.create(SamplingConfig(**options), vocab_size, undrawn)
    before = logits.copy()
    for coin in [np.float32(coin) / np.float32(2**24) for coin in coins]:
        token = chooser(logits, rule, coin)
        assert (logits == before).all() and token not in undrawn
        if rule.temperature < 1e-30:
            assert token == choose_token(logits, rule, coin)
        else:
            chooser(logits, rule._replace(top_k=1), coin)  # leaves the powers in memory
            assert token == choose_by_weight(chooser._room.weights[: rule.n_drawn].copy(), rule, coin)


@pytest.mark.parametrize("options", [{}, {"top_p": 1.0}, {"temperature": 0.7}, {"top_k": 50}, {"min_p": 0.02}])
def test_draws_are_those_of_numpy(options):
    for seed, scale in enumerate([0.1, 1, 3, 8]):
        logits = np.random.default_rng(seed).normal(0, scale, 32_000).astype(np.float32)
        config = SamplingConfig(seed=seed, **options)
        fast, slow = (Sampler(len(logits), config, choose=choose) for choose in (TokenChooser(32_000), choose_token))
        assert [fast.sample(logits) for _ in range(20)] == [slow.sample(logits) for _ in range(20)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
def test_what_is_not_finite_is_refused_wherever_it_is(bad, place):
    logits = np.zeros(100, np.float32)
    logits[place] = bad
    for options in ({}, {"temperature": 0.0}):
        rule = Rule.create(SamplingConfig(**options), 100, {99})
        assert TokenChooser(100)(logits, rule, np.float32(0.5)) == NOT_FINITE


def test_of_equal_logits_the_first_is_the_most_likely():
    logits = np.full(1000, 2, np.float32)
    logits[:700] = 1
    rule = Rule.create(SamplingConfig(temperature=0), 1000, {700})
    assert TokenChooser(1000)(logits, rule, np.float32(0)) == 701
