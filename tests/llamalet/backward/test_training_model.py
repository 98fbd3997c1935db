import gc
import threading
import time
import tracemalloc

import numpy as np
import pytest
from gradient_cases import MODELS, batch
from toy import random_tensors

from llamalet.backward import head, reference, workspace
from llamalet.backward.dropout import NO_DROPOUT, Dropout
from llamalet.backward.runner import Runner
from llamalet.backward.training_model import TrainingModel
from llamalet.config import IGNORED, ModelConfig
from llamalet.errors import ConfigError, FormatError, UsageError
from llamalet.kernels import bfloat16
from llamalet.kernels.threads import DONE, TICKET, Team, new_words
from llamalet.model_file.quantize import from_bfloat16, to_bfloat16

needs_bfloat16 = pytest.mark.skipif(bfloat16.instructions() is None, reason="bfloat16 does not pay here")
NAN_BITS = 0x7FC0
ROUNDED = [False, pytest.param(True, marks=needs_bfloat16, id="bfloat16")]


def new_model(config, weights, n_threads=2, T=9, rounded=False):
    return TrainingModel(config, weights, batch_size=2, n_positions=T, n_threads=n_threads, rounded=rounded)


def differences(found, expected):
    return {name: np.abs(found[name] - g).max() / np.abs(g).max() for name, g in expected.items()}


def spoil(model):
    """Fill the memory of head and attention with NaNs, but for the zeros that fill operands up."""
    head, attention = model._space.head, model._space.attention
    for array in (*head[1:], *attention):
        array.fill({"f": np.nan, "u": NAN_BITS * (1 if array.itemsize == 2 else 0x10001)}[array.dtype.kind])
    if head.d_logits.dtype == np.uint16:
        head.d_logits[:, model.config.vocab_size :] = 0
        for array in (attention.weights, attention.d_scores):
            array[..., attention.scores.shape[-1] :] = 0
        attention.d_mixed[..., model.config.head_dim :] = 0


@pytest.mark.parametrize("T", [9, 40])
@pytest.mark.parametrize("dropout", [NO_DROPOUT, Dropout(0.2, seed=7)], ids=["whole", "dropout"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_reference(name, dropout, T):
    config = MODELS[name]
    weights, (tokens, targets) = random_tensors(config), batch(config, T=T)
    expected_loss, expected = reference.loss_and_gradients(weights, config, tokens, targets, dropout)
    model = new_model(config, weights, T=T)
    spoil(model)
    loss = model.loss_and_gradients(tokens, targets, dropout)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert max(differences(model.gradients, expected).values()) <= 1e-5


class Rounded(np.ndarray):
    """A float64 array whose products round both sides to bfloat16."""

    def __matmul__(self, other):
        return (in_bfloat16(self) @ in_bfloat16(other)).view(Rounded)

    def __rmatmul__(self, other):
        return (in_bfloat16(other) @ in_bfloat16(self)).view(Rounded)


def in_bfloat16(x):
    return from_bfloat16(to_bfloat16(np.asarray(x, np.float32))).astype(np.float64)


ODD = ModelConfig.create(
    dim=27, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=38, hidden_dim=71, vocab_size=3201, max_seq_len=19, tied=False
)  # fmt: skip


@needs_bfloat16
@pytest.mark.parametrize("dropout", [NO_DROPOUT, Dropout(0.2, seed=7)], ids=["whole", "dropout"])
@pytest.mark.parametrize("name", [*MODELS, "odd"])
def test_gradients_in_bfloat16_are_those_of_the_reference_with_rounded_products(name, dropout):
    config, T = (ODD, 19) if name == "odd" else (MODELS[name], 40)
    weights, ids = random_tensors(config), batch(config, T=T)
    exact = {key: weight.astype(np.float64).view(Rounded) for key, weight in weights.items()}
    expected_loss, expected = reference.loss_and_gradients(exact, config, *ids, dropout)
    model = new_model(config, weights, T=T, rounded=True)
    spoil(model)
    assert model.loss_and_gradients(*ids, dropout) == pytest.approx(float(expected_loss), abs=1e-3)
    for key, gradient in expected.items():  # a sum in another order may round to the next number
        off = model.gradients[key] - np.asarray(gradient)
        assert np.sqrt(np.mean(off**2)) <= 0.012 * np.sqrt(np.mean(np.asarray(gradient) ** 2)), key


class HalvingRunner(Runner):
    """Of each op's blocks, lets thread 1 compute the second half, and then thread 0 the first."""

    def run(self, op, n_blocks, *arguments):
        half = n_blocks // 2
        words = new_words()
        words[TICKET] = words[DONE] = half  # as if the first half were taken and done
        op(*arguments, Team(words, np.array([n_blocks, 0]), 0, 1))
        if half:
            op(*arguments, Team(new_words(), np.array([half, 0]), 0, 0))


@pytest.mark.parametrize("rounded", ROUNDED)
@pytest.mark.parametrize("name", ["gqa-tied", "mha-untied"])
def test_the_bits_do_not_depend_on_the_number_of_threads_and_on_who_computes_what(name, rounded):
    config = MODELS[name]
    weights, (tokens, targets) = random_tensors(config), batch(config, T=32)
    one, two, halves = (new_model(config, weights, n_threads=n, T=32, rounded=rounded) for n in (1, 2, 2))
    halves.runner = HalvingRunner(2, halves._space.attention.edges)
    dropout = Dropout(0.1, seed=3)
    for _ in range(3):  # helpers are there from the second job on
        loss = one.loss_and_gradients(tokens, targets, dropout)
        for other in (two, halves):
            assert other.loss_and_gradients(tokens, targets, dropout) == loss
            assert all(np.array_equal(one.gradients[key], other.gradients[key]) for key in weights)


@pytest.mark.parametrize("name", ["gqa-tied", "mha-untied"])
def test_batches_add_up_to_a_step(name):
    config = MODELS[name]
    weights = random_tensors(config)
    batches = [batch(config, ignored=0, seed=seed) for seed in range(3)]
    model = new_model(config, weights)
    losses = [model.loss_and_gradients(*ids, share=1 / len(batches), add=at > 0) for at, ids in enumerate(batches)]
    together = [np.concatenate(ids) for ids in zip(*batches, strict=True)]
    loss, expected = reference.loss_and_gradients(weights, config, *together)
    assert np.mean(losses) == pytest.approx(loss, abs=1e-5)
    assert max(differences(model.gradients, expected).values()) <= 1e-5


def test_logits_in_chunks_change_the_order_of_a_sum_alone(monkeypatch):
    config = MODELS["gqa-untied"]
    weights, (tokens, targets) = random_tensors(config), batch(config, T=32)
    whole = new_model(config, weights, T=32)
    monkeypatch.setattr(head, "LOGITS_BYTES", 7 * 4 * config.vocab_size)
    chunked = new_model(config, weights, T=32)
    losses = [model.loss_and_gradients(tokens, targets) for model in (whole, chunked)]
    assert losses[0] == losses[1]
    for key, gradient in whole.gradients.items():
        if key == "output":
            np.testing.assert_allclose(chunked.gradients[key], gradient, atol=1e-6 * np.abs(gradient).max())
        else:
            np.testing.assert_array_equal(chunked.gradients[key], gradient)


def test_without_a_counted_target_the_loss_is_nan():
    config = MODELS["mqa-tied"]
    tokens, targets = batch(config)
    model = new_model(config, random_tensors(config))
    model.loss_and_gradients(tokens, targets)
    assert np.isnan(model.loss_and_gradients(tokens, np.full_like(targets, IGNORED)))
    assert all(not gradient.any() for gradient in model.gradients.values())


def test_a_loss_that_is_not_finite_shows():
    config = MODELS["mha-untied"]
    weights, ids = random_tensors(config), batch(config)
    weights["layers.0.feed_forward.w1"][0, 0] = np.nan
    assert np.isnan(new_model(config, weights).loss_and_gradients(*ids))


def test_the_memory_is_what_was_foretold():
    config = MODELS["gqa-untied"]
    sizes = config, 2, 32, 2
    tracemalloc.start()
    space = workspace.new_workspace(*sizes, rounded=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak == pytest.approx(workspace.n_bytes(*sizes, rounded=False), abs=100_000)
    assert space.x.ctypes.data % 64 == space.layers[1].gate.ctypes.data % 64 == 0


@pytest.mark.parametrize(
    ("tokens", "targets", "words"),
    [
        (np.zeros((1, 9), int), np.zeros((1, 9), int), "a batch of shape"),
        (np.full((2, 9), 300), np.zeros((2, 9), int), "token 300: must be from 0 to 299"),
        (np.full((2, 9), -1), np.zeros((2, 9), int), "token -1: must be from 0"),
        (np.zeros((2, 9), int), np.full((2, 9), -2), "token -2: must be from -1"),
    ],
)
def test_batches_that_the_kernels_could_not_take_are_refused(tokens, targets, words):
    model = new_model(MODELS["gqa-tied"], random_tensors(MODELS["gqa-tied"]))
    with pytest.raises(UsageError, match=words):
        model.loss_and_gradients(tokens, targets)


@pytest.mark.parametrize("change", [{"norm": np.ones(1, np.float32)}, {"layers.7.ffn_norm": np.ones(64, np.float32)}])
def test_weights_of_another_shape_are_refused(change):
    config = MODELS["gqa-tied"]
    with pytest.raises(FormatError, match=next(iter(change))):
        new_model(config, random_tensors(config) | change)


@pytest.mark.parametrize("batch_size", [0, 20_000])
def test_batches_beyond_the_threads_counters_are_refused(batch_size):
    with pytest.raises(ConfigError, match=f"batch_size={batch_size}"):
        workspace.new_workspace(MODELS["gqa-tied"], batch_size, 4, 1, rounded=False)


def test_dropped_models_leave_no_threads():
    config, before = MODELS["mqa-tied"], threading.active_count()
    for _ in range(3):
        model = new_model(config, random_tensors(config))
        model.loss_and_gradients(*batch(config))
        del model
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
