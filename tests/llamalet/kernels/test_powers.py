"""Powers of many numbers: those of numpy, and what becomes of infinities and NaNs."""

import numpy as np
import pytest
from numba import float32

from llamalet.kernels import powers
from llamalet.kernels.jit import kernel


@kernel
def write(x, largest, out):
    return powers.write_powers(x, largest, float32(0.5), float32(3), out)


@kernel
def add_up(x, largest):
    return powers.sum_of_powers(x, largest, float32(0.5))


@pytest.mark.compiles
@pytest.mark.parametrize("width", [1, 15, 16, 17, 48, 61])
def test_powers_and_their_sum_are_those_of_numpy(width):
    x = np.random.default_rng(width).normal(0, 20, width).astype(np.float32)
    x[width // 2] = -np.inf
    expected = np.exp((x.astype(np.float64) - 90) / 2) * (x > -1000)
    out = np.full(width + 1, np.nan, np.float32)
    total = write(x, np.float32(90), out)
    np.testing.assert_allclose(out[:width], 3 * expected, rtol=2e-5, atol=1e-37)
    assert np.isnan(out[width])
    assert total == pytest.approx(3 * expected.sum(), rel=1e-5, abs=1e-37)
    assert add_up(x, np.float32(90)) == pytest.approx(expected.sum(), rel=1e-5, abs=1e-37)
    assert write(x, np.float32(90), x) == total  # in place
    np.testing.assert_array_equal(x, out[:width])


@pytest.mark.compiles
def test_what_is_too_small_is_0_and_a_nan_stays_a_nan():
    x = np.array([0, -180, -np.inf, np.nan, -1e-3, -170], np.float32)
    out = np.empty_like(x)
    assert np.isnan(write(x, np.float32(0), out))
    assert out[0] == 3 and out[1] == out[2] == 0 and np.isnan(out[3]) and out[5] > 0
