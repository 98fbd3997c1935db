import dataclasses

import numpy as np
import pytest
import torch
from gradient_cases import MODELS, batch
from toy import random_tensors

from llamalet import reference as runtime_reference
from llamalet.backward import reference
from llamalet.backward.dropout import NO_DROPOUT, Dropout
from llamalet.config import IGNORED
from training.weights import load_model, to_state_dict


def gradients_of_torch(weights, config, tokens, targets, dtype=torch.float32):
    model = load_model(config, to_state_dict(weights)).to(dtype)
    loss = model(torch.from_numpy(tokens), torch.from_numpy(targets))
    loss.backward()
    grads = {name.removesuffix(".weight"): parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return float(loss.detach()), grads


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_torch(name):
    config = MODELS[name]
    weights, (tokens, targets) = random_tensors(config), batch(config)
    loss, found = reference.loss_and_gradients(weights, config, tokens, targets)
    expected_loss, expected = gradients_of_torch(weights, config, tokens, targets)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert found.keys() == expected.keys() == weights.keys()
    for tensor, gradient in expected.items():
        assert found[tensor].dtype == np.float32
        assert np.abs(found[tensor] - gradient).max() <= 1e-5 * np.abs(gradient).max(), tensor


@pytest.mark.parametrize("dropout", [NO_DROPOUT, Dropout(0.2, seed=7)], ids=["whole", "dropout"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_slopes_of_the_loss(name, dropout):
    config = dataclasses.replace(MODELS[name], n_layers=1)
    weights = {key: tensor.astype(np.float64) for key, tensor in random_tensors(config).items()}
    tokens, targets = batch(config, T=5)
    _, gradients = reference.loss_and_gradients(weights, config, tokens, targets, dropout)

    def loss():
        return reference.cross_entropy(reference.forward(weights, config, tokens, dropout).logits, targets)

    rng, step = np.random.default_rng(0), 1e-4
    for key, tensor in weights.items():
        flat, slopes, chosen = tensor.reshape(-1), [], rng.choice(tensor.size, min(50, tensor.size), replace=False)
        for at in chosen:
            value, losses = flat[at], []
            for offset in (-step, step):
                flat[at] = value + offset
                losses.append(loss())
            flat[at] = value
            slopes.append((losses[1] - losses[0]) / (2 * step))
        difference = np.abs(slopes - gradients[key].reshape(-1)[chosen]).max()
        assert difference <= 1e-6 * np.abs(gradients[key]).max(), key


def test_forward_is_that_of_the_runtime():
    config = MODELS["gqa-untied"]
    weights, (tokens, _) = random_tensors(config), batch(config)
    found = reference.forward(weights, config, tokens).logits
    np.testing.assert_allclose(found, runtime_reference.forward(weights, config, tokens), atol=1e-5)


def test_without_a_counted_target_the_loss_is_nan_and_nothing_changes():
    config = MODELS["mqa-tied"]
    tokens, targets = batch(config)
    loss, gradients = reference.loss_and_gradients(
        random_tensors(config), config, tokens, np.full_like(targets, IGNORED)
    )
    assert np.isnan(loss)
    assert all(not gradient.any() for gradient in gradients.values())


def test_steep_activations_stay_finite():
    gate = np.array([-1e4, -90.0, 0.0, 90.0, 1e4], np.float32)
    d_gate, d_up = reference.swiglu_backward(np.ones_like(gate), gate, np.ones_like(gate))
    np.testing.assert_allclose(d_gate, [0, 0, 0.5, 1, 1], atol=1e-6)
    np.testing.assert_allclose(d_up, [0, 0, 0, 90, 1e4], atol=1e-6)
    assert reference.cross_entropy(np.array([[[1e4, 0.0]]]), np.array([[1]])) == 1e4


def test_dropout_is_splitmix64_of_a_seed_and_a_place():
    state = Dropout(0.5, seed=3).state(2)

    def outputs(state, n):
        for _ in range(n):  # Steele, Lea and Flood 2014, figure 17
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = state
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            yield z ^ (z >> 31)

    expected = [0.0 if (z >> 40) / 2**24 < 0.5 else 2.0 for z in outputs(state, 60)]
    assert Dropout(0.5, seed=3).scales(2, (3, 20)).reshape(-1).tolist() == expected
    assert 0 in expected
    assert 2 in expected


def test_dropout_drops_its_share_and_differs_by_place_and_seed():
    scales = Dropout(0.3, seed=1).scales(0, (100_000,))
    assert np.mean(scales == 0) == pytest.approx(0.3, abs=0.01)
    assert np.mean(scales) == pytest.approx(1, abs=0.01)
    for other in (Dropout(0.3, seed=1).scales(1, (100_000,)), Dropout(0.3, seed=2).scales(0, (100_000,))):
        assert np.mean(scales == other) == pytest.approx(0.7**2 + 0.3**2, abs=0.01)
