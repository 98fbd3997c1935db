"""The stream of training sequences is a function of the data, the seed and the place, random beginnings included."""

import dataclasses

import numpy as np
import pytest
from toy import SMALL_MODELS, toy_state

from llamalet.errors import ConfigError
from training import resume_check
from training.batches import Windows, window_starts
from training.config import TrainConfig, with_defaults

T, SEED = 16, 11
TOKENS = np.arange(20_000)
"""Each token is its own position, so the first token of a sequence says where it begins."""
DOCUMENTS = np.cumsum(np.random.default_rng(0).integers(3, 40, size=900))
DOCUMENTS = DOCUMENTS[DOCUMENTS < len(TOKENS)]
CUTS = pytest.mark.parametrize("documents", [DOCUMENTS, None], ids=["documents", "plain"])


def begins(windows: Windows, n_sequences: int, seed: int = SEED) -> np.ndarray:
    """Return where the first sequences of a run begin, having checked that each goes on from there."""
    inputs, targets = windows.training_batch(seed, 0, n_sequences)
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(T))
    np.testing.assert_array_equal(targets, inputs + 1)
    return inputs[:, 0]


@CUTS
def test_without_random_starts_the_stream_is_what_it_was_before_there_were_any(documents):
    windows = Windows(TOKENS, T, documents)
    starts = window_starts(len(TOKENS), T, documents)
    orders = [np.random.default_rng([SEED, epoch]).permutation(len(starts)) for epoch in (0, 1)]
    np.testing.assert_array_equal(begins(windows, 2 * len(starts)), starts[np.concatenate(orders)])


@CUTS
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_a_share_of_the_sequences_begins_anywhere_and_the_others_stay(share, documents):
    before, windows = Windows(TOKENS, T, documents), Windows(TOKENS, T, documents, share)
    count = 3 * len(windows)
    old, new = begins(before, count), begins(windows, count)
    moved = new[new != old]
    assert len(moved) / count == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / count) + 1 / T**2)
    quarters = np.histogram(moved, bins=4, range=(0, len(TOKENS) - T))[0] / len(moved)
    assert quarters == pytest.approx(4 * [0.25], abs=4 * np.sqrt(0.19 / len(moved)))
    assert len(set((moved % T).tolist())) == T


def test_every_token_can_begin_a_sequence_that_has_all_its_tokens():
    windows = Windows(TOKENS[: T + 5], T, random_starts=1.0)
    assert len(windows) == 1
    assert set(begins(windows, 200).tolist()) == {0, 1, 2, 3, 4}
    assert set(begins(Windows(TOKENS[: T + 1], T, random_starts=1.0), 9).tolist()) == {0}


@CUTS
def test_random_starts_depend_on_seed_and_place_alone(documents):
    def windows() -> Windows:
        return Windows(TOKENS, T, documents, 0.5)

    count = 2 * len(windows()) + 7
    whole, other = begins(windows(), count), begins(windows(), count, seed=SEED + 1)
    places = np.random.default_rng(1).permutation(count // 3) * 3  # in any order, over the ends of epochs
    alone = windows()
    for place in places[:200].tolist():
        np.testing.assert_array_equal(alone.training_batch(SEED, place, 3)[0][:, 0], whole[place : place + 3])
    assert (whole != other).mean() > 0.9
    epochs = whole[: 2 * len(alone)].reshape(2, -1)
    assert (epochs[0] != epochs[1]).mean() > 0.9


@CUTS
def test_evaluation_has_no_random_starts(documents):
    for one, other in zip(
        Windows(TOKENS, T, documents).evaluation_batches(64, 5),
        Windows(TOKENS, T, documents, 0.9).evaluation_batches(64, 5),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ConfigError, match=rf"random_starts={share}: must be in \[0, 1\]"):
        TrainConfig(random_starts=share)


def test_a_run_from_before_the_option_goes_on_without_random_starts():
    saved = dataclasses.asdict(TrainConfig(random_starts=0.25, data="data"))
    assert with_defaults(saved)().random_starts == 0.25
    del saved["random_starts"]
    assert with_defaults(saved)().random_starts == 0.0
    state = toy_state(SMALL_MODELS["gqa-tied"], 3, train_config=saved)
    config = TrainConfig(data="data", random_starts=0.0)
    assert resume_check.changes(state, config, {}) == []
    changed = dataclasses.replace(config, random_starts=0.1)
    assert resume_check.changes(state, changed, {}) == ["random_starts 0.0 before, 0.1 now"]


@pytest.mark.parametrize(
    ("name", "then", "now"), [("random_starts", 0.0, 0.2), ("align_documents", False, True), ("seed", 0, 7)]
)
def test_another_stream_of_tokens_is_told_also_where_the_first_setting_was_nothing(name, then, now):
    config = TrainConfig(data="data", **{name: then})
    state = toy_state(SMALL_MODELS["gqa-tied"], 3, train_config=dataclasses.asdict(config))
    changed = dataclasses.replace(config, **{name: now})
    assert resume_check.changes(state, changed, {}) == [f"{name} {then} before, {now} now"]
