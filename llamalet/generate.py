"""Prompt in, tokens out, one at a time."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig
from llamalet.errors import UsageError
from llamalet.sampler import Sampler
from llamalet.tokenizer import StreamDecoder

Tokens = Sequence[int] | NDArray[np.integer[Any]]


class LogitsOf(Protocol):
    """What evaluation needs of a model: any that computes logits for a whole sequence."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        """Return the logits after each of the tokens (T,), at most the context, on their own: float32 (T, V)."""


class ForwardPass(LogitsOf, Protocol):
    """What generation needs of a model: llamalet.transformer has it, and llamalet.reference in plain numpy."""

    def new_cache(self) -> Any:
        """Return an empty KV cache."""

    def prefill(self, cache: Any, tokens: Tokens) -> NDArray[np.float32]:
        """Append tokens to the cache; return the logits after the last one: float32 (V,)."""

    def decode(self, cache: Any, token: int) -> NDArray[np.float32]:
        """Append one token to the cache; return the logits after it: float32 (V,)."""


def generate(
    transformer: ForwardPass,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_new_tokens: int | None = None,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Return the tokens that continue a prompt, each made when it is asked for.

    Args:
        transformer: the model.
        prompt: ids, at least one; a document's first is BOS.
        sampler: chooses each token.
        max_new_tokens: end after this many; None goes on to the end of the context.
        stop_tokens: end at one of these, which is not yielded.

    Raises:
        UsageError: if the prompt is empty or longer than the context.
        NonFiniteError: with a token, if the model's logits are NaN or infinite.
    """
    context = transformer.config.max_seq_len
    if not 1 <= len(prompt) <= context:
        raise UsageError(f"the prompt has {len(prompt)} tokens; the model takes 1 to {context} (its context)")
    # The last token needs no place in the cache: nothing is asked of the model after it.
    room = context - len(prompt) + 1
    n_new = room if max_new_tokens is None else min(room, max_new_tokens)
    return _continue(transformer, prompt, sampler, n_new, stop_tokens)


def _continue(
    transformer: ForwardPass, prompt: Sequence[int], sampler: Sampler, n_new: int, stop_tokens: Collection[int]
) -> Iterator[int]:
    """Yield up to `n_new` tokens."""
    cache = transformer.new_cache()
    logits = transformer.prefill(cache, prompt)
    for made in range(1, n_new + 1):
        token = sampler.sample(logits)
        if token in stop_tokens:
            return
        yield token
        if made < n_new:
            logits = transformer.decode(cache, token)


def stream(tokens: Iterable[int], decoder: StreamDecoder) -> Iterator[str]:
    """Yield the text of tokens as soon as it is known, never empty, always valid Unicode."""
    for token in tokens:
        text = decoder.push(token)
        if text:
            yield text
    rest = decoder.finish()
    if rest:
        yield rest
