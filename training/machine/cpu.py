"""Attention and loss of the model, arranged for a CPU's caches.

On a CPU the output head with its loss is half of a small model's step, and PyTorch's flash attention runs its bfloat16
backward pass at a fifth of the speed of a matrix product. Here both consist of products that run at full speed: the
logits never exist as a whole, and attention scores only for a block of queries at a time.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llamalet.config import IGNORED
from model import Attention, Llama

BLOCK = 128
"""Queries per product with the keys up to them."""

CHUNK_BYTES = 1 << 24
"""Bytes of logits turned into gradients at a time: these stay in the last-level cache."""

SLAB_BYTES = 1 << 27
"""Bytes of logit gradients kept for one product that gives the weight's gradient."""


def use_cpu_kernels(model: Llama, *, compiled: bool) -> None:
    """Make `model` compute its attention and its loss with this module.

    Args:
        model: the model, on the CPU.
        compiled: whether torch.compile works here.
    """
    model.head_loss = HeadLoss(compiled=compiled)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend_in_blocks


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Compute `model.causal_attention` in blocks of queries, so that few masked scores are computed."""
    B, H, T, D = q.shape
    G, R = k.shape[1], H // k.shape[1]  # R query heads share a kv head
    q = (q / math.sqrt(D)).reshape(B, G, R, T, D)
    keys, v = k.transpose(2, 3).contiguous(), v.contiguous()  # (B, G, D, T), (B, G, T, D)
    position = torch.arange(T, device=q.device)
    blocks = []
    for begin in range(0, T, BLOCK):
        end = min(begin + BLOCK, T)
        rows = q[:, :, :, begin:end].reshape(B, G, R * (end - begin), D)
        scores = (rows @ keys[..., :end]).view(B, G, R, end - begin, end).float()
        later = position[:end] > position[begin:end, None]  # (queries, keys)
        weights = scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype)
        weights = F.dropout(weights, dropout).view(B, G, R * (end - begin), end)
        blocks.append((weights @ v[:, :, :end]).view(B, G, R, end - begin, D))
    return torch.cat(blocks, dim=3).reshape(B, H, T, D)


class HeadLoss:
    """Mean cross-entropy of the output head, computed together with its gradients, in chunks of positions.

    A chunk's logits are computed, replaced in place by their gradient, and used for the gradient of the hidden states
    while they are still in the cache. The weight's gradient is one product per slab, over gradients in a buffer that is
    kept from step to step: new memory would cost more than the arithmetic on it.
    """

    def __init__(self, *, compiled: bool) -> None:
        self._softmax = torch.compile(scaled_softmax_) if compiled else scaled_softmax_
        self._buffer: Tensor | None = None

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Compute `model.head_loss`; the backward pass can run only once."""
        return _HeadLoss.apply(hidden, weight, targets, self, torch.is_grad_enabled())

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, gradients: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss and, if wanted, its gradients by `hidden` and, in float32, by `weight`.

        Args:
            hidden: (N, C), in the type of the matrix products.
            weight: (V, C), in the same type.
            targets: int64 (N,).
            gradients: whether to compute them.
        """
        (N, _), V = hidden.shape, weight.shape[0]
        row_bytes = V * hidden.element_size()
        chunk = max(CHUNK_BYTES // row_bytes // BLOCK, 1) * BLOCK
        slab = max(SLAB_BYTES // row_bytes // chunk, 1) * chunk
        if self._buffer is None or self._buffer.shape != (min(slab, N), V) or self._buffer.dtype != hidden.dtype:
            self._buffer = torch.empty(min(slab, N), V, dtype=hidden.dtype)
        scale = (targets != IGNORED) / (targets != IGNORED).sum()  # (N,), weight of each position in the mean
        labels = targets.clamp(min=0)
        loss = torch.zeros(())
        by_hidden, by_weight = torch.empty_like(hidden), torch.empty(0)
        for begin in range(0, N, chunk):
            end = min(begin + chunk, N)
            row = begin % slab
            logits = torch.mm(hidden[begin:end], weight.t(), out=self._buffer[row : row + end - begin])
            at = torch.arange(end - begin), labels[begin:end]
            chosen = logits[at].float()
            log_p = chosen - self._softmax(logits, scale[begin:end, None]).squeeze(1)
            loss -= (log_p * scale[begin:end]).sum()
            if gradients:
                logits[at] = ((log_p.exp() - 1) * scale[begin:end]).to(logits.dtype)
                torch.mm(logits, weight, out=by_hidden[begin:end])
            if gradients and (end == N or end % slab == 0):
                rows = row + end - begin
                product = torch.mm(self._buffer[:rows].t(), hidden[end - rows : end])
                by_weight = by_weight.add_(product) if by_weight.numel() else product.float()
        return loss, by_hidden, by_weight


def scaled_softmax_(logits: Tensor, scale: Tensor) -> Tensor:
    """Replace logits (n, V) by their softmax times `scale` (n, 1); return the log of the softmax's divisor, (n, 1)."""
    x = logits.float()
    top = x.amax(1, keepdim=True)
    e = (x - top).exp()
    total = e.sum(1, keepdim=True)
    logits.copy_(e * (scale / total))
    return top + total.log()


class _HeadLoss(torch.autograd.Function):
    """Passes the gradients that HeadLoss.forward computed to autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: HeadLoss, gradients: bool) -> Tensor:
        """Compute the loss, in autocast's type if autocast is enabled."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        loss, by_hidden, by_weight = head.forward(
            hidden.flatten(0, 1).to(dtype), weight.to(dtype), targets.flatten(), gradients
        )
        if gradients:
            ctx.gradients = by_hidden.view(hidden.shape).to(hidden.dtype), by_weight.to(weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients, scaled in place."""
        by_hidden, by_weight = ctx.gradients
        ctx.gradients = None
        if grad != 1:
            by_hidden.mul_(grad)
            by_weight.mul_(grad)
        return by_hidden, by_weight, None, None, None
