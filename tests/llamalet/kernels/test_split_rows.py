"""Products on tile registers that keep float32's accuracy, against float64; they need a processor that has them."""

import numpy as np
import pytest

from llamalet.kernels import bfloat16
from llamalet.kernels.jit import kernel
from llamalet.kernels.split_rows import matmul_split, new_scratch, new_split_rows, split_rows
from llamalet.model_file.quantize import from_bfloat16, to_bfloat16

pytestmark = pytest.mark.skipif(bfloat16.instructions() != "amx", reason="the processor has no tile registers")

# Rows and columns that fill registers and that do not; more and fewer than a block.
MATRICES = [(1, 1), (16, 32), (7, 40), (33, 31), (64, 96), (100, 64), (250, 172)]


@kernel
def split_and_multiply(matrix, x, rows, first_t, count, out, first, last, scratch):
    split_rows(x, rows, 0, len(x))
    matmul_split(matrix, rows, first_t, count, out, first, last, scratch)


def multiply(matrix, x, first_t=0, count=None, blocks=None):
    """Return the products of `count` of the vectors x, for some blocks of 16 rows; NaN elsewhere."""
    count = len(x) - first_t if count is None else count
    out = np.full((count, len(matrix)), np.nan, np.float32)
    rows, scratch = new_split_rows(*x.shape), new_scratch(1, x.shape[1])[0]
    rows.parts[:], scratch[:] = 0x7FC07FC0, np.nan  # NaN, wherever they are not written
    first, last = blocks or (0, -(-len(matrix) // 16))
    split_and_multiply(matrix, x, rows, first_t, count, out, first, last, scratch)
    return out


def random_matrix(rows, cols):
    return to_bfloat16(np.random.default_rng(rows).standard_normal((rows, cols)).astype(np.float32))


def random_vectors(n, cols):
    """Return vectors whose numbers have very different sizes."""
    rng = np.random.default_rng(n)
    return (rng.standard_normal((n, cols)) * 10 ** rng.uniform(-6, 6, (n, cols))).astype(np.float32)


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("n", [1, 2, 16, 17, 40])
def test_products_are_as_exact_as_float32(shape, n):
    matrix, x = random_matrix(*shape), random_vectors(n, shape[1])
    weights, vectors = from_bfloat16(matrix).astype(np.float64), x.astype(np.float64)
    bound = 3e-7 * (np.abs(vectors) @ np.abs(weights).T)
    assert (np.abs(multiply(matrix, x) - vectors @ weights.T) <= bound).all()


@pytest.mark.parametrize("shape", MATRICES)
def test_a_vector_has_the_same_bits_alone_and_among_others(shape):
    matrix, x = random_matrix(*shape), random_vectors(40, shape[1])
    together = multiply(matrix, x)
    for t in (0, 15, 16, 39):
        assert np.array_equal(multiply(matrix, x[t : t + 1]), together[t : t + 1])
        assert np.array_equal(multiply(matrix, x, t, 1), together[t : t + 1])
    assert np.array_equal(multiply(matrix, x, 9, 20), together[9:29])


@pytest.mark.parametrize("n", [1, 20])
def test_only_its_blocks_are_written(n):
    matrix, x = random_matrix(100, 64), random_vectors(n, 64)
    found, whole = multiply(matrix, x, blocks=(2, 5)), multiply(matrix, x)
    assert np.array_equal(found[:, 32:80], whole[:, 32:80])
    assert np.isnan(found[:, :32]).all() and np.isnan(found[:, 80:]).all()


@pytest.mark.parametrize("n", [1, 20])
def test_a_number_that_is_not_finite_stays_in_its_row(n):
    matrix, x = random_matrix(40, 36), random_vectors(n, 36)
    matrix[7, 3] = 0x7FC0
    assert (np.isnan(multiply(matrix, x)) == (np.arange(40) == 7)).all()
    x[0, 5] = np.inf
    assert not np.isfinite(multiply(matrix, x)[0]).any()
