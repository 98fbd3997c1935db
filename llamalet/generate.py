"""Prompts in, tokens out: one text or a batch of them, within the trained context or past it."""

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from llamalet.checks import checked, elements, token_ids
from llamalet.drafting import Draft
from llamalet.errors import UsageError
from llamalet.forward_pass import ForwardPass, Logits, Tokens
from llamalet.kv_cache import KVCache, free_memory
from llamalet.kv_kinds import cache_bytes
from llamalet.sampler import Sampler, SamplingConfig
from llamalet.tokenizer import StreamDecoder

# Number of texts that advance by one token in one pass through the model.
MAX_BATCH = 64


def generate_batch(
    transformer: ForwardPass,
    prompts: Iterable[Tokens],
    configs: Iterable[SamplingConfig],
    *,
    stop_tokens: Collection[int] = (),
    undrawn: Collection[int] = (),
    batch_size: int | None = None,
    draft: Draft | None = None,
) -> Iterator[tuple[int, int | None]]:
    """Return the tokens that continue each of several prompts, as (number of the prompt, token).

    Tokens are computed one by one, on demand. After a text's last token comes (number, None). Up to `batch_size` texts
    share the weights' trip through memory; the others wait and take the places of those that end. Every text is the
    one that its prompt and its settings give alone.

    Args:
        transformer: the model.
        prompts: ids of each, at least one; a document's first is BOS. They may differ in length.
        configs: the settings of each text. One with overflow="stop" ends when the context is full. With "roll" the
            cache then forgets its older half, except the first `keep` tokens, in constant memory; a prompt longer than
            the context is read the same way.
        stop_tokens: a text ends at one of these, which is not yielded, unless its settings say ignore_eos.
        undrawn: the ids that no text may get.
        batch_size: number of texts in progress at once, 1 .. MAX_BATCH; None: as many as have room for their KV caches
            in the machine's memory.
        draft: what proposes tokens of a single text, for more speed.

    Raises:
        UsageError: if a prompt is empty, has other ids than the model, or is longer than a context that does not roll;
            or if `keep` leaves a rolling context nothing to forget; or if there is a draft and not one prompt.
        ConfigError: if the batch size is no whole number.
        NonFiniteError: with a token, if the model's logits are NaN or infinite.
    """
    context = transformer.config.max_seq_len
    if batch_size is not None and not 1 <= (batch_size := checked("batch_size", batch_size, int)) <= MAX_BATCH:
        raise UsageError(f"batch_size={batch_size}: must be between 1 and {MAX_BATCH}")
    texts = deque[_Text]()
    for number, (tokens, config) in enumerate(zip(prompts, configs, strict=True)):
        tokens = elements("prompt", tokens)
        check_prompt(tokens, config, context)
        prompt = token_ids(tokens, transformer.config.vocab_size).tolist()
        # The last token needs no room in the cache: nothing is computed after it.
        room = context - len(prompt) + 1 if config.overflow == "stop" else math.inf
        n_left = room if config.max_new_tokens is None else min(room, config.max_new_tokens)
        stops = frozenset[int]() if config.ignore_eos else frozenset(stop_tokens)
        sampler = Sampler(transformer.config.vocab_size, config, undrawn, transformer.choose)
        texts.append(_Text(number, prompt, sampler, stops, config.keep, n_left))
    if draft is not None:
        if len(texts) != 1:
            raise UsageError(f"draft: is for a single text, not for {len(texts)}")
        return _generate_drafted(transformer, texts[0], draft)
    if batch_size is None:
        positions = max((min(context, len(text.prompt) + text.n_left) for text in texts), default=1)
        # A full cache doubles: one at a time, while its old memory is still there. One more holds the shared prompt.
        n_that_fit = (
            free_memory() // cache_bytes(transformer.config, min(context, 2 * int(positions)), transformer.kv) - 2
        )
        batch_size = max(1, min(n_that_fit, MAX_BATCH))
    return _generate(transformer, texts, batch_size)


def check_prompt(prompt: Tokens, config: SamplingConfig, context: int) -> None:
    """Raise a UsageError if a context of this many positions cannot take a prompt with these settings."""
    check_keep(config, context)
    if not len(prompt):
        raise UsageError("the prompt is empty, and this model's texts begin with no token of their own: give a prompt")
    if len(prompt) > context and config.overflow == "stop":
        raise UsageError(f"the prompt has {len(prompt)} tokens; the model takes 1 to {context} (its context)")


def check_keep(config: SamplingConfig, context: int) -> None:
    """Raise a UsageError if a rolling context of this many positions would have nothing to forget."""
    if config.overflow == "roll" and config.keep >= context:
        raise UsageError(f"keep={config.keep}: a context of {context} positions can keep 0 to {context - 1} and roll")


@dataclass(eq=False, slots=True)
class _Text:
    """A text that waits or is in progress."""

    number: int
    prompt: list[int]
    sampler: Sampler
    stop_tokens: frozenset[int]
    keep: int
    n_left: float  # tokens that it may still get
    cache: KVCache = field(init=False)  # once it has begun
    token: int = -1  # the newest, which the cache does not have yet


def _generate(transformer: ForwardPass, waiting: deque[_Text], batch_size: int) -> Iterator[tuple[int, int | None]]:
    """Yield what generate_batch returns. Each round begins one text or advances all that have begun by a token."""
    running: list[_Text] = []
    shared: tuple[KVCache, Logits] | None = None  # the state after the next text's prompt, if the last had the same
    while waiting or running:
        if waiting and len(running) < batch_size:
            text = waiting.popleft()
            if text.n_left <= 0:
                shared = None
                yield text.number, None
                continue
            if shared is None:
                text.cache = transformer.new_cache()
                logits = read_tokens(transformer, text.cache, text.prompt, text.keep)
            else:
                text.cache, logits = shared
            same_start = waiting and (waiting[0].prompt, waiting[0].keep) == (text.prompt, text.keep)
            shared = (text.cache.copy(), logits) if same_start else None
            running.append(text)
            advancing, rows = [text], logits[None]
        else:
            advancing = running.copy()
            for text in advancing:
                make_room(text.cache, text.keep)  # only if it may roll: otherwise n_left ends it before
            rows = _step(transformer, advancing)
        for text, row in zip(advancing, rows, strict=True):
            text.token = text.sampler.sample(row)
            ended = text.token in text.stop_tokens
            if not ended:
                yield text.number, text.token
                text.n_left -= 1
            if ended or not text.n_left:
                running.remove(text)
                yield text.number, None


def _generate_drafted(transformer: ForwardPass, text: _Text, draft: Draft) -> Iterator[tuple[int, int | None]]:
    """Yield what `_generate` yields for a single text, several tokens a pass; see drafting.py."""
    if text.n_left <= 0:
        yield text.number, None
        return
    draft.begin()
    tokens, proposed = list(text.prompt), list[int]()
    text.cache = transformer.new_cache()
    rows = read_tokens(transformer, text.cache, text.prompt, text.keep)[None]
    n_before = text.cache.length  # positions before those of the proposals
    while True:
        kept = 0
        while True:
            token = text.sampler.sample(rows[kept])
            if token in text.stop_tokens:
                break
            yield text.number, token
            tokens.append(token)
            text.n_left -= 1
            if not text.n_left or kept == len(proposed) or token != proposed[kept]:
                break
            kept += 1
        draft.settle(len(proposed), kept)
        if token in text.stop_tokens or not text.n_left:
            break
        text.cache.truncate(n_before + kept)  # what follows was computed from a token that is not in the text
        make_room(text.cache, text.keep)
        # Not past the end of the context: it rolls, if it may, before the token that it would roll before without.
        n = int(min(draft.size, text.n_left - 1, text.cache.context - text.cache.length - 1))
        proposed = draft.propose(tokens, n, text.sampler) if n > 0 else []
        n_before = text.cache.length + 1
        if proposed:
            rows = transformer.extend(text.cache, [token, *proposed])
        else:
            rows = transformer.decode(text.cache, token)[None]
    yield text.number, None


def make_room(cache: KVCache, keep: int) -> None:
    """Make a full cache forget the older half of what follows its first `keep` positions."""
    if cache.length == cache.context:
        cache.roll(keep, max(1, (cache.context - keep) // 2))


def read_tokens(transformer: ForwardPass, cache: KVCache, tokens: Sequence[int], keep: int) -> Logits:
    """Append tokens, at least one, to a cache, which rolls whenever it is full.

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


def _step(transformer: ForwardPass, texts: Sequence[_Text]) -> Logits:
    """Give the model the newest token of each text; return the logits after them: (B, V)."""
    if len(texts) == 1:
        return transformer.decode(texts[0].cache, texts[0].token)[None]
    return transformer.decode_batch([text.cache for text in texts], [text.token for text in texts])


def stream(events: Iterable[tuple[int, int | None]], decoders: Sequence[StreamDecoder]) -> Iterator[tuple[int, str]]:
    """Decode what generate_batch returns into (number, piece of text), never empty and always valid Unicode.

    Args:
        events: (number, token), and (number, None) at a text's end.
        decoders: one for each text.
    """
    for number, token in events:
        text = decoders[number].finish() if token is None else decoders[number].push(token)
        if text:
            yield number, text
