import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SMALL_MODELS, toy_model

from benchmarks import quantization
from llamalet.errors import DataError, FormatError
from llamalet.model_file import quantize
from llamalet.model_file.quantize import (
    Packed,
    Quantized,
    dequantize,
    dequantize_rows,
    from_bfloat16,
    pack,
    pack_q4,
    pack_q8,
    to_bfloat16,
    unpack,
)

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 150))
SEEDS = st.integers(0, 2**32 - 1)
PACKERS = {"q8": pack_q8, "q4": pack_q4}
# A float32 product rounds by this share of its result, and so does each of the few operations behind a scale.
ROUNDING = 2.0**-22


def random_weights(rows: int, cols: int, seed: int, magnitude: float = -2) -> np.ndarray:
    """Normal weights, a few of them outliers, one group of zeros."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, cols)) * 10.0**magnitude
    weights *= np.where(rng.random((rows, cols)) < 0.02, 10, 1)
    weights[0, :32] = 0
    return weights.astype(np.float32)


def by_group(weights: np.ndarray, group_size: int) -> np.ndarray:
    """Split rows into groups, the last one filled up with zeros: (rows, groups, group_size)."""
    rows, cols = weights.shape
    return np.pad(weights, ((0, 0), (0, -cols % group_size))).reshape(rows, -1, group_size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([16, 32, 64]), SEEDS, st.floats(-30, 8))
def test_error_of_int8_groups_is_at_most_half_a_step(rows, groups, group_size, seed, magnitude):
    weights = random_weights(rows, groups * group_size, seed, magnitude)
    weights[0, :group_size] = 0
    got = quantize.quantize(weights, group_size)
    error = np.abs(by_group(dequantize(got).astype(np.float64) - weights, group_size))
    # Half a step, and the roundings of the scale and of the quotient (each 2^-24 of up to 127 steps).
    assert (error <= got.scales[:, :, None] * (0.5 + 127 * ROUNDING)).all()
    assert np.abs(got.values).max() <= 127 and not got.values[0, :group_size].any()


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.floats(-30, 8))
def test_error_of_q8_is_at_most_half_a_step(size, seed, magnitude):
    weights = random_weights(*size, seed, magnitude)
    packed = pack_q8(weights)
    values, scales = unpack(packed)
    largest = np.abs(by_group(weights, 64)).max(axis=2)
    assert (scales >= largest * (1 - ROUNDING) / 127).all() and (scales <= largest / 127 * (1 + 2.0**-7)).all()
    error = np.abs(by_group(dequantize(packed).astype(np.float64) - weights, 64))
    assert (error <= scales[:, :, None] * (0.5 + 127 * ROUNDING)).all()
    assert values.min() >= -127 and not values[0, :32].any()


def q4_0(weights: np.ndarray) -> np.ndarray:
    """What Q4_0's rule makes of weights with a scale in bfloat16, as float64 groups (rows, groups, 32)."""
    groups = by_group(weights, 32).astype(np.float64)
    at = np.abs(groups).argmax(axis=2)[..., None]
    scale = from_bfloat16(to_bfloat16(np.take_along_axis(groups, at, axis=2).astype(np.float32) / -8)).astype(float)
    return np.clip(np.rint(groups / np.where(scale == 0, 1, scale)), -8, 7) * scale


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.floats(-15, 8))
def test_squared_error_of_q4_is_at_most_that_of_q4_0_s_rule(size, seed, magnitude):
    weights = random_weights(*size, seed, magnitude)
    packed = pack_q4(weights)
    expected = ((q4_0(weights) - by_group(weights, 32)) ** 2).sum(axis=2)
    error = (by_group(dequantize(packed).astype(np.float64) - weights, 32) ** 2).sum(axis=2)
    assert (error <= expected * (1 + 1e-4) + 1e-12 * (weights.astype(float) ** 2).mean()).all()
    values, _ = unpack(packed)
    assert values.min() >= -8 and values.max() <= 7 and not values[0, :32].any()


def test_q4_finds_nearly_the_best_of_all_scales():
    weights = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    groups = by_group(weights, 32)
    # Every bfloat16 of either sign from 1/4 of the largest weight down to less than 1/16 of it.
    top = to_bfloat16(np.abs(groups).max(axis=2) / 4)
    least = np.full(top.shape, np.inf, np.float32)
    for step in range(2 * 128 + 1):
        for sign in (-1, 1):
            scale = sign * from_bfloat16((top - step).astype(np.uint16))[..., None]
            rounded = np.clip(np.rint(groups / scale), -8, 7) * scale
            least = np.minimum(least, ((rounded - groups) ** 2).sum(axis=2))
    error = ((dequantize(pack_q4(weights)) - weights) ** 2).sum()
    assert least.sum() <= error <= 1.005 * least.sum()


def test_q4_beats_gguf_s_q4_0_by_a_tenth():
    gguf = pytest.importorskip("gguf")
    weights = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
    error = ((dequantize(pack_q4(weights)) - weights) ** 2).sum()
    assert error < 0.9 * ((expected - weights) ** 2).sum()


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.sampled_from(sorted(PACKERS)))
def test_layout_is_what_packed_says(size, seed, dtype):
    (rows, cols), packed = size, PACKERS[dtype](random_weights(*size, seed))
    values, scales = unpack(packed)
    assert values.dtype == np.int8 and values.shape == size and scales.dtype == np.float32
    bits, zero = (8, 128) if dtype == "q8" else (4, 8)
    assert packed.bits == bits
    shapes = quantize.packed_shapes(rows, cols, bits, packed.group_size)
    assert (packed.values.shape, packed.scales.shape) == shapes
    for row in range(shapes[0][0] * 16):
        for col in range(shapes[0][1] * 8):
            b, r, c, h, k = row // 16, row % 16, col // 8, col % 8 // 4, col % 4
            if bits == 8:
                found = packed.values[b, c, 64 * h + 4 * r + k]
            else:
                found = packed.values[b, c, 4 * r + k] >> 4 * h & 15
            assert found == zero + (int(values[row, col]) if row < rows and col < cols else 0)
        expected = scales[row] if row < rows else np.zeros_like(scales[0])
        np.testing.assert_array_equal(from_bfloat16(packed.scales[row // 16, :, row % 16]), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([8, 16, 32, 64]), SEEDS)
def test_pack_and_unpack_are_inverse(rows, groups, group_size, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, (rows, groups * group_size)).astype(np.int8)
    quantized = Quantized(values, rng.random((rows, groups), np.float32))
    packed = pack(quantized)
    assert packed.scales.dtype == np.float32 and packed.group_size == group_size
    found_values, found_scales = unpack(packed)
    np.testing.assert_array_equal(found_values, values)
    np.testing.assert_array_equal(found_scales, quantized.scales)
    np.testing.assert_array_equal(dequantize(packed), dequantize(quantized))


def test_groups_that_cut_a_chunk_are_refused():
    with pytest.raises(FormatError, match="groups of 4.*--backend=numpy"):
        pack(quantize.quantize(random_weights(2, 64, seed=0), 4))


def test_packing_in_pieces_changes_nothing(monkeypatch):
    weights = random_weights(100, 70, seed=3)
    quantized = quantize.quantize(weights[:, :64], 16)
    whole = [pack_q8(weights), pack_q4(weights), pack(quantized)]
    monkeypatch.setattr(quantize, "BLOCK_WEIGHTS", 1)
    for expected, found in zip(whole, [pack_q8(weights), pack_q4(weights), pack(quantized)], strict=True):
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_array_equal(found.scales, expected.scales)


@pytest.mark.parametrize("dtype", PACKERS)
def test_some_rows_are_those_of_all(dtype):
    packed: Packed = PACKERS[dtype](random_weights(37, 70, seed=5))
    rows = np.array([36, 0, 17, 17, 16])
    np.testing.assert_array_equal(dequantize_rows(packed, rows), dequantize(packed)[rows])


@pytest.mark.parametrize("dtype", PACKERS)
@pytest.mark.parametrize("largest", [3e38, 1e-37, 1e-44])
def test_extreme_weights_stay_finite(dtype, largest):
    weights = np.linspace(-largest, largest, 64).astype(np.float32)[None]
    found = dequantize(PACKERS[dtype](weights))
    assert np.isfinite(found).all() and np.abs(found).max() <= 1.01 * largest + 2.0**-126


@given(st.floats(width=32))
def test_bfloat16_is_the_nearest(value):
    x = np.array([value], np.float32)
    bits = to_bfloat16(x)
    found = from_bfloat16(bits)
    if np.isnan(value):
        assert np.isnan(found[0])
    elif np.isinf(found[0]):
        assert abs(value) >= 2.0**128 * (1 - 2.0**-9) and np.sign(found[0]) == np.sign(value)
    else:
        step = max(2.0 ** (np.frexp(np.float64(value))[1] - 8), 2.0**-133)
        distance = abs(float(found[0]) - value)
        assert distance < step / 2 or (distance == step / 2 and bits[0] % 2 == 0)


def test_bfloat16_matches_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(x), expected)
    assert to_bfloat16(np.array([1.0, np.nan, -np.inf], np.float32)).tolist() == [0x3F80, 0x7FC0, 0xFF80]


def test_dequantize_takes_every_form():
    weights = random_weights(20, 64, seed=1)
    assert dequantize(weights) is weights
    np.testing.assert_array_equal(dequantize(to_bfloat16(weights)), from_bfloat16(to_bfloat16(weights)))
    np.testing.assert_allclose(dequantize(to_bfloat16(weights)), weights, rtol=2.0**-8)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("cols", [64, 172])
def test_through_gguf_is_what_gguf_reads(kind, cols):
    """The benchmark takes llama.cpp's blocks apart by itself."""
    gguf = pytest.importorskip("gguf")
    weights = random_weights(5, cols, seed=0)
    padded = np.pad(weights, ((0, 0), (0, -cols % 32)))
    blocks = gguf.quants.quantize(padded, gguf.GGMLQuantizationType[kind])
    found = quantization.through_gguf(weights, kind)
    assert found.group_size == 32
    np.testing.assert_array_equal(dequantize(found), gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


def test_quantization_s_table(tmp_path, capsys):
    config = SMALL_MODELS["gqa-tied"]
    path = toy_model(tmp_path, config)
    stories = tmp_path / "stories.jsonl"
    stories.write_text('{"text": " a band and a tent."}\n{"text": " b"}\n')
    assert quantization.main([str(path), f"--text={stories}", "--stories=5"]) == 0
    heading, columns, *rows = capsys.readouterr().out.splitlines()
    assert "2 stories" in heading and columns.startswith("dtype")
    figures = {row.split()[0]: row.split()[1:] for row in rows}
    assert [figures[name][0] for name in ("f32", "bf16", "q8", "q4")] == ["32.00", "16.00", "8.27", "4.51"]
    assert figures["f32"][2] == figures["f32"][4] != figures["q4"][2] and figures["f32"][3] == "+0.00%"
    stories.write_text("no json")
    with pytest.raises(DataError, match="stories.jsonl"):
        quantization.main([str(path), f"--text={stories}"])


def test_q8_costs_half_a_percent_at_most_and_q4_no_more_than_q4_0(shared_data, capsys):
    pytest.importorskip("gguf")
    text, tokenizer = shared_data / "tinystories-sample.jsonl", shared_data / "tok512.bin"
    model = shared_data / "stories260K.bin"
    assert quantization.main([str(model), f"--tokenizer={tokenizer}", f"--text={text}", "--stories=5"]) == 0
    bits = {row.split()[0]: float(row.split()[5]) for row in capsys.readouterr().out.splitlines()[2:]}
    assert bits["q8"] <= 1.005 * bits["f32"]
    assert bits["q4"] <= bits["Q4_0"]


@pytest.mark.parametrize("per_weight", [False, True])
def test_a_q4_scale_is_chosen_for_the_weights_that_matter(per_weight):
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((200, 32)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal((200, 32) if per_weight else 32)).astype(np.float32)
    costs = []
    for weighed in (importance, None):
        values, bits = quantize.round_q4(groups, weighed)
        costs.append(np.sum(importance * (values * from_bfloat16(bits)[:, None] - groups) ** 2))
    assert costs[0] < 0.9 * costs[1]
    values, bits = quantize.round_q4(groups, np.ones(32, np.float32))
    plain = quantize.round_q4(groups)
    np.testing.assert_allclose(
        values * from_bfloat16(bits)[:, None], plain[0] * from_bfloat16(plain[1])[:, None], atol=1e-2
    )
