"""Prompts in, tokens out: one text or a batch of them, within the trained context or past it."""

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig
from llamalet.errors import UsageError
from llamalet.kv_cache import KVCache, cache_bytes, free_memory
from llamalet.sampler import Sampler
from llamalet.tokenizer import StreamDecoder

Tokens = Sequence[int] | NDArray[np.integer[Any]]
Logits = NDArray[np.float32]

# What happens to a text that fills the context: it ends, or the cache rolls.
Overflow = Literal["stop", "roll"]

# Texts that the model takes a step with at once.
MAX_BATCH = 64

# First positions that a rolling cache keeps. A softmax has to spend its weight somewhere, and models learn to leave
# what they do not need on the first tokens, which all others see: without these they fall apart. Four are enough.
# Source: https://arxiv.org/abs/2309.17453, table 2.
KEEP = 4


class LogitsOf(Protocol):
    """What evaluation needs of a model: any that computes logits for a whole sequence."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    def logits(self, tokens: Tokens) -> Logits:
        """Return the logits after each of the tokens (T,), at most the context, on their own: float32 (T, V)."""


class ForwardPass(LogitsOf, Protocol):
    """What generation needs of a model: llamalet.kernels.transformer has it, and llamalet.reference in plain numpy."""

    def new_cache(self) -> KVCache:
        """Return an empty KV cache."""

    def prefill(self, cache: KVCache, tokens: Tokens) -> Logits:
        """Append tokens to the cache; return the logits after the last one: float32 (V,)."""

    def decode(self, cache: KVCache, token: int) -> Logits:
        """Append one token to the cache; return the logits after it: float32 (V,)."""

    def decode_batch(self, caches: Sequence[KVCache], tokens: Sequence[int]) -> Logits:
        """Append one token to each of at most MAX_BATCH caches; return what `decode` would for each: float32 (B, V)."""


def generate(
    transformer: ForwardPass,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_new_tokens: int | None = None,
    stop_tokens: Collection[int] = (),
    overflow: Overflow = "stop",
    keep: int = KEEP,
) -> Iterator[int]:
    """Return the tokens that continue a prompt, each made when it is asked for.

    Args:
        transformer: the model.
        prompt: ids, at least one; a document's first is BOS.
        sampler: chooses each token.
        max_new_tokens: end after this many; None goes on to the end of the context, or for ever if that rolls.
        stop_tokens: end at one of these, which is not yielded.
        overflow: "stop" ends when the context is full. "roll" then forgets the older half of it, but for the first
            `keep` tokens, and goes on, in memory that grows no more; a prompt longer than the context is read so too.
        keep: see overflow.

    Raises:
        UsageError: if the prompt is empty, or longer than the context and that does not roll; or if `keep` leaves
            nothing to forget, or another limit is out of range.
        NonFiniteError: with a token, if the model's logits are NaN or infinite.
    """
    events = generate_batch(
        transformer,
        [prompt],
        [sampler],
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        overflow=overflow,
        keep=keep,
    )
    return (token for _, token in events if token is not None)


def generate_batch(
    transformer: ForwardPass,
    prompts: Iterable[Sequence[int]],
    samplers: Iterable[Sampler],
    *,
    max_new_tokens: int | None = None,
    stop_tokens: Collection[int] = (),
    overflow: Overflow = "stop",
    keep: int = KEEP,
    batch_size: int | None = None,
) -> Iterator[tuple[int, int | None]]:
    """Return the tokens that continue each of several prompts, all of them in turn, as (number of the prompt, token).

    After a text's last token comes (number, None). Up to `batch_size` texts share the weights' trip through memory; the
    others wait, and take the places of those that end. Every text is the one that `generate` makes of its prompt and
    its sampler alone.

    Args:
        transformer: the model.
        prompts: ids of each, of any lengths.
        samplers: one for each prompt.
        max_new_tokens: see generate, as for stop_tokens, overflow and keep.
        stop_tokens: see generate.
        overflow: see generate.
        keep: see generate.
        batch_size: texts in the making at once, 1 .. MAX_BATCH; None takes as many as have room for their KV caches in
            the machine's memory.

    Raises:
        UsageError: as generate, or if there are not as many samplers as prompts, or on a batch size out of range.
        NonFiniteError: as generate.
    """
    context, ids, samplers = transformer.config.max_seq_len, [list(prompt) for prompt in prompts], list(samplers)
    if len(ids) != len(samplers):
        raise UsageError(f"{len(ids)} prompts and {len(samplers)} samplers: each text needs its own")
    check_limits(context, max_new_tokens, overflow, keep)
    if batch_size is not None and not 1 <= batch_size <= MAX_BATCH:
        raise UsageError(f"batch_size={batch_size}: must lie between 1 and {MAX_BATCH}")
    texts = deque[_Text]()
    for number, (prompt, sampler) in enumerate(zip(ids, samplers, strict=True)):
        if not prompt or len(prompt) > context and overflow == "stop":
            raise UsageError(f"the prompt has {len(prompt)} tokens; the model takes 1 to {context} (its context)")
        # The last token needs no place in the cache: nothing is asked of the model after it.
        room = context - len(prompt) + 1 if overflow == "stop" else math.inf
        n_left = room if max_new_tokens is None else min(room, max_new_tokens)
        texts.append(_Text(number, prompt, sampler, n_left))
    if batch_size is None:
        positions = max((min(context, len(text.prompt) + text.n_left) for text in texts), default=1)
        # A cache doubles when it is full: one at a time, beside its old memory. Another holds the prompt they share.
        n_that_fit = free_memory() // cache_bytes(transformer.config, min(context, 2 * int(positions))) - 2
        batch_size = max(1, min(n_that_fit, MAX_BATCH))
    return _make(transformer, texts, batch_size, frozenset(stop_tokens), keep)


def check_limits(context: int, max_new_tokens: int | None, overflow: str, keep: int) -> None:
    """Raise a UsageError if one of `generate`'s limits is out of range."""
    if max_new_tokens is not None and max_new_tokens < 0:
        raise UsageError(f"max_new_tokens={max_new_tokens}: must not be negative")
    if overflow not in get_args(Overflow):
        raise UsageError(f"overflow={overflow!r}: must be one of {', '.join(get_args(Overflow))}")
    if overflow == "roll" and not 0 <= keep < context:
        raise UsageError(f"keep={keep}: a context of {context} positions can keep 0 to {context - 1} and roll")


@dataclass(eq=False, slots=True)
class _Text:
    """A text that waits or is in the making."""

    number: int
    prompt: list[int]
    sampler: Sampler
    n_left: float  # tokens that it may still get
    cache: KVCache = field(init=False)  # once it has begun
    token: int = -1  # the newest, which the cache does not have yet


def _make(
    transformer: ForwardPass, waiting: deque[_Text], batch_size: int, stop_tokens: frozenset[int], keep: int
) -> Iterator[tuple[int, int | None]]:
    """Yield what generate_batch returns. A round begins one text, or takes a step with all that have begun."""
    running: list[_Text] = []
    shared: tuple[KVCache, Logits] | None = None  # where the next text's prompt leads, if the last had it too
    while waiting or running:
        if waiting and len(running) < batch_size:
            text = waiting.popleft()
            if text.n_left <= 0:
                yield text.number, None
                continue
            text.cache, logits = shared or _begin(transformer, text.prompt, keep)
            shared = (text.cache.copy(), logits) if waiting and waiting[0].prompt == text.prompt else None
            running.append(text)
            stepping, rows = [text], logits[None]
        else:
            stepping = running.copy()
            for text in stepping:
                make_room(text.cache, keep)  # only if it may roll: otherwise n_left ends it before
            rows = _step(transformer, stepping)
        for text, row in zip(stepping, rows, strict=True):
            text.token = text.sampler.sample(row)
            ended = text.token in stop_tokens
            if not ended:
                yield text.number, text.token
                text.n_left -= 1
            if ended or not text.n_left:
                running.remove(text)
                yield text.number, None


def make_room(cache: KVCache, keep: int) -> None:
    """Let a full cache forget the older half of what follows its first `keep` positions."""
    if cache.length == cache.context:
        cache.roll(keep, max(1, (cache.context - keep) // 2))


def read(transformer: ForwardPass, cache: KVCache, tokens: Sequence[int], keep: int) -> Logits:
    """Append tokens, at least one, to a cache, which rolls where they are more than it has room for.

    Returns:
        The logits after the last one: float32 (V,).
    """
    done = 0
    while done < len(tokens):
        make_room(cache, keep)
        piece = tokens[done : done + cache.context - cache.length]
        logits = transformer.prefill(cache, piece)
        done += len(piece)
    return logits


def _begin(transformer: ForwardPass, prompt: list[int], keep: int) -> tuple[KVCache, Logits]:
    """Return a cache of the prompt, as much of it as the context holds, and the logits after it."""
    cache = transformer.new_cache()
    return cache, read(transformer, cache, prompt, keep)


def _step(transformer: ForwardPass, texts: Sequence[_Text]) -> Logits:
    """Give the model the newest token of each text; return the logits after them: (B, V)."""
    if len(texts) == 1:
        return transformer.decode(texts[0].cache, texts[0].token)[None]
    return transformer.decode_batch([text.cache for text in texts], [text.token for text in texts])


def stream(events: Iterable[tuple[int, int | None]], decoders: Sequence[StreamDecoder]) -> Iterator[tuple[int, str]]:
    """Yield the texts of what generate_batch returns, as (number, piece): never empty, always valid Unicode.

    Args:
        events: (number, token), and (number, None) at a text's end.
        decoders: one for each text.
    """
    for number, token in events:
        text = decoders[number].finish() if token is None else decoders[number].push(token)
        if text:
            yield number, text
