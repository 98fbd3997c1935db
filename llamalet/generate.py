"""Prompts in, tokens out: one text or a batch of them, within the trained context or past it."""

from collections.abc import Collection, Iterable, Iterator, Sequence

from llamalet.checks import checked, elements
from llamalet.drafting import Draft
from llamalet.engine import MAX_BATCH, Ended, Engine, NewToken, Request, make_room
from llamalet.errors import UsageError
from llamalet.forward_pass import ForwardPass, Logits, Tokens
from llamalet.kv_cache import KVCache, free_memory
from llamalet.kv_kinds import cache_bytes
from llamalet.sampler import SamplingConfig
from llamalet.tokenizer import StreamDecoder


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
    if batch_size is not None and not 1 <= (batch_size := checked("batch_size", batch_size, int)) <= MAX_BATCH:
        raise UsageError(f"batch_size={batch_size}: must be between 1 and {MAX_BATCH}")
    requests = [
        Request(prompt=elements("prompt", tokens), sampling=config, stop_tokens=stop_tokens, draft=draft)
        for tokens, config in zip(prompts, configs, strict=True)
    ]
    if draft is not None and len(requests) != 1:
        raise UsageError(f"draft: is for a single text, not for {len(requests)}")
    if batch_size is None:
        batch_size = _batch_size_that_fits(transformer, requests)
    engine = Engine(transformer, undrawn=undrawn, batch_size=batch_size)
    for request in requests:
        engine.add(request)
    return _tokens(engine)


def _batch_size_that_fits(transformer: ForwardPass, requests: Sequence[Request]) -> int:
    """Return how many texts have room for their KV caches in the machine's memory, 1 to MAX_BATCH."""
    context = transformer.config.max_seq_len
    most = max((len(r.prompt) + (r.sampling.max_new_tokens or 0) for r in requests), default=1)
    if any(request.sampling.max_new_tokens is None for request in requests):
        most = context
    # A full cache doubles: one at a time, while its old memory is still there. One more holds the shared prompt.
    n_that_fit = free_memory() // cache_bytes(transformer.config, min(context, 2 * most), transformer.kv) - 2
    return max(1, min(n_that_fit, MAX_BATCH))


def _tokens(engine: Engine) -> Iterator[tuple[int, int | None]]:
    """Yield what generate_batch returns; raise the first error of a text."""
    while engine.busy:
        for event in engine.step():
            if isinstance(event, NewToken):
                yield event.id, event.token
            elif isinstance(event, Ended):
                if event.error is not None:
                    raise event.error
                yield event.id, None


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
