"""AdamW and Muon as one optimizer, and the clipping of gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from training.machine.distributed import ShardedMuon, gather_slots, shard, total_norm


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Scale the gradients of `parameters` so that their common norm is at most `largest`; return the norm before.

    Args:
        parameters: those without a gradient do not count.
        largest: the bound; 0 only measures.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    # The CPU can look at the norm and pass over a product with 1; on a GPU looking would mean waiting for it.
    if largest and (norm.device.type != "cpu" or norm > largest):
        clip_grads_with_norm_(parameters, largest, norm)
    return norm


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step, and put everything back where `skip` is true; on a GPU this costs a copy, and looking a wait.

    Args:
        skip: a bool scalar on the parameters' device.
        optimizer: one whose state begins with zeros, and is all tensors.
    """

    def tensors() -> list[Tensor]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return parameters + [value for state in optimizer.state.values() for value in state.values()]

    before = {id(tensor): tensor.detach().clone() for tensor in tensors()}
    optimizer.step()
    with torch.no_grad():
        for tensor in tensors():
            tensor.copy_(torch.where(skip, before.get(id(tensor), torch.zeros_like(tensor)), tensor))


class Optimizer:
    """One or two of torch's optimizers as one: AdamW for all parameters, or Muon for the layers' matrices beside it.

    AdamW decays the matrices alone: norms are no directions that could shrink without harm. Its updates run in one
    fused kernel where the device has one (CPU and CUDA). Muon's updates are scaled to the size of AdamW's, so that one
    learning rate serves both; embeddings and output are no maps between activations, so they stay with AdamW.

    Source: Muon is Keller Jordan's, https://kellerjordan.github.io/posts/muon/, its scaling Moonlight's,
    https://arxiv.org/abs/2502.16982, section 2.2.
    """

    def __init__(
        self, model: nn.Module, *, kind: str, rate: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        """Set up the parameter groups.

        Args:
            model: the model.
            kind: adamw or muon.
            rate: the first learning rate.
            betas: AdamW's moments.
            weight_decay: of the matrices, relative to the learning rate.
        """
        self._model = model
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() >= 2}
        orthogonal = [matrix for name, matrix in matrices.items() if kind == "muon" and name.startswith("layers.")]
        decayed = [matrix for matrix in matrices.values() if all(matrix is not other for other in orthogonal)]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        fused = vectors[0].device.type in ("cpu", "cuda")
        self._parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused)]
        if orthogonal:
            muon = ShardedMuon if isinstance(orthogonal[0], DTensor) else torch.optim.Muon
            self._parts.append(muon(orthogonal, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))

    def step(self, rate: float, skip: Tensor | None = None) -> None:
        """Update the parameters with the learning rate `rate`, and drop their gradients.

        Args:
            rate: the learning rate.
            skip: a bool scalar on the parameters' device; where it is true, only the gradients are dropped.
        """
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            if skip is None:
                part.step()
            elif skip.device.type != "cuda":
                if not skip:
                    part.step()
            elif isinstance(part, torch.optim.AdamW):
                part.found_inf = skip.float()  # type: ignore[attr-defined]  # the fused kernel looks, so that nobody has to wait
                part.step()
            else:
                step_unless(skip, part)
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors, each named `parameter:slot`, so that no order of parameters matters.

        Where they are sharded, every process must call this, and only the main one gets them.
        """
        slots = gather_slots(self._model, self._parts)
        return {f"{name}:{slot}": value for name, state in slots.items() for slot, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put `state_dict`'s tensors back.

        Raises:
            KeyError: if a tensor belongs to no parameter of the model.
        """
        parameters = dict(self._model.named_parameters())
        for key, value in state.items():
            name, _, slot = key.rpartition(":")
            parameter = parameters[name]
            part = next(p for p in self._parts if any(parameter is q for g in p.param_groups for q in g["params"]))
            # AdamW counts its steps in a scalar, which the fused CUDA kernel wants on the device as well.
            value = value.to(parameter.device, copy=True)
            part.state[parameter][slot] = shard(value, like=parameter) if value.dim() else value
