"""Parameter groups, AdamW, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn


def learning_rate(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """Return the learning rate of an optimizer step: a linear warm-up, then half a cosine down to `floor`.

    Args:
        step: 0 for the first step.
        peak: the highest rate.
        floor: the rate that the last step comes down to.
        warmup: steps of warm-up; the first has peak / warmup, never 0.
        total: steps of the whole run.

    Source: SGDR, https://arxiv.org/abs/1608.03983, equation 5, without restarts.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))


def make_adamw(model: nn.Module, *, rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """Make AdamW with decay on the matrices alone: norms are no directions that could shrink without harm.

    One fused kernel does all updates where the device has one (CPU and CUDA).
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors, each named `parameter:slot`, so that no order of parameters matters."""
    return {
        f"{name}:{slot}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Put `optimizer_state`'s tensors back.

    Raises:
        KeyError: if a tensor belongs to no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        name, _, slot = key.rpartition(":")
        parameter = parameters[name]
        # AdamW counts its steps in a scalar, which the fused CUDA kernel wants on the device as well.
        optimizer.state[parameter][slot] = value.to(parameter.device, copy=True)
