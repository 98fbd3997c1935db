import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from llamalet import kernels, reference, simd
from llamalet.errors import ConfigError
from llamalet.quantize import quantize
from llamalet.transformer import as_matrix, new_int8_rows

# Two orders of summing n float32 products differ by a few roundings of the sum of their absolute values.
SUM_ROUNDINGS = 1e-6
# The kernels' exp is within two units in the last place.
EXP_ULPS = 2
EXP_ROUNDINGS = 1e-6

seeds = st.integers(0, 2**32 - 1)


def floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def available_paths() -> list[str]:
    features = simd.llvmlite.binding.get_host_cpu_features()
    paths = ["portable"]
    if features.get("avx512vnni") and features.get("avx512vl"):
        paths += ["avx512vnni", "avxvnni"]  # the 256-bit instruction exists in both extensions
    elif features.get("avxvnni"):
        paths.append("avxvnni")
    return paths


@pytest.fixture(params=available_paths())
def path(request, monkeypatch):
    monkeypatch.setenv(simd.PATH_VARIABLE, request.param)
    return request.param


def at_the_end_of_memory(array: np.ndarray) -> np.ndarray:
    """Return a copy that ends where the next page must not be touched."""
    if sys.platform == "win32":
        pytest.skip("needs mprotect")
    page, size = mmap.PAGESIZE, array.nbytes
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, pages - size).reshape(array.shape)
    copy[...] = array
    return copy


def operand_of(x: np.ndarray, group: int | None) -> np.ndarray | kernels.Int8Rows:
    """Return x (T, cols) as the kernels prepare it."""
    if group is None:
        return x
    rows = new_int8_rows(*x.shape, group)
    kernels.quantize_rows(x, rows, len(x))
    return rows


@pytest.mark.parametrize("group", [4, 16, 32, 64, 128])
def test_int8_products_are_summed_exactly_on_every_path(path, group):
    """Over the whole range: -128, which only a foreign file can hold, and sums that saturating instructions lose."""

    @njit
    def dots(matrix, operand, out):
        for i in range(len(out)):
            for t in range(len(operand.scales)):
                out[i, t], _, _, _ = simd.dot_rows(matrix, (i, i), operand, (t, t))

    rng = np.random.default_rng(group)
    w, x = rng.integers(-128, 128, (2, 40, group), dtype=np.int8)
    extremes = np.array([(-128, -127), (-128, 127), (127, 127), (127, -127), (0, 127), (-128, 0)], np.int8)
    w[: len(extremes)], x[: len(extremes)] = extremes[:, :1], extremes[:, 1:]
    starts = (-128 * x.reshape(40, -1, 4).astype(np.int32)).sum(axis=-1, dtype=np.int32)
    ones, out = np.ones((40, 1), np.float32), np.zeros((40, 40), np.float32)
    w_groups, x_groups = (at_the_end_of_memory(a).view(simd.group_dtype(group)) for a in (w, x))
    x_starts = at_the_end_of_memory(starts).view(simd.starts_dtype(group))
    ones = at_the_end_of_memory(ones)
    dots(kernels.Int8Matrix(w_groups, ones), kernels.Int8Rows(x_groups, ones, x_starts), out)
    # Sums of up to 128 products fit into the 24 bits of a float32.
    np.testing.assert_array_equal(out, w.astype(np.int32) @ x.astype(np.int32).T)


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv(simd.PATH_VARIABLE, "mmx")
    with pytest.raises(ConfigError, match="LLAMALET_SIMD=mmx.*portable"):
        simd.instruction_path()


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from([16, 32, 64]), seeds)
@settings(deadline=None, max_examples=50)
def test_quantize_rows(n, n_groups, group, seed):
    x = floats(seed, n, n_groups * group)
    x[0, :group] = 0
    rows, expected = operand_of(x, group), reference.quantize_rows(x, group)
    np.testing.assert_array_equal(rows.values.view(np.int8), expected.values)
    np.testing.assert_array_equal(rows.scales, expected.scales)
    np.testing.assert_array_equal(
        rows.starts.view(np.int32), -128 * expected.values.reshape(n, -1, 4).sum(axis=-1, dtype=np.int32)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e-45])
def test_quantize_rows_keeps_what_is_not_finite(bad):
    x = np.ones((1, 64), np.float32)
    x[0, 40] = bad
    x[0, 32:40] = x[0, 41:] = 0
    found, expected = operand_of(x, 32).scales, reference.quantize_rows(x, 32).scales
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    assert np.isfinite(found[0, 1]) == np.isfinite(bad)


@given(st.integers(1, 13), st.integers(1, 9), st.integers(1, 5), st.sampled_from([None, 16, 32, 64]), seeds, st.data())
@settings(deadline=None, max_examples=100)
def test_matmul(n_rows, n_groups, n_vectors, group, seed, data):
    cols = data.draw(st.integers(1, 200)) if group is None else n_groups * group
    weight, x = floats(seed, n_rows, cols), floats(seed + 1, n_vectors, cols)
    bound = SUM_ROUNDINGS * (np.abs(x) @ np.abs(weight).T).max()
    first = data.draw(st.integers(0, n_rows))
    last = data.draw(st.integers(first, n_rows))
    first_t = data.draw(st.integers(0, n_vectors - 1))
    if group is not None:
        weight = quantize(weight, group)
    out = np.full((n_vectors, n_rows), 7, np.float32)
    expected = out.copy()
    count = n_vectors - first_t
    expected[:count, first:last] = reference.matmul(x, weight)[first_t:, first:last]
    matmul_of_layer(as_matrix([weight]), operand_of(x, group), first_t, count, out, first, last)
    np.testing.assert_allclose(out, expected, rtol=0, atol=bound)


@njit
def matmul_of_layer(matrix, operand, first_t, count, out, first, last):
    kernels.matmul(simd.layer_of(matrix, 0), operand, first_t, count, out, first, last)


@pytest.mark.parametrize(
    ("group", "cols"), [(None, 192), (None, 200), (None, 5), (16, 48), (16, 16), (32, 192), (64, 64)]
)
def test_matmul_reads_nothing_beyond_its_operands(group, cols):
    weight, x = floats(0, 7, cols), floats(1, 3, cols)
    guarded: tuple[Any, Any]
    if group is None:
        matrix, operand = as_matrix([weight]), x
        guarded = as_matrix([at_the_end_of_memory(weight)]), at_the_end_of_memory(x)
    else:
        quantized = quantize(weight, group)
        matrix, operand = as_matrix([quantized]), operand_of(x, group)
        guarded = (
            as_matrix([quantized._make(map(at_the_end_of_memory, quantized))]),
            operand._make(map(at_the_end_of_memory, operand)),
        )
    expected, out = np.zeros((3, 7), np.float32), at_the_end_of_memory(np.zeros((3, 7), np.float32))
    matmul_of_layer(matrix, operand, 0, 3, expected, 0, 7)
    matmul_of_layer(*guarded, 0, 3, out, 0, 7)
    np.testing.assert_array_equal(out, expected)


@given(st.integers(1, 300), seeds)
@settings(deadline=None, max_examples=50)
def test_rmsnorm(dim, seed):
    x, weight = 3 * floats(seed, dim), floats(seed + 1, dim)
    out = np.empty(dim, np.float32)
    kernels.rmsnorm(x, weight, np.float32(1e-5), out)
    np.testing.assert_allclose(out, reference.rmsnorm(x, weight, 1e-5), rtol=1e-5)


@pytest.mark.parametrize("gap", [0, 4, 13, 64])
def test_arrays_that_nearly_touch_round_alike(gap):
    """LLVM compiles loops twice, for arrays far apart and close together; another order of sums made them differ."""
    memory, far = np.zeros(200, np.float32), np.zeros(48, np.float32)
    x, near = memory[:48], memory[48 + gap : 96 + gap]
    x[:] = floats(0, 48)
    weight = floats(1, 48)
    kernels.rmsnorm(x, weight, np.float32(1e-5), far)
    kernels.rmsnorm(x, weight, np.float32(1e-5), near)
    np.testing.assert_array_equal(near, far)
    for values in (near, far):
        kernels.add(values, x)
    np.testing.assert_array_equal(near, far)


@given(st.integers(1, 5), st.integers(1, 40), seeds)
@settings(deadline=None, max_examples=50)
def test_rope(n_heads, half, seed):
    x, angles = floats(seed, n_heads, 1, 2 * half), floats(seed + 1, half)
    out = x.flatten()
    kernels.rope(out, np.cos(angles), np.sin(angles))
    expected = reference.rope(x, np.cos(angles)[None], np.sin(angles)[None])
    np.testing.assert_allclose(out, expected.flatten(), atol=1e-6)


@given(st.integers(1, 70), st.integers(1, 50), st.floats(0.1, 30), seeds)
@settings(deadline=None, max_examples=50)
def test_attention(head_dim, length, spread, seed):
    q, keys = spread * floats(seed, head_dim), floats(seed + 1, length + 3, head_dim)
    values, out = floats(seed + 2, length + 3, head_dim), np.empty(head_dim, np.float32)
    queries = np.stack([np.zeros_like(q), q])
    kernels.attention(queries, 1, keys, values, length, np.empty(length + 3, np.float32), out)
    expected = reference.attention(q[None, None, None], keys[None, None, :length], values[None, None, :length])
    scores = np.abs(keys[:length]) @ np.abs(q)
    # A score's rounding becomes a relative error of its weight.
    bound = (EXP_ROUNDINGS + SUM_ROUNDINGS * scores.max()) * np.abs(values).max()
    np.testing.assert_allclose(out, expected[0, 0], rtol=0, atol=bound)


def test_exp():
    @njit
    def exps(x, out):
        for i in range(len(x)):
            out[i] = simd.exp(x[i])

    largest, smallest = np.float32(127 * np.log(2)), np.float32(-126 * np.log(2))
    x = np.concatenate([np.linspace(smallest, largest, 200_001), floats(0, 1000), [0]]).astype(np.float32)
    found, expected = np.empty_like(x), np.exp(x.astype(np.float64))
    exps(x, found)
    assert np.max(np.abs(found - expected) / np.spacing(expected.astype(np.float32))) <= EXP_ULPS
    special = np.array([np.inf, 1e30, 89, -88, -1e30, -np.inf, np.nan], np.float32)
    out = np.empty_like(special)
    exps(special, out)
    np.testing.assert_array_equal(out, [np.inf, np.inf, np.inf, 0, 0, 0, np.nan])


@given(st.integers(1, 100), st.floats(0.1, 20), seeds)
@settings(deadline=None, max_examples=50)
def test_softmax(n, spread, seed):
    x = spread * floats(seed, n)
    expected = reference.softmax(x * np.float32(0.3))
    kernels.softmax(x, np.float32(0.3))
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-30)


@given(st.integers(1, 100), st.floats(0.1, 200), seeds)
@settings(deadline=None, max_examples=50)
def test_swiglu(width, spread, seed):
    gate, up = spread * floats(seed, width), floats(seed + 1, width)
    expected = reference.swiglu(gate, up)
    kernels.swiglu(gate, up)
    np.testing.assert_allclose(gate, expected, rtol=1e-5, atol=1e-34)


def test_no_kernel_hides_a_nan():
    nan = np.float32(np.nan)
    x = floats(0, 64)
    x[50] = nan
    out = np.zeros(64, np.float32)
    kernels.rmsnorm(x, np.ones(64, np.float32), np.float32(1e-5), out)
    assert np.isnan(out).all()
    gate = x.copy()
    kernels.swiglu(gate, np.ones(64, np.float32))
    assert np.isnan(gate[50]) and np.isfinite(gate[49])
    keys = floats(1, 5, 64)
    keys[3, 9] = nan
    kernels.attention(floats(2, 1, 64), 0, keys, floats(3, 5, 64), 5, np.zeros(5, np.float32), out)
    assert np.isnan(out).all()
    matrix = as_matrix([floats(4, 3, 64)])
    result = np.zeros((1, 3), np.float32)
    matmul_of_layer(matrix, x[None], 0, 1, result, 0, 3)
    assert np.isnan(result).all()
