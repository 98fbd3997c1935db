"""The shape of a model, defined once for training and runtime.

Shape letters used throughout: B batch, T new positions, S cached positions, C dim, H query heads,
G kv heads, D head_dim, F hidden_dim, V vocab, L layers.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llamalet.errors import ConfigError, not_positive

IGNORED = -1
"""A training target with this value does not count towards the loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3's stretching of RoPE wavelengths, for contexts longer than in the original training.

    Source: Llama 3.1 reference code, `apply_scaling`; Hugging Face's `rope_type: llama3`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        """Refuse values that the formula cannot use."""
        problems = []
        if not (math.isfinite(self.factor) and self.factor >= 1):
            problems.append(f"rope_scaling.factor={self.factor}: must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            problems.append(
                f"rope_scaling: low_freq_factor={self.low_freq_factor} must be positive and less than "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.original_max_seq_len < 1:
            problems.append(f"rope_scaling.original_max_seq_len={self.original_max_seq_len}: must be positive")
        ConfigError.raise_for(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that determines a Llama model's tensors and arithmetic."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = True

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len")
        problems = not_positive(self, *sizes)
        if not problems and self.n_heads % self.n_kv_heads:
            problems.append(f"n_heads={self.n_heads}: must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim}: must be even, because RoPE rotates pairs")
        if not 0 < self.norm_eps < 1:
            problems.append(f"norm_eps={self.norm_eps}: must lie between 0 and 1")
        if not 0 < self.rope_theta < math.inf:
            problems.append(f"rope_theta={self.rope_theta}: must be positive")
        ConfigError.raise_for(problems)

    @classmethod
    def create(
        cls,
        *,
        dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        multiple_of: int = 32,
        **rest: Any,
    ) -> Self:
        """Create a config; sizes left out are derived.

        Args:
            dim: width of the residual stream (C).
            n_heads: query heads (H).
            n_kv_heads: key and value heads (G); None is n_heads.
            head_dim: width of a head (D); None is dim / n_heads.
            hidden_dim: width of the feed-forward layer (F); None is 8/3 dim, rounded up to a multiple of `multiple_of`.
            multiple_of: see hidden_dim.
            rest: the other fields.

        Raises:
            ConfigError: if dim is not a multiple of n_heads and no head_dim is given, or a value is out of range.
        """
        if dim < 1 or n_heads < 1 or multiple_of < 1:
            raise ConfigError(f"dim={dim}, n_heads={n_heads}, multiple_of={multiple_of}: all must be positive")
        if head_dim is None:
            if dim % n_heads:
                raise ConfigError(f"dim={dim}: must be a multiple of n_heads={n_heads}, or give head_dim")
            head_dim = dim // n_heads
        if hidden_dim is None:
            hidden_dim = -(-(8 * dim // 3) // multiple_of) * multiple_of
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        return cls(dim=dim, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, hidden_dim=hidden_dim, **rest)

    @property
    def kv_dim(self) -> int:
        """Width of all kv heads together: G * D."""
        return self.n_kv_heads * self.head_dim

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied output counts once."""
        attention = 2 * self.dim * self.n_heads * self.head_dim + 2 * self.dim * self.kv_dim
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        return (1 if self.tied else 2) * self.vocab_size * self.dim + self.n_layers * layer + self.dim

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Invert `to_dict`.

        Raises:
            ConfigError: on a missing or unknown field, or a value out of range.
        """
        values = dict(fields)
        try:
            if values.get("rope_scaling") is not None:
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"model config: {error}") from None


def rope_frequencies(config: ModelConfig) -> NDArray[np.float64]:
    """Return the radians by which each pair of a head rotates per position: float64 (D / 2,).

    Source: RoFormer, https://arxiv.org/abs/2104.09864, section 3.2; scaling as in RopeScaling.
    """
    half = np.arange(0, config.head_dim, 2, dtype=np.float64)
    frequencies = config.rope_theta ** (-half / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Long waves (few turns within the original context) are stretched by `factor`, short ones kept, others blended.
    turns = scaling.original_max_seq_len * frequencies / (2 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope_tables(config: ModelConfig, n_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cos and sin of every angle, each float32 (n_positions, D / 2), computed in float64."""
    angles = np.outer(np.arange(n_positions, dtype=np.float64), rope_frequencies(config))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
