import numpy as np
import pytest

from llamalet.backward.runner import Runner, panels_in
from llamalet.kernels import products
from llamalet.kernels.products import DEPTH, EDGE_SHAPE, LANES, SMALLEST_BLOCK, blocks_of, panels_shape

pytestmark = pytest.mark.simd_path

# Rows, terms and columns: single ones, edges of tiles and panels, several passes over the terms, many blocks.
SHAPES = [
    (1, 1, 1),
    (8, 16, 48),
    (9, 17, 49),
    (4, 3, 15),
    (130, DEPTH + 1, 70),
    (300, 2 * DEPTH + 5, 100),
    (33, 40, 900),
]


@pytest.fixture(scope="module")
def runner():
    return Runner(2, np.zeros((2, *EDGE_SHAPE), np.float32))


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def room(*shape):
    return np.full(np.prod(panels_shape(*shape)), np.nan, np.float32)


def check(found, left, right, before=0.0):
    exact = left.astype(np.float64) @ right + before
    bound = 1e-6 * np.abs(left).astype(np.float64) @ np.abs(right) + 1e-6 * np.abs(before)
    assert (np.abs(found - exact) <= bound).all()


@pytest.mark.parametrize(("m", "depth", "n"), SHAPES)
def test_products_of_training(runner, m, depth, n):
    x, weight, d_y = random(m, depth), random(n, depth), random(m, n)
    y, d_x, d_weight = (np.full(shape, np.nan, np.float32) for shape in ((m, n), (m, depth), (n, depth)))
    runner.product(x, runner.pack_rows(weight, room(depth, n)), y)
    check(y, x, weight.T)
    runner.product(d_y, runner.pack_columns(weight, room(n, depth)), d_x)
    check(d_x, d_y, weight)
    left, right = runner.pack_columns(d_y, room(m, n)), runner.pack_columns(x, room(m, depth))
    runner.product(left, right, d_weight)
    check(d_weight, d_y.T, x)
    before = d_weight.copy()
    runner.product(left, right, d_weight, add=True)
    check(d_weight, d_y.T, x, before)


def test_a_result_is_the_same_bits_in_larger_products(runner):
    """The order of the sums does not depend on what is computed beside them, so rows may be computed in chunks."""
    x, weight = random(200, 500), random(100, 500)
    right, y = runner.pack_rows(weight, room(500, 100)), np.empty((200, 100), np.float32)
    runner.product(x, right, y)
    for first, last in ((0, 1), (3, 50), (50, 200)):
        part = np.empty((last - first, 100), np.float32)
        runner.product(x[first:last], right, part)
        np.testing.assert_array_equal(part, y[first:last])


def test_numbers_that_are_not_finite_stay_in_their_rows(runner):
    x, weight = random(20, 30), random(40, 30)
    x[7, 3] = np.nan
    y = np.empty((20, 40), np.float32)
    runner.product(x, runner.pack_rows(weight, room(30, 40)), y)
    assert np.isnan(y[7]).all()
    assert np.isfinite(np.delete(y, 7, axis=0)).all()


@pytest.mark.parametrize(("m", "n"), [(1, 1), (288, 288), (2048, 288), (100, 32000), (2048, 32000)])
def test_blocks_cover_the_product_and_are_whole_tiles(m, n):
    blocks = blocks_of(m, n)
    assert blocks.n == -(-m // blocks.rows) * -(-n // blocks.columns)
    assert blocks.rows % products.TILE_ROWS == blocks.columns % LANES == 0
    assert blocks.n >= products.ENOUGH_BLOCKS or (blocks.rows, blocks.columns) == SMALLEST_BLOCK


def test_packed_matrices_lie_in_the_room_for_the_largest():
    assert panels_in(np.zeros(10_000, np.float32), 100, 33).shape == (3, 100, LANES)
