import tracemalloc

import numpy as np
import pytest
import torch
from gradient_cases import MODELS
from torch import nn
from toy import random_tensors

from llamalet.backward.groups import group_of, muon_rate
from llamalet.backward.optimizer import NumbaOptimizer, n_bytes
from llamalet.backward.runner import Runner
from llamalet.kernels.products import EDGE_SHAPE
from training.optimizer import Muon

BETAS, DECAY, RATE = (0.9, 0.95), 0.1, 1e-3


def new_optimizer(weights, kind, n_threads=2):
    runner = Runner(n_threads, np.zeros((n_threads, *EDGE_SHAPE), np.float32))
    return NumbaOptimizer(runner, weights, kind=kind, betas=BETAS, weight_decay=DECAY)


def steps_of(kind, n_threads, n=10, scale=1.0):
    """Ten steps of ours from random gradients; returns the weights, the state and the gradients of every step."""
    weights = random_tensors(MODELS["gqa-untied"])
    optimizer, history = new_optimizer(weights, kind, n_threads), []
    for step in range(n):
        gradients = random_tensors(MODELS["gqa-untied"], seed=step + 1)
        history.append({name: gradient.copy() * np.float32(scale) for name, gradient in gradients.items()})
        optimizer.step(gradients, RATE, scale)
    return weights, optimizer.state, history


def torch_steps(history, make):
    """The same steps with an optimizer of torch for each tensor."""
    parameters = {name: nn.Parameter(torch.tensor(w)) for name, w in random_tensors(MODELS["gqa-untied"]).items()}
    optimizers = {name: make(name, parameter) for name, parameter in parameters.items()}
    for gradients in history:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
            optimizers[name].step()
    return {name: p.detach().numpy() for name, p in parameters.items()}, optimizers


def adamw(name, parameter):
    decay = DECAY if parameter.ndim == 2 else 0.0
    return torch.optim.AdamW([parameter], lr=RATE, betas=BETAS, weight_decay=decay)


def float_muon(name, parameter):
    if group_of(name, parameter.ndim, "muon") != "muon":
        return adamw(name, parameter)
    return Muon([parameter], rate=RATE, weight_decay=DECAY, dtype=torch.float32)


def torch_muon(name, parameter):
    if group_of(name, parameter.ndim, "muon") != "muon":
        return adamw(name, parameter)
    return torch.optim.Muon([parameter], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")


def largest_difference(found, expected):
    return max(np.abs(found[name] - expected[name]).max() for name in expected)


def test_adamw_is_torchs():
    weights, state, history = steps_of("adamw", 2)
    expected, optimizers = torch_steps(history, adamw)
    assert largest_difference(weights, expected) < 1e-6
    for name, optimizer in optimizers.items():
        (slots,) = optimizer.state.values()
        assert {f"{name}:{slot}" for slot in slots} == {key for key in state if key.rpartition(":")[0] == name}
        for slot, value in slots.items():
            np.testing.assert_allclose(state[f"{name}:{slot}"], value.numpy(), rtol=1e-5, atol=1e-7)


def test_gradients_are_scaled_first():
    weights, _, history = steps_of("adamw", 1, n=3, scale=0.25)
    assert largest_difference(weights, torch_steps(history, adamw)[0]) < 1e-6


@pytest.mark.parametrize(("make", "bound"), [(float_muon, 1e-5), (torch_muon, 5e-4)], ids=["float32", "bfloat16"])
def test_muon_is_torchs(make, bound):
    weights, state, history = steps_of("muon", 2)
    expected, optimizers = torch_steps(history, make)
    assert largest_difference(weights, expected) < bound
    slots = {key for key in state if key.endswith(":momentum_buffer")}
    assert {key.rpartition(":")[0] for key in slots} == {
        name for name, w in weights.items() if group_of(name, w.ndim, "muon") == "muon"
    }


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_bits_do_not_depend_on_the_number_of_threads(kind):
    one, two = (steps_of(kind, n_threads, n=3)[0] for n_threads in (1, 2))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_the_norm_is_that_of_all_gradients():
    weights = random_tensors(MODELS["mha-untied"])
    norm = new_optimizer(weights, "adamw").norm(weights)
    expected = np.sqrt(sum(float(np.sum(weight.astype(np.float64) ** 2)) for weight in weights.values()))
    assert norm == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_averages_end_as_zero_and_not_as_tiny_numbers(kind):
    weights = random_tensors(MODELS["gqa-untied"])
    optimizer = new_optimizer(weights, kind)
    for name, value in optimizer.state.items():
        value[...] = 0.0 if name.endswith("step") else 1e-36
    optimizer.step({name: np.full_like(weight, 1e-30) for name, weight in weights.items()}, RATE)
    assert not any(value.any() for name, value in optimizer.state.items() if not name.endswith("step"))
    gradients = {name: np.full_like(weight, np.nan) for name, weight in weights.items()}
    optimizer.step(gradients, RATE)
    assert all(np.isnan(value).all() for name, value in optimizer.state.items() if not name.endswith("step"))


@pytest.mark.parametrize(("kind", "rounded"), [("adamw", False), ("muon", False), ("muon", True)])
def test_the_memory_is_what_was_foretold(kind, rounded):
    shapes = {name: (16 * rows, 1024) for name, rows in (("tok_embeddings", 30), ("layers.0.attention.wq", 60))}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    runner = Runner(2, np.zeros((2, *EDGE_SHAPE), np.float32))
    tracemalloc.start()
    NumbaOptimizer(runner, weights, kind=kind, betas=BETAS, weight_decay=DECAY, rounded=rounded)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak == pytest.approx(n_bytes(shapes, kind, 2, rounded=rounded), abs=20_000)


def test_groups():
    assert group_of("layers.0.attention.wq", 2, "muon") == "muon"
    assert group_of("tok_embeddings", 2, "muon") == group_of("layers.0.attention.wq", 2, "adamw") == "decayed"
    assert group_of("layers.0.ffn_norm", 1, "muon") == "plain"
    assert muon_rate(1e-2, 25, 100) == pytest.approx(0.02)
