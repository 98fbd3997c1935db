"""The Llama model in PyTorch, and nothing else: no files, no optimizer, no processes.

Shape letters: B batch, T positions, C dim, H query heads, G kv heads, D head_dim, F hidden_dim, V vocab, L layers.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamalet.config import IGNORED, ModelConfig, rope_tables

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (B, T, C), output weight (V, C), targets (B, T)) -> mean cross-entropy."""


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of predicting `targets` from the final hidden states.

    Args:
        hidden: float (B, T, C), after the final norm.
        weight: float (V, C), the output projection.
        targets: int64 (B, T); IGNORED ones do not count.

    Returns:
        A float32 scalar; NaN if every target is ignored.
    """
    logits = F.linear(hidden, weight)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention: average the values up to each position, weighted by the softmax of its query with their keys.

    Args:
        q: float (B, H, T, D).
        k: float (B, G, T, D); H / G query heads share each of the G heads.
        v: float (B, G, T, D).
        dropout: share of the weights dropped.

    Returns:
        float (B, H, T, D).
    """
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=k.shape[1] < q.shape[1]
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of adjacent values of a head by the angle of its position (Meta's interleaved RoPE).

    Args:
        x: float (B, T, heads, D).
        cos: float32 (T, 1, D / 2), cosines of the angles.
        sin: float32 (T, 1, D / 2), sines of the angles.

    Returns:
        The rotated heads in the type of `x`, computed in float32.

    Source: RoFormer, https://arxiv.org/abs/2104.09864, equation 34.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, D / 2) each
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads.

    Attributes:
        attend: what happens between the projections; training may replace it by a faster equivalent.
    """

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.dropout = dropout
        self.attend: Attend = causal_attention
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.kv_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C), each position attending to those up to it; cos and sin are `rotate`'s."""
        B, T, _ = x.shape
        q = rotate(self.wq(x).view(B, T, self.n_heads, self.head_dim), cos, sin)  # (B, T, H, D)
        k = rotate(self.wk(x).view(B, T, self.n_kv_heads, self.head_dim), cos, sin)  # (B, T, G, D)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim)  # (B, T, G, D)
        dropout = self.dropout if self.training else 0.0
        mixed = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout)  # (B, H, T, D)
        return self.wo(mixed.transpose(1, 2).reshape(B, T, self.n_heads * self.head_dim))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x).

    Source: GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C), independently at each position."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, dropout)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C); cos and sin are `rotate`'s."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class Llama(nn.Module):
    """A decoder-only language model: tokens in, logits or a loss out.

    Attributes:
        config: the shape.
        head_loss: computes the loss of final hidden states; training may replace it by a faster equivalent.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.head_loss: HeadLoss = head_loss
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if not config.tied:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rope_tables(config, config.max_seq_len)
        self.register_buffer("cos", torch.from_numpy(cos)[:, None], persistent=False)  # (max_seq_len, 1, D / 2)
        self.register_buffer("sin", torch.from_numpy(sin)[:, None], persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all matrices from torch's global generator: normal, narrower if they add to the residual stream.

        Source: GPT-2 (Radford et al. 2019), section 2.3: 2 L projections add to the residual stream, so each is drawn
        with std / sqrt(2 L).
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
                continue
            adds_to_residual = name.endswith(("wo.weight", "w2.weight"))
            std = 0.02 / math.sqrt(2 * self.config.n_layers) if adds_to_residual else 0.02
            nn.init.normal_(weight, std=std)

    @torch.no_grad()
    def start_by_copying(self) -> None:
        """Initialize attention so that each head attends to similar tokens and copies them.

        Copying, which models otherwise discover late and suddenly, works from the first step: `wo` is the transpose of
        `wv`. At first it does no harm: `wq` equals `wk`, scaled so that a token's weight on itself is about that of
        max_seq_len other tokens together.

        Source: Mimetic Initialization of Self-Attention Layers, https://arxiv.org/abs/2305.09828.
        """
        config = self.config
        std_k = math.sqrt(math.log(config.max_seq_len) / (config.dim * math.sqrt(config.head_dim)))
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.wv.weight, std=config.dim**-0.5)
                nn.init.normal_(module.wk.weight, std=std_k)
                module.wo.weight.copy_(self._per_query_head(module.wv.weight).T)
                module.wq.weight.copy_(self._per_query_head(module.wk.weight))

    def _per_query_head(self, weight: Tensor) -> Tensor:
        """Repeat each head of a key or value projection (G D, C) for every query head that shares it: (H D, C)."""
        config = self.config
        heads = weight.view(config.n_kv_heads, config.head_dim, -1)  # (G, D, C)
        return heads.repeat_interleave(config.n_heads // config.n_kv_heads, dim=0).flatten(0, 1)

    @property
    def output_weight(self) -> Tensor:
        """The output projection (V, C): the embedding table if the model is tied."""
        return self.tok_embeddings.weight if self.config.tied else self.output.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Run the model.

        Args:
            tokens: int64 (B, T), T at most max_seq_len.
            targets: int64 (B, T), the next tokens; IGNORED (-1) ones do not count.

        Returns:
            Logits (B, T, V), or with targets their mean cross-entropy in nats, a float32 scalar.
        """
        T = tokens.shape[1]
        cos, sin = self.cos[:T], self.sin[:T]
        x = self.dropout(self.tok_embeddings(tokens))  # (B, T, C)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        if targets is None:
            return F.linear(x, self.output_weight)  # (B, T, V)
        return self.head_loss(x, self.output_weight, targets)
