import numpy as np
import pytest
from toy import SMALL_MODELS, random_tensors, toy_data, toy_tokenizer

import export
from llamalet import calibration, model_file, tokenizer
from llamalet.errors import ConfigError, DataError, NonFiniteError, TokenizerError
from llamalet.model_file import quantize
from llamalet.model_file.quantize import dequantize
from llamalet.reference import forward
from llamalet.runtime import Model

DTYPES = ("q8", "q4")
TIED, UNTIED = SMALL_MODELS["gqa-tied"], SMALL_MODELS["mha-untied"]


def correlated_inputs(cols: int, n: int = 400) -> np.ndarray:
    """Inputs of a few dimensions and some noise, as hidden states are."""
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((n, cols // 4)) @ rng.standard_normal((cols // 4, cols))
    return inputs + 0.3 * rng.standard_normal((n, cols))


def random_layer(rows: int, cols: int) -> np.ndarray:
    return 0.05 * np.random.default_rng(2).standard_normal((rows, cols)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [64, 100])  # the last group of 100 is short
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("refinements", [0, 3])
def test_outputs_are_closer_than_with_plain_rounding(dtype, cols, per_row, refinements, monkeypatch):
    monkeypatch.setattr(calibration, "REFINEMENTS", refinements)
    weights, inputs = random_layer(40, cols), correlated_inputs(cols)
    hessian = inputs.T @ inputs
    packed = calibration.gptq(weights.astype(np.float64), np.stack([hessian] * 40) if per_row else hessian, dtype)
    plain = quantize.ENCODINGS[dtype].encode(weights)
    assert (packed.bits, packed.group_size) == (plain.bits, plain.group_size)
    assert packed.values.shape == plain.values.shape and packed.scales.shape == plain.scales.shape
    errors = [np.sum((inputs @ (dequantize(form) - weights).T) ** 2) for form in (packed, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_independent_inputs_give_plain_rounding(dtype, monkeypatch):
    monkeypatch.setattr(calibration, "REFINEMENTS", 0)
    weights = random_layer(40, 100)
    packed = calibration.gptq(weights.astype(np.float64), 7 * np.eye(100), dtype)
    plain = quantize.ENCODINGS[dtype].encode(weights)
    np.testing.assert_array_equal(packed.values, plain.values)
    np.testing.assert_array_equal(packed.scales, plain.scales)


def test_a_hessian_per_row_is_the_same_as_row_by_row():
    weights = random_layer(16, 64).astype(np.float64)
    hessians = np.stack([x.T @ x for x in np.random.default_rng(3).standard_normal((16, 80, 64))])
    together = dequantize(calibration.gptq(weights, hessians, "q4"))
    for row in range(16):
        alone = dequantize(calibration.gptq(weights[row : row + 1], hessians[row], "q4"))
        np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_refining_never_costs(dtype, monkeypatch):
    weights, inputs = random_layer(40, 100), correlated_inputs(100)
    hessian, costs = calibration.damped(inputs.T @ inputs), []
    for passes in range(4):
        monkeypatch.setattr(calibration, "REFINEMENTS", passes)
        error = dequantize(calibration.gptq(weights.astype(np.float64), inputs.T @ inputs, dtype)) - weights
        costs.append(np.sum(error @ hessian * error))
    assert costs[1] < costs[0] and costs[3] <= costs[2] <= costs[1]


def test_zeros_stay_zeros():
    packed = calibration.gptq(np.zeros((16, 64)), np.zeros((64, 64)), "q4")
    assert not dequantize(packed).any()


def test_a_fitted_matrix_makes_good_what_its_inputs_lost():
    weights, inputs = random_layer(40, 64), correlated_inputs(64).astype(np.float32)
    noisy = inputs + 0.5 * np.random.default_rng(5).standard_normal(inputs.shape).astype(np.float32)
    wanted = inputs @ weights.T
    fitted = calibration.fit(weights, noisy, wanted, "q8")
    errors = [np.sum((noisy @ dequantize(w).T - wanted) ** 2) for w in (fitted, quantize.pack_q8(weights))]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("limit", [0, calibration.MAX_ROW_WORK])
def test_a_model_predicts_nearly_the_same(config, limit, monkeypatch):
    monkeypatch.setattr(calibration, "MAX_ROW_WORK", limit)
    tensors = random_tensors(config, scale=0.3)
    rng = np.random.default_rng(4)
    likely = rng.integers(0, config.vocab_size, 40)  # a text with few words
    texts, others = rng.choice(likely, (40, 32)), rng.choice(likely, (10, 32))
    expected = forward(tensors, config, others)
    plain = {n: dequantize(quantize.pack_q4(w)) if w.ndim == 2 else w for n, w in tensors.items()}
    calibrated = {n: w[0 : w.shape[0]] for n, w in calibration.calibrate(config, tensors, "q4", texts).items()}
    errors = [np.sqrt(np.mean((forward(w, config, others) - expected) ** 2)) for w in (calibrated, plain)]
    assert errors[0] < 0.9 * errors[1]
    for name in ("norm", "layers.1.ffn_norm"):
        np.testing.assert_array_equal(calibrated[name], tensors[name])


def test_the_output_counts_where_a_token_is_one_of_several():
    normed = np.eye(3, dtype=np.float32)
    output = np.array([[30, 0, 0], [0, 0, 0], [0, 0, -30]], np.float32)  # the first position is certain
    hessian = calibration.output_hessian(normed, output, per_row=True)
    np.testing.assert_allclose(
        np.diagonal(hessian, axis1=1, axis2=2)[:2], [[0, 2 / 9, 0.25], [0, 2 / 9, 0.25]], atol=1e-6
    )
    np.testing.assert_allclose(
        calibration.output_hessian(normed, output, per_row=False), hessian.sum(axis=0), atol=1e-6
    )


def test_a_weight_that_is_not_finite_is_named():
    tensors = random_tensors(TIED)
    tensors["layers.1.attention.wk"][3, 3] = np.nan
    with pytest.raises(NonFiniteError, match=r"layers\.1\.attention\.wk"):
        calibration.calibrate(TIED, tensors, "q4", np.zeros((2, 8), int))


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with a model, its tokenizer, and a text."""
    monkeypatch.chdir(tmp_path)
    tensors = random_tensors(TIED, scale=0.3)
    model_file.write("model.bin", 1, TIED, tensors)
    tokenizer.write_bin(tmp_path / "model.tokenizer.bin", toy_tokenizer(), TIED.vocab_size)
    (tmp_path / "text.txt").write_text("a band and a bandanna eat bananas. " * 200)
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_file_is_an_ordinary_one_and_proved(model, capsys, dtype):
    assert export.main(["out.bin", "--bin=model.bin", f"--dtype={dtype}", "--calibrate=text.txt"]) == 0
    shown = capsys.readouterr().out
    assert f"note: its weights were rounded to {dtype} for" in shown and "of text.txt" in shown
    assert "is proved" in shown
    assert export.main(["plain.bin", "--bin=model.bin", f"--dtype={dtype}"]) == 0
    found, plain = model_file.read("out.bin"), model_file.read("plain.bin")
    assert found.path.stat().st_size == plain.path.stat().st_size
    assert (
        found.tensors["layers.0.attention.wq"].values.tolist() != plain.tensors["layers.0.attention.wq"].values.tolist()
    )
    assert Model.load("out.bin", backend="numpy").logits([1, 2]).shape == (2, TIED.vocab_size)
    assert export.main(["again.bin", "--bin=out.bin", f"--dtype={dtype}", "--no-check"]) == 0
    for name, tensor in found.tensors.items():  # rounding twice changes nothing
        np.testing.assert_array_equal(dequantize(model_file.read("again.bin").tensors[name]), dequantize(tensor))


@pytest.mark.parametrize("name", ["stories.jsonl", "data"])
def test_other_data(model, capsys, name):
    (model / "stories.jsonl").write_text('{"text": "a band and a bandanna eat bananas. "}\n' * 200)
    toy_data(model / "data", TIED.vocab_size, n_tokens=1200)
    assert export.main(["out.bin", "--bin=model.bin", "--dtype=q4", f"--calibrate={name}"]) == 0
    assert f"of {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ("gone.txt", DataError, "gone.txt: no such file or folder"),
        ("empty.txt", DataError, "empty.txt: 0 tokens; calibration needs 1,024 or more"),
        ("short.txt", DataError, "short.txt: 4 tokens; calibration needs 1,024 or more"),
        ("latin.txt", DataError, "latin.txt, line 1: byte 3"),
        ("folder", DataError, "meta.json"),
        ("foreign", DataError, "foreign: was prepared with another tokenizer than the model's"),
        ("other", DataError, "other: was prepared with another tokenizer than the model's"),
        ("short", DataError, "short: 700 tokens; calibration needs"),
    ],
)
def test_wrong_data_is_refused(model, data, error, words):
    (model / "empty.txt").write_text("")
    (model / "short.txt").write_text("a band")
    (model / "latin.txt").write_bytes(b"na\xefve text")
    (model / "folder").mkdir()
    toy_data(model / "foreign", 320)
    toy_data(model / "short", TIED.vocab_size)
    meta = toy_data(model / "other", TIED.vocab_size, n_tokens=1200) / "meta.json"
    meta.write_text(meta.read_text().replace(toy_tokenizer().sha256, "0" * 64))
    with pytest.raises(error) as caught:
        export.main(["out.bin", "--bin=model.bin", "--dtype=q4", f"--calibrate={data}"])
    assert words in str(caught.value) and not (model / "out.bin").exists()


def test_text_needs_a_tokenizer(model):
    (model / "model.tokenizer.bin").unlink()
    with pytest.raises(TokenizerError, match="text.txt: the model has no tokenizer"):
        export.main(["out.bin", "--bin=model.bin", "--dtype=q4", "--calibrate=text.txt"])


@pytest.mark.parametrize(
    "argv",
    [
        ["m.bin", "--dtype=f32"], ["m.bin", "--dtype=bf16"], ["m.bin"], ["m.bin", "--version=2"],
        ["m.gguf", "--dtype=q4_0"], ["hf"],
    ],
)  # fmt: skip
def test_only_q8_and_q4_are_calibrated(argv):
    with pytest.raises(ConfigError, match="calibrate=text.txt: .*add --dtype q4"):
        export.main([*argv, "--bin=model.bin", "--calibrate=text.txt"])
