"""Products of bfloat16: the same three as in test_products.py, on each of the processor's instructions."""

import os
import subprocess
import sys

import numpy as np
import pytest

from llamalet.backward.runner import Runner
from llamalet.errors import ConfigError
from llamalet.kernels import bfloat16
from llamalet.kernels.bfloat16 import TILE_ROWS, VARIABLE, available_instructions, filled
from llamalet.kernels.jit import kernel
from llamalet.kernels.products import EDGE_SHAPE
from llamalet.model_file.quantize import from_bfloat16, to_bfloat16

needs_bfloat16 = pytest.mark.skipif(bfloat16.instructions() is None, reason="bfloat16 does not pay here")
NAN_BITS = 0x7FC0

SHAPES = [(1, 1, 1), (8, 32, 48), (9, 17, 49), (33, 40, 900), (130, 500, 70), (300, 1000, 100), (64, 385, 33)]


@pytest.fixture(scope="module")
def runner():
    return Runner(2, np.zeros((2, *EDGE_SHAPE), np.float32))


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def rounded(x):
    return from_bfloat16(to_bfloat16(x))


def operand(x):
    """Return x as an operand in memory that holds NaN elsewhere."""
    m, n = x.shape
    memory = np.full((m + TILE_ROWS, filled(n)), NAN_BITS, np.uint16)
    memory[:m, :n], memory[:m, n:] = to_bfloat16(x), 0
    return memory[:m]


def room(size=2_000_000, dtype=np.uint32):
    return np.full(size, NAN_BITS * (0x10001 if dtype == np.uint32 else 1), dtype)


def check(found, left, right, before=0.0):
    exact = left.astype(np.float64) @ right + before
    bound = 1e-6 * np.abs(left).astype(np.float64) @ np.abs(right) + 1e-6 * np.abs(before)
    assert (np.abs(found - exact) <= bound).all()


@needs_bfloat16
@pytest.mark.parametrize(("m", "depth", "n"), SHAPES)
def test_products_of_training(runner, m, depth, n):
    x, weight, d_y = random(m, depth), random(n, depth), random(m, n)
    y, d_x, d_weight = (np.full(shape, np.nan, np.float32) for shape in ((m, n), (m, depth), (n, depth)))
    runner.product(operand(x), runner.pack_rows(weight, room()), y)
    check(y, rounded(x), rounded(weight).T)
    runner.product(operand(d_y), runner.pack_columns(weight, room()), d_x)
    check(d_x, rounded(d_y), rounded(weight))
    left = runner.transposed(operand(d_y), room(dtype=np.uint16))
    right = runner.pack_columns(operand(x), room())
    runner.product(left, right, d_weight)
    check(d_weight, rounded(d_y).T, rounded(x))
    before = d_weight.copy()
    runner.product(left, right, d_weight, add=True)
    check(d_weight, rounded(d_y).T, rounded(x), before)


@needs_bfloat16
def test_numbers_that_are_not_finite_stay_in_their_rows(runner):
    x, weight = random(20, 30), random(40, 30)
    x[7, 3] = np.nan
    y = np.empty((20, 40), np.float32)
    runner.product(operand(x), runner.pack_rows(weight, room()), y)
    assert np.isnan(y[7]).all()
    assert np.isfinite(np.delete(y, 7, axis=0)).all()


@needs_bfloat16
def test_rounding_is_to_the_nearest_and_to_even():
    x = np.concatenate([random(1000), [1 + 2**-8, 1 + 3 * 2**-8, -0.0, np.inf, 3e38, 1e-30]]).astype(np.float32)[None]
    out = np.full((1, filled(x.size)), NAN_BITS, np.uint16)
    kernel(lambda x, out: bfloat16.round_rows(x, out))(x, out)
    np.testing.assert_array_equal(out[:, : x.size], to_bfloat16(x))
    assert not out[:, x.size :].any()


@pytest.mark.parametrize("name", [name for name in available_instructions() if name != bfloat16.instructions()])
def test_every_other_instruction_gives_the_same(name):
    command = [sys.executable, "-m", "pytest", "-q", "-n0", __file__, "-k", "not every_other"]
    found = subprocess.run(command, env=os.environ | {VARIABLE: name}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_instructions_that_the_machine_lacks_are_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "neon")
    with pytest.raises(ConfigError, match="LLAMALET_BF16=neon: there are no such instructions; take one of .*none"):
        bfloat16.instructions.__wrapped__()
    monkeypatch.setenv(VARIABLE, "none")
    assert bfloat16.instructions.__wrapped__() is None


@pytest.mark.parametrize(
    ("available", "processor", "expected"),
    [
        (["amx", "avx512bf16"], "sapphirerapids", "amx"),
        (["avx512bf16"], "sapphirerapids", None),
        (["avx512bf16"], "znver5", "avx512bf16"),
        ([], "znver3", None),
    ],
)
def test_the_default_is_what_pays(monkeypatch, available, processor, expected):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(bfloat16, "available_instructions", lambda: available)
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: processor)
    assert bfloat16.instructions.__wrapped__() == expected
