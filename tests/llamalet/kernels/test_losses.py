import numpy as np
import pytest

from llamalet import reference
from llamalet.kernels.losses import Losses

pytestmark = pytest.mark.compiles


@pytest.mark.parametrize("vocab_size", [1, 15, 300, 5001])
def test_losses_are_those_of_float64(vocab_size):
    rng = np.random.default_rng(vocab_size)
    for scale in (0.01, 1, 10, 80):
        logits = rng.normal(0, scale, (7, vocab_size)).astype(np.float32)
        targets = rng.integers(0, vocab_size, 7)
        exact = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        expected = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(7), targets]
        for losses in (Losses(), reference.losses):
            np.testing.assert_allclose(losses(logits, targets), expected, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_a_number_that_is_not_finite_has_no_loss(bad):
    logits = np.zeros((3, 40), np.float32)
    logits[1, 39] = bad
    for losses in (Losses(), reference.losses):
        found = losses(logits, np.zeros(3, np.int64))
        assert np.isnan(found).tolist() == [False, True, False]


def test_a_target_outside_of_the_vocabulary_is_refused():
    logits = np.zeros((2, 40), np.float32)
    for targets in ([0, 40], [-1, 0], [0]):
        with pytest.raises(IndexError):
            Losses()(logits, np.array(targets))
