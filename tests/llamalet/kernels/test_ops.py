import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from toy import at_the_end_of_memory

from llamalet import reference
from llamalet.errors import ConfigError
from llamalet.kernels import bfloat16, ops, processor, simd, stages
from llamalet.kernels.jit import kernel
from llamalet.kernels.layers import as_matrix, layer_of
from llamalet.kernels.ops import new_quantized_rows
from llamalet.kernels.split_rows import new_scratch, new_split_rows, split_rows
from llamalet.model_file.quantize import (
    ROW_BLOCK,
    Packed,
    Quantized,
    bits_of,
    pack,
    pack_q4,
    pack_q8,
    quantize,
    to_bfloat16,
)  # fmt: skip

# Two orders of summing n float32 products differ by a few roundings of the sum of their absolute values.
SUM_ROUNDINGS = 1e-6
# The kernels' exp is within two units in the last place.
EXP_ULPS = 2

seeds = st.integers(0, 2**32 - 1)


def from_python(inner: Any) -> Any:
    """Return a kernel that Python can call; it calls one that only kernels can call."""
    return kernel(lambda *args: inner(*args))


rmsnorm, rope, swiglu, quantize_rows, split, add_rows = map(
    from_python, (ops.rmsnorm, ops.rope, ops.swiglu, ops.quantize_rows, split_rows, stages.add_rows)
)


def floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(params=simd.available_paths())
def path(request, monkeypatch):
    monkeypatch.setenv(simd.PATH_VARIABLE, request.param)
    return request.param


KINDS = ["float32", "bfloat16", "q8", "q4", "int8 in groups of 16", "int8 in groups of 32"]
if bfloat16.instructions() == "amx":
    KINDS.append("bfloat16 on tiles")


def weight_of(weight: np.ndarray, kind: str) -> Any:
    """Return a matrix in one of its forms; int8 needs columns that are whole groups."""
    if kind.startswith("int8"):
        return pack(quantize(weight, int(kind.split()[-1])))
    return {"float32": np.asarray, "bfloat16": to_bfloat16, "q8": pack_q8, "q4": pack_q4}[kind.split()[0]](weight)


def activations_of(x: np.ndarray, weight: Any, kind: str) -> Any:
    """Return x (T, cols) as the kernels prepare it for a weight of this kind."""
    if kind == "bfloat16 on tiles":
        rows = new_split_rows(*x.shape)
        split(x, rows, 0, len(x))
        return rows
    if not isinstance(weight, Packed):
        return x
    rows = new_quantized_rows(*x.shape, weight.group_size, bits_of(weight))
    quantize_rows(x, rows, 0, len(x))
    return rows


@njit
def matmul_of_layer(matrix, activations, first_t, count, out, first, last, scratch):
    ops.matmul(layer_of(matrix, 0), activations, first_t, count, out, first, last, scratch)


def scratch_for(cols: int) -> np.ndarray:
    """Return the memory that a thread needs for products."""
    shape = new_scratch(1, cols)[0].shape if bfloat16.instructions() == "amx" else (0, ROW_BLOCK)
    return at_the_end_of_memory(np.full(shape, np.nan, np.float32))


@pytest.mark.parametrize("group", [8, 16, 64, 128])
def test_products_of_8_bits_are_summed_exactly_on_every_path(path, group):
    """Over the whole range: -128, which only a foreign file can hold, and sums that saturating instructions lose."""

    @njit
    def multiply(matrix, activations, out):
        matrix = layer_of(matrix, 0)
        for i in range(0, len(matrix.values), 2):
            for t in range(0, len(out), 4):
                simd.multiply_blocks(matrix, (i, i + 1), activations, (t, t + 1, t + 2, t + 3), out, 0)

    rng = np.random.default_rng(group)
    w, x = rng.integers(-128, 128, (32, group), dtype=np.int8), rng.integers(-127, 128, (32, group), dtype=np.int8)
    extremes = np.array([(-128, -127), (-128, 127), (127, 127), (127, -127), (0, 127), (-128, 0)], np.int8)
    w[: len(extremes)], x[: len(extremes)] = extremes[:, :1], extremes[:, 1:]
    ones, out = np.ones((32, 1), np.float32), np.zeros((32, 32), np.float32)
    rows = new_quantized_rows(*x.shape, group, 8)._replace(
        values=x.view([("values", np.int8, (group,))]),
        scales=ones,
        zero_offsets=-128 * x.sum(axis=1, dtype=np.int32, keepdims=True),
    )
    multiply(as_matrix([pack(Quantized(w, ones))]), rows, out)
    # Sums of up to 128 products fit into the 24 bits of a float32.
    np.testing.assert_array_equal(out, x.astype(np.int32) @ w.astype(np.int32).T)


# Of the products below, found on x86 by all three of its paths.
DIGESTS = {"q8": "170f1d4a2df4f34a", "q4": "928bcb25c672cb92", "int8 in groups of 32": "9b73eb98259d720f"}


@pytest.mark.skipif(not processor.fuses(), reason="the processor rounds products before it adds them")
@pytest.mark.parametrize("kind", DIGESTS)
def test_products_of_packed_matrices_have_the_same_bits_on_x86_and_arm(path, kind):
    rng = np.random.default_rng(0)
    w, x = (rng.integers(-(2**20), 2**20, (n, 224)).astype(np.float32) / 2**19 for n in (40, 5))
    weight, out = weight_of(w, kind), np.zeros((5, 40), np.float32)
    activations = activations_of(x, weight, kind)

    @njit
    def multiply(matrix, activations, out):  # not ops.matmul, which is compiled once, for the first path
        for block in range(3):
            simd.multiply_blocks(layer_of(matrix, 0), (block,), activations, (0, 1, 2, 3), out, 0)
        for block in range(2):
            simd.multiply_blocks(layer_of(matrix, 0), (block, block + 1), activations, (4,), out, 0)

    multiply(as_matrix([weight]), activations, out)
    np.testing.assert_allclose(out, x @ w.T, atol=5 if kind == "q4" else 0.3)
    assert hashlib.sha256(out.tobytes()).hexdigest()[:16] == DIGESTS[kind]


@pytest.mark.parametrize("target", [None, "another"])
def test_a_path_that_is_not_there_is_refused(monkeypatch, target):
    monkeypatch.setattr(numba.config, "CPU_NAME", target)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", None)
    monkeypatch.setenv(simd.PATH_VARIABLE, "mmx" if target is None else "avx512vnni")
    with pytest.raises(ConfigError, match="LLAMALET_SIMD=(mmx|avx512vnni).*portable"):
        simd.instruction_path()
    monkeypatch.delenv(simd.PATH_VARIABLE)
    any_processor = "neon" if processor.is_arm() else "portable"
    assert simd.instruction_path() == (any_processor if target else simd.available_paths()[0])


@given(st.integers(1, 6), st.integers(1, 300), st.sampled_from([16, 32, 64]), seeds)
@settings(deadline=None, max_examples=50)
def test_quantize_rows(n, cols, group, seed):
    x = floats(seed, n, cols)
    x[0, :group] = 0
    rows, expected = new_quantized_rows(n, cols, group, 8), reference.quantize_rows(x, group)
    quantize_rows(x, rows, 0, n)
    values = rows.values.view(np.int8).reshape(n, -1)
    np.testing.assert_array_equal(values[:, :cols], expected.values)
    assert not values[:, cols:].any()
    np.testing.assert_array_equal(rows.scales, expected.scales)
    np.testing.assert_array_equal(rows.zero_offsets, -128 * values.reshape(n, -1, group).sum(axis=-1, dtype=np.int32))


@pytest.mark.simd_path
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e-45])
def test_quantize_rows_keeps_what_is_not_finite(bad):
    x, rows = np.ones((1, 64), np.float32), new_quantized_rows(1, 64, 32, 8)
    x[0, 40] = bad
    x[0, 32:40] = x[0, 41:] = 0
    quantize_rows(x, rows, 0, 1)
    found, expected = rows.scales, reference.quantize_rows(x, 32).scales
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    assert np.isfinite(found[0, 1]) == np.isfinite(bad)


@pytest.mark.simd_path
@given(st.sampled_from(KINDS), st.integers(1, 70), st.integers(1, 200), st.integers(1, 9), seeds, st.data())
@settings(deadline=None, max_examples=200)
def test_matmul(kind, n_rows, cols, n_vectors, seed, data):
    if kind.startswith("int8"):
        cols = (cols + 31) // 32 * 32
    floating, x = floats(seed, n_rows, cols), floats(seed + 1, n_vectors, cols)
    weight, n_blocks = weight_of(floating, kind), -(-n_rows // ROW_BLOCK)
    first = data.draw(st.integers(0, n_blocks - 1))
    last = data.draw(st.integers(first + 1, n_blocks))
    first_t = data.draw(st.integers(0, n_vectors - 1))
    out = np.full((n_vectors, n_rows), 7, np.float32)
    expected, product, count = out.copy(), reference.matmul(x, weight), n_vectors - first_t
    rows = slice(first * ROW_BLOCK, last * ROW_BLOCK)
    expected[:count, rows] = product[first_t:, rows]
    activations, scratch = activations_of(x, weight, kind), scratch_for(cols)
    matmul_of_layer(as_matrix([weight]), activations, first_t, count, out, first, last, scratch)
    np.testing.assert_allclose(out, expected, rtol=0, atol=SUM_ROUNDINGS * (np.abs(x) @ np.abs(floating).T).max())


@pytest.mark.simd_path
@given(st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 200), st.integers(2, 12), seeds)
@settings(deadline=None, max_examples=100)
def test_a_vector_gets_the_same_products_alone_and_among_others(kind, n_rows, cols, n_vectors, seed):
    if kind.startswith("int8"):
        cols = (cols + 31) // 32 * 32
    x, weight = floats(seed, n_vectors, cols), weight_of(floats(seed + 1, n_rows, cols), kind)
    together, alone = np.zeros((2, n_vectors, n_rows), np.float32)
    n_blocks, scratch = -(-n_rows // ROW_BLOCK), scratch_for(x.shape[1])
    activations = activations_of(x, weight, kind)
    matmul_of_layer(as_matrix([weight]), activations, 0, n_vectors, together, 0, n_blocks, scratch)
    for t in range(n_vectors):
        matmul_of_layer(as_matrix([weight]), activations, t, 1, alone[t:], 0, n_blocks, scratch)
    np.testing.assert_array_equal(together, alone)


@pytest.mark.simd_path
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [192, 200, 5])
def test_matmul_reads_nothing_beyond_its_operands(kind, cols):
    if kind.startswith("int8"):
        cols = 192
    x, weight = floats(1, 5, cols), weight_of(floats(0, 23, cols), kind)
    activations, guarded, guarded_activations = activations_of(x, weight, kind), weight, at_the_end_of_memory(x)
    if isinstance(weight, Packed):
        guarded = weight._replace(
            values=at_the_end_of_memory(weight.values), scales=at_the_end_of_memory(weight.scales)
        )
        guarded_activations = activations._replace(
            values=at_the_end_of_memory(activations.values), scales=at_the_end_of_memory(activations.scales),
            zero_offsets=at_the_end_of_memory(activations.zero_offsets),
        )  # fmt: skip
    else:
        guarded = at_the_end_of_memory(weight)
    if kind == "bfloat16 on tiles":
        guarded_activations = activations._replace(parts=at_the_end_of_memory(activations.parts))
    for count in (1, 5):
        expected, out = np.zeros((count, 23), np.float32), at_the_end_of_memory(np.zeros((count, 23), np.float32))
        scratch = scratch_for(cols)
        matmul_of_layer(as_matrix([weight]), activations, 0, count, expected, 0, 2, scratch)
        matmul_of_layer(as_matrix([guarded]), guarded_activations, 0, count, out, 0, 2, scratch)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_embed(kind):
    @njit
    def embed_all(table, out, group_size):
        for token in range(len(out)):
            ops.embed(layer_of(table, 0), token, out[token], group_size)

    cols = 96 if kind.startswith("int8") else 89
    weight, out = weight_of(floats(0, 37, cols), kind), np.zeros((37, cols), np.float32)
    embed_all(as_matrix([weight]), out, getattr(weight, "group_size", 0))
    np.testing.assert_array_equal(out, reference.embed(weight, np.arange(37)))


OUT_OF_RANGE = """
import numpy as np
from llamalet.kernels import ops
from llamalet.kernels.jit import kernel

@kernel
def rmsnorm(x, out):
    ops.rmsnorm(x, x, np.float32(1e-5), out)

rmsnorm(np.ones(8, np.float32), np.ones(7, np.float32))
"""


@pytest.mark.compiles
def test_bounds_checking_would_see_an_index_out_of_range(tmp_path):
    """`make test-bounds` runs these tests with it; here is what it finds in a kernel whose output is too short."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "XDG_CACHE_HOME": str(tmp_path)}
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", OUT_OF_RANGE], env=environment, cwd=root, capture_output=True, text=True
    )
    assert result.returncode and "IndexError" in result.stderr


@given(st.integers(1, 300), seeds)
@settings(deadline=None, max_examples=50)
def test_rmsnorm(dim, seed):
    x, weight = 3 * floats(seed, dim), floats(seed + 1, dim)
    out = np.empty(dim, np.float32)
    rmsnorm(x, weight, np.float32(1e-5), out)
    np.testing.assert_allclose(out, reference.rmsnorm(x, weight, 1e-5), rtol=1e-5)


@pytest.mark.parametrize("gap", [0, 4, 13, 64])
def test_arrays_that_nearly_touch_round_alike(gap):
    """LLVM compiles loops twice, for arrays far apart and close together; another order of sums made them differ."""
    memory, far = np.zeros(200, np.float32), np.zeros(48, np.float32)
    x, near = memory[:48], memory[48 + gap : 96 + gap]
    x[:] = floats(0, 48)
    weight = floats(1, 48)
    rmsnorm(x, weight, np.float32(1e-5), far)
    rmsnorm(x, weight, np.float32(1e-5), near)
    np.testing.assert_array_equal(near, far)
    for values in (near, far):
        add_rows(values[None], x[None], 0, 1)
    np.testing.assert_array_equal(near, far)


@given(st.integers(1, 5), st.integers(1, 40), seeds)
@settings(deadline=None, max_examples=50)
def test_rope(n_heads, half, seed):
    x, angles = floats(seed, n_heads, 1, 2 * half), floats(seed + 1, half)
    out = x.flatten()
    rope(out, np.cos(angles), np.sin(angles))
    expected = reference.rope(x, np.cos(angles)[None], np.sin(angles)[None])
    np.testing.assert_allclose(out, expected.flatten(), atol=1e-6)


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


@given(st.integers(1, 100), st.floats(0.1, 200), seeds)
@settings(deadline=None, max_examples=50)
def test_swiglu(width, spread, seed):
    gate, up = spread * floats(seed, width), floats(seed + 1, width)
    expected = reference.swiglu(gate, up)
    swiglu(gate, up)
    np.testing.assert_allclose(gate, expected, rtol=1e-5, atol=1e-34)


@pytest.mark.simd_path
def test_no_kernel_hides_a_nan():
    nan = np.float32(np.nan)
    x = floats(0, 64)
    x[50] = nan
    out = np.zeros(64, np.float32)
    rmsnorm(x, np.ones(64, np.float32), np.float32(1e-5), out)
    assert np.isnan(out).all()
    gate = x.copy()
    swiglu(gate, np.ones(64, np.float32))
    assert np.isnan(gate[50]) and np.isfinite(gate[49])
    for kind in KINDS:
        weight, result = weight_of(floats(4, 3, 64), kind), np.zeros((1, 3), np.float32)
        activations = activations_of(x[None], weight, kind)
        matmul_of_layer(as_matrix([weight]), activations, 0, 1, result, 0, 1, scratch_for(64))
        assert np.isnan(result).all()
