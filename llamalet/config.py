"""The shape of a model, defined once for training and runtime.

Shape letters used throughout: B batch, T new positions, S cached positions, C dim, H query heads,
G kv heads, D head_dim, F hidden_dim, V vocab, L layers.
"""

import dataclasses
import math
import reprlib
import sys
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llamalet import strict
from llamalet.checks import not_positive
from llamalet.errors import ConfigError

Frequencies = NDArray[np.float64]
"""The radians by which each RoPE pair of a head rotates per position: (D / 2,)."""

MAX_ORIGINAL = (1 << 32) - 1
"""The longest context of the original training that a model file can hold."""

IGNORED = -1
"""A training target with this value does not count towards the loss."""

# Caps on a model's sizes, far above any model that this project is for.
MAX_WIDTH, MAX_LAYERS, MAX_VOCAB, MAX_CONTEXT = 1 << 18, 1 << 10, 1 << 20, 1 << 20
CAPS = {
    "dim": MAX_WIDTH, "hidden_dim": MAX_WIDTH, "n_layers": MAX_LAYERS, "n_heads": MAX_WIDTH, "n_kv_heads": MAX_WIDTH,
    "vocab_size": MAX_VOCAB, "max_seq_len": MAX_CONTEXT, "head_dim": MAX_WIDTH,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Position interpolation: all RoPE wavelengths are stretched by `factor`.

    Source: https://arxiv.org/abs/2306.15595; `linear` in Hugging Face's config.json and in GGUF.
    """

    factor: float

    def __post_init__(self) -> None:
        """Refuse values that the formula cannot use."""
        if not 0 < _float32(self.factor) < math.inf:
            raise ConfigError(f"rope_scaling.factor={reprlib.repr(self.factor)}: must be a positive number")
        object.__setattr__(self, "factor", float(self.factor))

    def scaled(self, frequencies: Frequencies) -> Frequencies:
        """Return the scaled frequencies of pairs that rotate with `frequencies` otherwise."""
        return frequencies / self.factor

    def __str__(self) -> str:
        return f"linear scaling by {self.factor:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
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
        if not (_is_finite(self.factor) and self.factor >= 1):
            problems.append(f"rope_scaling.factor={reprlib.repr(self.factor)}: must be a number, at least 1")
        low, high = self.low_freq_factor, self.high_freq_factor
        if not (_is_finite(low) and _is_finite(high) and 0 < low < high):
            problems.append(
                f"rope_scaling: low_freq_factor={reprlib.repr(low)} must be a positive number, less than "
                f"high_freq_factor={reprlib.repr(high)}"
            )
        original = self.original_max_seq_len
        if not (_is_finite(original) and 1 <= original <= MAX_ORIGINAL and original % 1 == 0):
            problems.append(
                f"rope_scaling.original_max_seq_len={reprlib.repr(original)}: must be a whole number in "
                f"1..{MAX_ORIGINAL}"
            )
        ConfigError.raise_for(problems)
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "original_max_seq_len", int(original))

    def scaled(self, frequencies: Frequencies) -> Frequencies:
        """Return the scaled frequencies of pairs that rotate with `frequencies` otherwise."""
        # Long waves (few turns within the original context) are stretched by `factor`, short ones kept, others blended.
        keep = self.kept(frequencies)
        return keep * frequencies + (1 - keep) * frequencies / self.factor

    def kept(self, frequencies: Frequencies) -> Frequencies:
        """Return the share of each frequency that stays as it is, 0 to 1; the rest is divided by `factor`."""
        turns = self.original_max_seq_len * frequencies / (2 * np.pi)
        return np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)

    def __str__(self) -> str:
        return f"llama3's scaling by {self.factor:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeDivisors:
    """A divisor for the frequency of each RoPE pair of a head, where no formula gives them; kept as float32 numbers.

    Source: llama.cpp's tensor rope_freqs; Hugging Face's `rope_type: longrope` with one list of factors.
    """

    divisors: tuple[float, ...]

    def __post_init__(self) -> None:
        """Round to float32; refuse values that the division cannot use."""
        rounded = tuple(map(_float32, self.divisors))
        for at, value in enumerate(rounded):
            if not 0 < value < math.inf:
                found = reprlib.repr(self.divisors[at])
                raise ConfigError(f"rope_scaling.divisors[{at}]={found}: must be a positive float32 number")
        object.__setattr__(self, "divisors", rounded)

    def scaled(self, frequencies: Frequencies) -> Frequencies:
        """Return the scaled frequencies of pairs that rotate with `frequencies` otherwise."""
        return frequencies / np.array(self.divisors)

    def __str__(self) -> str:
        return f"divisors from {min(self.divisors):g} to {max(self.divisors):g}"


RopeScaling = LinearScaling | Llama3Scaling | RopeDivisors
"""How the RoPE frequencies differ from rope_theta's."""


def _is_finite(value: Any) -> bool:
    """Return whether a value is a finite number."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _float32(value: Any) -> float:
    """Return a number rounded to float32, infinity if it is too large; NaN for what is no number."""
    with np.errstate(over="ignore"):
        return float(np.float32(value)) if _is_finite(value) else math.nan


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
        problems = not_positive(self, *CAPS)
        sizes = {name: getattr(self, name) for name in CAPS}
        problems += [
            f"{name}={size}: must be at most {CAPS[name]}" for name, size in sizes.items() if size > CAPS[name]
        ]
        if not problems and self.n_heads % self.n_kv_heads:
            problems.append(f"n_heads={self.n_heads}: must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim}: must be even, because RoPE rotates pairs")
        if not 0 < self.norm_eps < 1:
            problems.append(f"norm_eps={self.norm_eps}: must lie between 0 and 1")
        if not 0 < self.rope_theta < math.inf:
            problems.append(f"rope_theta={self.rope_theta}: must be positive")
        if isinstance(scaling := self.rope_scaling, RopeDivisors) and len(scaling.divisors) != self.head_dim // 2:
            n = len(scaling.divisors)
            problems.append(f"rope_scaling has {n} divisors: must have half as many as head_dim={self.head_dim}")
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
            ConfigError: on a missing or unknown field, or a value of another type or out of range.
        """
        return strict.build(cls, fields, "model config", ConfigError)


def rope_frequencies(config: ModelConfig) -> Frequencies:
    """Return the radians by which each pair of a head rotates per position: float64 (D / 2,).

    Source: RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.
    """
    half = np.arange(0, config.head_dim, 2, dtype=np.float64)
    frequencies = config.rope_theta ** (-half / config.head_dim)
    return frequencies if config.rope_scaling is None else config.rope_scaling.scaled(frequencies)


def rope_tables(config: ModelConfig, n_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cos and sin of every angle, each float32 (n_positions, D / 2), computed in float64."""
    angles = np.outer(np.arange(n_positions, dtype=np.float64), rope_frequencies(config))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
