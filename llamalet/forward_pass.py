"""What generation and evaluation need from a model: llamalet.kernels.transformer and llamalet.reference provide it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig
from llamalet.kv_cache import KVCache
from llamalet.sampler import Choose

Tokens = Sequence[int] | NDArray[np.integer[Any]]
Logits = NDArray[np.float32]
Losses = Callable[[Logits, NDArray[np.integer[Any]]], NDArray[np.float64]]

POSITIONS_PER_PASS = 128
"""New positions that are computed together, at most: prompts are read, and batches decoded, so many at a time."""


class LogitsOf(Protocol):
    """What evaluation needs from a model: the logits of a whole sequence."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    def logits(self, tokens: Tokens) -> Logits:
        """Return the logits after each of the tokens (T,), at most the context, on their own: float32 (T, V)."""

    @property
    def losses(self) -> Losses:
        """What computes losses from its logits: `reference.losses`, or the same compiled."""


class ForwardPass(LogitsOf, Protocol):
    """What generation needs from a model."""

    @property
    def kv(self) -> str:
        """The kind of its KV caches."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The model's tensors by name, without ".weight", in forms of quantize.py."""

    @property
    def choose(self) -> Choose:
        """What chooses tokens from its logits: `sampler.choose_token`, or the same compiled."""

    def new_cache(self) -> KVCache:
        """Return an empty KV cache."""

    def prefill(self, cache: KVCache, tokens: Tokens) -> Logits:
        """Append tokens to the cache; return the logits after the last one: float32 (V,)."""

    def decode(self, cache: KVCache, token: int) -> Logits:
        """Append one token to the cache; return the logits after it: float32 (V,)."""

    def extend(self, cache: KVCache, tokens: Tokens) -> Logits:
        """Append tokens, at least one; return the logits after each, those that `decode` gives: float32 (T, V)."""

    def extend_batch(self, caches: Sequence[KVCache], pieces: Sequence[Tokens]) -> Sequence[Logits]:
        """Append some tokens to each of several caches, at most POSITIONS_PER_PASS altogether.

        Returns:
            What `prefill` would for each: float32 (V,).
        """

    def decode_batch(self, caches: Sequence[KVCache], tokens: Sequence[int]) -> Logits:
        """Append one token to each of several caches; return what `decode` would for each: float32 (B, V)."""
