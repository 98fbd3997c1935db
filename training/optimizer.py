"""AdamW and Muon as one optimizer, and gradient clipping."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from llamalet.backward.groups import (
    MUON_A,
    MUON_B,
    MUON_C,
    MUON_EPS,
    MUON_ITERATIONS,
    MUON_MOMENTUM,
    Group,
    group_of,
    muon_rate,
)
from training.machine.distributed import gather_slots, shard, total_norm


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Scale the gradients of `parameters` so that their total norm is at most `largest`; return the norm before that.

    Args:
        parameters: those without a gradient are ignored.
        largest: the bound; 0 only measures.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    # On the CPU the norm is known, so a product with 1 can be skipped; on a GPU reading it would mean waiting.
    if largest and (norm.device.type != "cpu" or norm > largest):
        clip_grads_with_norm_(parameters, largest, norm)
    return norm


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step and undo it if `skip` is true; this costs a copy, but the host need not wait to read `skip`.

    Args:
        skip: a bool scalar on the parameters' device.
        optimizer: its state must be tensors that start as zeros.
    """

    def tensors() -> list[Tensor]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return parameters + [value for state in optimizer.state.values() for value in state.values()]

    before = {id(tensor): tensor.detach().clone() for tensor in tensors()}
    optimizer.step()
    with torch.no_grad():
        for tensor in tensors():
            tensor.copy_(torch.where(skip, before.get(id(tensor), torch.zeros_like(tensor)), tensor))


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal: all its directions get the same size.

    torch.optim.Muon does the same, but always multiplies in bfloat16, which many processors can only emulate, and it
    would split each product over the processes that share a matrix.

    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(self, matrices: list[nn.Parameter], *, rate: float, weight_decay: float, dtype: torch.dtype) -> None:
        """Set up one group.

        Args:
            matrices: (rows, cols) each, whole, or sharded by rows over the processes.
            rate: the initial learning rate.
            weight_decay: as a multiple of the learning rate.
            dtype: of the products.
        """
        super().__init__(matrices, {"lr": rate, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the matrices."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if (gradient := matrix.grad) is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"]
                momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
                update = gradient.lerp(momentum, MUON_MOMENTUM)  # where the momentum will be if the gradient stays
                whole = update.full_tensor() if isinstance(update, DTensor) else update
                update = shard(orthogonal(whole, self._dtype), like=matrix)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-muon_rate(group["lr"], *matrix.shape))


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x with all its singular values taken near 1, by Newton and Schulz's iteration with products in `dtype`.

    Args:
        x: (rows, cols).
        dtype: of the products and of the result.
    """
    rows, cols = x.shape
    x = x.to(dtype)
    if rows > cols:  # X X^T is smaller than X^T X if X is wide
        x = x.T
    x = x / x.norm().clamp(min=MUON_EPS)  # so that no singular value is above 1, but for rounding
    for _ in range(MUON_ITERATIONS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=MUON_B, alpha=MUON_C)
        x = torch.addmm(x, polynomial, x, beta=MUON_A)
    return x.T if rows > cols else x


class Optimizer:
    """AdamW for all parameters, or Muon for the matrices of the layers and AdamW for the rest.

    llamalet/backward/groups.py says which weight is trained how. AdamW uses torch's fused kernel for CPU and CUDA.
    Muon's updates are scaled to the size of AdamW's, so one learning rate serves both.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str,
        rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        """Set up the parameter groups.

        Args:
            model: the model.
            kind: adamw or muon.
            rate: the initial learning rate.
            betas: AdamW's decay rates of the moments.
            weight_decay: decay of the matrices, as a multiple of the learning rate.
            dtype: of Muon's products.
        """
        self._model = model
        by_group: dict[Group, list[nn.Parameter]] = {"muon": [], "decayed": [], "plain": []}
        for name, parameter in model.named_parameters():
            by_group[group_of(name, parameter.dim(), kind)].append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": by_group["decayed"], "weight_decay": weight_decay},
            {"params": by_group["plain"], "weight_decay": 0.0},
        ]
        fused = by_group["plain"][0].device.type in ("cpu", "cuda")
        self._parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused)]
        if matrices := by_group["muon"]:
            self._parts.append(Muon(matrices, rate=rate, weight_decay=weight_decay, dtype=dtype))

    def step(self, rate: float, skip: Tensor | None = None) -> None:
        """Update the parameters with the learning rate `rate`, then drop their gradients.

        Args:
            rate: the learning rate.
            skip: a bool scalar on the parameters' device; if true, only drop the gradients.
        """
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            if skip is None or skip.device.type != "cuda":
                if not skip:  # None or false
                    part.step()
            elif isinstance(part, torch.optim.AdamW):
                part.found_inf = skip.float()  # type: ignore[attr-defined]  # read by the fused kernel, so the host need not wait
                part.step()
            else:
                step_unless(skip, part)
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors, named `parameter:slot` so that the order of parameters does not matter.

        If they are sharded, every process must call this, and only the main process gets them.
        """
        slots = gather_slots(self._model, self._parts)
        return {f"{name}:{slot}": value for name, state in slots.items() for slot, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors of `state_dict`.

        Raises:
            KeyError: if a tensor belongs to no parameter of the model.
        """
        parameters = dict(self._model.named_parameters())
        for key, value in state.items():
            name, _, slot = key.rpartition(":")
            parameter = parameters[name]
            part = next(p for p in self._parts if any(parameter is q for g in p.param_groups for q in g["params"]))
            # AdamW counts its steps in a scalar, which the fused CUDA kernel needs on the device too.
            value = value.to(parameter.device, copy=True)
            part.state[parameter][slot] = shard(value, like=parameter) if value.dim() else value
