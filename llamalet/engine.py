"""The one loop that makes texts: requests in, events out, on one thread.

Up to MAX_BATCH texts advance by a token in one pass through the model; the others wait, and take the places of those
that end. Beside running texts, prompts are read in chunks, mostly in the same passes. Whatever runs beside it, a text
gets the bits that it would get alone, because the kernels give each position the same bits in any company.
"""

import contextlib
import itertools
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamalet.checks import elements, token_ids
from llamalet.drafting import Draft
from llamalet.errors import LlamaletError, NonFiniteError, OutOfMemoryError, UsageError
from llamalet.forward_pass import POSITIONS_PER_PASS, ForwardPass, Logits, Tokens
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import cache_bytes
from llamalet.logprobs import Logprobs, logprobs_of
from llamalet.prefix_cache import BLOCK, PrefixCache
from llamalet.sampler import Sampler, SamplingConfig
from llamalet.spare_caches import SpareCaches
from llamalet.stop_strings import TextStream
from llamalet.tokenizer import StreamDecoder

MAX_BATCH = 64
"""Texts that advance by one token in one pass through the model."""

LEAST_CHUNK, CHUNK, MOST_CHUNK = 4, 128, 512
"""Tokens of a prompt that are read at once: at least; with their logprobs at most; and while no text runs at most."""

TURN = 256
"""So many tokens of a prompt are read before the next one has its turn."""

IDLE_CHUNK_S = 0.1
"""What reading a chunk may take when nobody waits for tokens, in seconds."""

MOST_SHARES = 4
"""Reading gets its share of a pass once for each prompt that is read, but at most so often."""

MOST_WITH_CHUNKS = 32
"""So many passes in a row may read chunks; then one without shows what the texts alone take."""

NEW_WEIGHT = 0.25
"""How much a new measurement counts beside those before it."""

ENOUGH_READ = 16
"""So many tokens say what one takes; fewer say little."""

SPARE_BYTES = 1 << 28
"""At most so many bytes of the caches of texts that have ended are kept for those that begin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A text to make.

    Attributes:
        prompt: ids, at least one; a document's first is BOS.
        sampling: how tokens are chosen, and when the text ends. With overflow="stop" it ends when the context is full.
            With "roll" the cache then forgets its older half, except the first `keep` tokens, in constant memory; a
            prompt longer than the context is read the same way.
        stop_tokens: the text ends at one of these, unless its settings say ignore_eos.
        yields_stop: whether the stop token that ends the text gets a NewToken, without text.
        bias: what is added to the logits of some tokens before one is chosen.
        decoder: makes text of the tokens; None: events have no text.
        stop: the text ends before any of these strings, which need a decoder.
        logprobs: how many of the likeliest tokens come with each new token's logprob; None: no logprobs.
        prompt_logprobs: the same for the prompt's tokens.
        wants_logits: whether Begun has the logits after the prompt.
        salt: texts share what the prefix cache keeps only with texts of the same salt.
        draft: what proposes tokens while no other text runs or is read.
        sampler: what chooses tokens, instead of a new one.
        cache: what has the keys and values of the first tokens of the prompt; the engine adds to it.
        n_known: how many tokens of the prompt that are; the cache may have rolled.
    """

    prompt: Tokens
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop_tokens: Collection[int] = ()
    yields_stop: bool = False
    bias: Mapping[int, float] = field(default_factory=dict)
    decoder: StreamDecoder | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    wants_logits: bool = False
    salt: str = ""
    draft: Draft | None = None
    sampler: Sampler | None = None
    cache: KVCache | None = None
    n_known: int = 0


class Begun(NamedTuple):
    """The prompt of a text has been read.

    n_cached: tokens of it that came from the prefix cache.
    prompt_logprobs: of each of its tokens, if asked for; None for the first.
    logits: after it, float32 (V,), if asked for.
    """

    id: int
    n_cached: int
    prompt_logprobs: list[Logprobs | None] | None
    logits: Logits | None


class NewToken(NamedTuple):
    """A text got a token.

    text: what is certain with it: none, its text, or that of several.
    """

    id: int
    token: int
    text: str
    logprobs: Logprobs | None


class Ended(NamedTuple):
    """A text has ended; nothing else of it follows.

    text: the rest.
    reason: "stop" (a stop token or string), "length", "cancelled" or "error".
    """

    id: int
    text: str
    reason: str
    error: Exception | None


Event = Begun | NewToken | Ended


class _Text:
    """A text that waits, is read, or runs."""

    def __init__(self, id: int, request: Request, prompt: list[int], sampler: Sampler, context: int) -> None:
        config = request.sampling
        self.id, self.request, self.prompt, self.sampler = id, request, prompt, sampler
        self.keep = config.keep
        # The last token needs no room in the cache: nothing is computed after it.
        room = context - len(prompt) + 1 if config.overflow == "stop" else math.inf
        self.n_left = room if config.max_new_tokens is None else min(room, config.max_new_tokens)
        self.stop_tokens = frozenset[int]() if config.ignore_eos else frozenset(request.stop_tokens)
        self.stream = None if request.decoder is None else TextStream(request.decoder, request.stop)
        self.bias = None
        if request.bias:
            ids, values = zip(*request.bias.items(), strict=True)
            self.bias = np.array(ids), np.array(values, np.float32)
        self.tokens: list[int] = []  # the new ones; the cache does not have the newest yet
        self.cache, self.n_read = request.cache, request.n_known  # and how many tokens of the prompt it was given
        self.n_cached = 0
        self.rolled = False
        self.n_bytes = 0
        self.prompt_logprobs: list[Logprobs | None] | None = None if request.prompt_logprobs is None else [None]
        # What texts with the same logits after their prompts have in common; None: it shares with none.
        self.begins_alike: tuple[int, str, bytes] | None = None
        if request.cache is None and request.prompt_logprobs is None:
            self.begins_alike = self.keep, request.salt, np.array(prompt).tobytes()


class _Chunk(NamedTuple):
    """Tokens of a prompt, and the cache that they are read into."""

    text: _Text
    cache: KVCache
    tokens: list[int]


class Engine:
    """Makes texts together. Everything is called on one thread.

    Attributes:
        prefix: what is kept of texts for those that begin alike.
        reserved_bytes: of the KV caches of texts that have a place, with all their tokens.
        admitted: the numbers of the texts that got a place in the last step.
    """

    def __init__(
        self,
        transformer: ForwardPass,
        *,
        undrawn: Collection[int] = (),
        batch_size: int = MAX_BATCH,
        kv_bytes: float = math.inf,
        prefix_bytes: int = 0,
        reading_share: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare to make texts.

        Args:
            transformer: the model.
            undrawn: ids that no text may get.
            batch_size: number of texts that have a place at once, 1 to MAX_BATCH.
            kv_bytes: at most so many bytes for the KV caches of texts that have a place, and for those kept for the
                next ones; a single text may take more.
            prefix_bytes: size of the prefix cache, at most.
            reading_share: how much longer a pass may take that also reads a chunk of a prompt, relative to one that
                does not; as much again for each further prompt, up to MOST_SHARES. None: prompts are read at once, each
                as a whole.
            clock: returns seconds.
        """
        self.prefix = PrefixCache(prefix_bytes)
        self._spare = SpareCaches(min(SPARE_BYTES, kv_bytes))
        self.reserved_bytes = 0
        self.admitted: list[int] = []
        self._transformer, self._undrawn, self._clock = transformer, undrawn, clock
        self._batch_size, self._kv_bytes, self._reading_share = batch_size, kv_bytes, reading_share
        self._n_added = 0
        self._waiting = OrderedDict[object, deque[_Text]]()
        self._reading: list[_Text] = []
        self._running: list[_Text] = []
        self._cancelled = set[int]()
        # The state after a prompt that another text has, too.
        self._shared: tuple[Any, KVCache, Logits] | None = None
        # What passes without chunks took, of how many texts the last was, and how many passes had chunks since.
        self._pass_s, self._n_measured, self._n_with_chunks = 0.0, 0, MOST_WITH_CHUNKS
        # What a token of a prompt takes, at first a guess; how much a new measurement counts; what was read since.
        self._token_s, self._weight = IDLE_CHUNK_S / ENOUGH_READ, 1.0
        self._reading_s, self._n_read = 0.0, 0

    @property
    def busy(self) -> bool:
        """Whether any text has not ended."""
        return bool(self._waiting or self._reading or self._running)

    @property
    def spare_bytes(self) -> int:
        """Bytes of caches that are kept for the next texts."""
        return self._spare.n_bytes

    @property
    def n_waiting(self) -> int:
        """Number of texts without a place."""
        return sum(map(len, self._waiting.values()))

    @property
    def n_running(self) -> int:
        """Number of texts that have a place."""
        return len(self._reading) + len(self._running)

    def add(self, request: Request, group: object = None) -> int:
        """Let a text wait for its place; return its number, one more than the last. Groups of texts take turns.

        Raises:
            UsageError: if the prompt is empty, has other ids than the model, or is longer than a context that does not
                roll; or if `keep` leaves a rolling context nothing to forget.
        """
        config, shape = request.sampling, self._transformer.config
        tokens = elements("prompt", request.prompt)
        check_prompt(tokens, config, shape.max_seq_len)
        if request.n_known >= len(tokens):
            raise UsageError(f"n_known={request.n_known}: the last of the prompt's {len(tokens)} tokens must be read")
        prompt = token_ids(tokens, shape.vocab_size).tolist()
        sampler = request.sampler or Sampler(shape.vocab_size, config, self._undrawn, self._transformer.choose)
        text = _Text(self._n_added, request, prompt, sampler, shape.max_seq_len)
        # A full cache doubles.
        positions = int(min(shape.max_seq_len, 2 * (len(prompt) + text.n_left)))
        text.n_bytes = cache_bytes(shape, positions, self._transformer.kv)
        self._n_added += 1
        self._waiting.setdefault(group, deque()).append(text)
        return text.id

    def cancel(self, id: int) -> None:
        """End a text with the next step. Nothing happens if it has ended."""
        if any(text.id == id for text in self._texts()):
            self._cancelled.add(id)

    def step(self) -> list[Event]:
        """Let every running text advance by a token, and read parts of prompts; return what happened, in order."""
        events: list[Event] = []
        self.admitted = []
        if self._cancelled:
            self._end_cancelled(events)
        self._admit(events)
        if self._reading and self._reading_share is None:
            self._read(self._reading[0], math.inf, events)
        elif self._running:
            self._advance_and_read(events)
        elif self._reading:
            self._read_for_a_while(events)
        if self._shared is not None and not self._another_begins(self._shared[0]):
            self._shared = None
        return events

    # --- who has a place ---

    def _texts(self) -> Iterator[_Text]:
        """Yield all texts that have not ended."""
        yield from self._running
        yield from self._reading
        for texts in self._waiting.values():
            yield from texts

    def _end_cancelled(self, events: list[Event]) -> None:
        """End the texts that `cancel` named."""
        for text in list(self._texts()):
            if text.id in self._cancelled:
                self._end(text, "cancelled", events)
        self._cancelled.clear()

    def _admit(self, events: list[Event]) -> None:
        """Give waiting texts a place, while there are places and memory, one of each group in turn."""
        while self._waiting and self.n_running < self._batch_size:
            group, texts = next(iter(self._waiting.items()))
            text = texts[0]
            if self.n_running and self.reserved_bytes + text.n_bytes > self._kv_bytes:
                return
            texts.popleft()
            self._waiting.move_to_end(group)
            if not texts:
                del self._waiting[group]
            self.reserved_bytes += text.n_bytes
            self._reading.append(text)
            self.admitted.append(text.id)
            if text.n_left <= 0 and text.prompt_logprobs is None and not text.request.wants_logits:
                self._end(text, "length", events)

    def _end(self, text: _Text, reason: str, events: list[Event], error: Exception | None = None) -> None:
        """Take a text's place. The prefix cache keeps its keys and values, the next texts get its memory."""
        if text in self._running:
            self._running.remove(text)
            if reason != "error":
                self._remember(text, [*text.prompt, *text.tokens])
        elif text in self._reading:
            self._reading.remove(text)
        else:
            for group, texts in list(self._waiting.items()):
                if text in texts:
                    texts.remove(text)
                    if not texts:
                        del self._waiting[group]
            text.n_bytes = 0
        self.reserved_bytes -= text.n_bytes
        events.append(Ended(text.id, "" if text.stream is None else text.stream.finish(), reason, error))
        if text.cache is not None and text.request.cache is None and error is None:
            self._spare.give(text.cache)
        text.cache = None

    def _remember(self, text: _Text, tokens: list[int]) -> None:
        """Keep a text's keys and values in the prefix cache: those of its first tokens."""
        request = text.request
        is_alone = request.cache is not None or request.draft is not None  # what a draft proposed may be in the cache
        if self.prefix.max_bytes and text.cache is not None and not text.rolled and not is_alone:
            with contextlib.suppress(MemoryError):  # nobody needs it
                self.prefix.store(tokens[: text.cache.length], text.request.salt, text.cache)

    # --- reading prompts ---

    def _read_for_a_while(self, events: list[Event]) -> None:
        """Read prompts while no text runs, until one is complete or IDLE_CHUNK_S are over: at least one chunk."""
        self._n_with_chunks = MOST_WITH_CHUNKS  # what is known of passes will be old when one comes
        end = self._clock() + IDLE_CHUNK_S
        while not self._running and (text := self._next_to_read()) is not None:
            start = self._clock()
            self._read(text, self._chunk_size(IDLE_CHUNK_S), events)
            now = self._clock()
            if now + (now - start) > end:
                return

    def _chunk_size(self, seconds: float) -> int:
        """Return how many tokens of a prompt are read in about this time."""
        return int(min(max(seconds / self._token_s, LEAST_CHUNK), MOST_CHUNK))

    def _note_speed(self, seconds: float, n: int) -> None:
        """Learn from what reading n tokens took; from a single chunk not too much, as it may have been disturbed."""
        self._reading_s += seconds
        self._n_read += n
        if self._n_read >= ENOUGH_READ:
            self._token_s += self._weight * (self._reading_s / self._n_read - self._token_s)
            self._token_s, self._weight = max(self._token_s, 1e-9), NEW_WEIGHT
            self._reading_s, self._n_read = 0.0, 0

    def _next_to_read(self, taken: Collection[_Text] = ()) -> _Text | None:
        """Return the text whose prompt goes on: each in turn, but none of `taken`, or like one that has begun."""
        begun = [other.begins_alike for other in self._reading if other.n_read or other in taken]
        for text in self._reading:
            waits = not text.n_read and text.begins_alike is not None and text.begins_alike in begun
            if not waits and text not in taken:
                return text
        return None

    def _has_read(self, text: _Text, n_before: int) -> None:
        """Note that more of a prompt has been read: keep it for others, and let these have their turn."""
        # By whole blocks, and not all at the end, which would hold up those that run.
        if text.n_read // BLOCK > n_before // BLOCK:
            self._remember(text, text.prompt[: text.n_read])
        if text.n_read // TURN > n_before // TURN:
            self._reading.remove(text)
            self._reading.append(text)

    def _read(self, text: _Text, n: float, events: list[Event]) -> None:
        """Read at most n tokens of a prompt in passes of their own; after its last one the text begins to run."""
        try:
            logits = self._begin(text) if text.cache is None else None
            if logits is None:
                logits = self._read_chunk(text, n)
        except (LlamaletError, MemoryError) as error:
            self._end(text, "error", events, error)
            return
        if logits is not None and text.n_read == len(text.prompt):
            self._start(text, logits, events)

    def _start(self, text: _Text, logits: Logits, events: list[Event]) -> None:
        """Let a text run whose prompt has been read: choose its first new token from the logits after it."""
        self._reading.remove(text)
        self._running.append(text)
        self._share(text, logits)
        if text.request.draft is not None:
            text.request.draft.begin()
        wanted = logits if text.request.wants_logits else None
        events.append(Begun(text.id, text.n_cached, text.prompt_logprobs, wanted))
        if text.n_left <= 0:
            self._end(text, "length", events)
        else:
            self._choose(text, logits, events)

    def _begin(self, text: _Text) -> Logits | None:
        """Give a text a cache, with what is known of its prompt; return the logits after it, if that is all of it.

        Raises:
            OutOfMemoryError, MemoryError: if there is no memory for it.
        """
        if self._shared is not None and self._shared[0] == text.begins_alike:
            text.cache, text.n_read = self._new_cache(text), len(text.prompt)
            text.cache.copy_from(self._shared[1])
            text.rolled = len(text.prompt) > text.cache.context
            return self._shared[2]
        text.cache = self._new_cache(text)
        if self.prefix.max_bytes and text.prompt_logprobs is None and text.request.sampling.overflow == "stop":
            text.n_read = text.n_cached = self.prefix.restore(text.prompt, text.request.salt, text.cache)
        return None

    def _new_cache(self, text: _Text) -> KVCache:
        """Return an empty cache for a text, with room for its prompt: one of a text that has ended, if one fits.

        Raises:
            OutOfMemoryError, MemoryError: if there is no memory for it.
        """
        # Room at once: growing copies everything. For tokens that may not come, no more than growing would take.
        context, n_prompt = self._transformer.config.max_seq_len, len(text.prompt)
        least = int(min(context, n_prompt + min(text.n_left, n_prompt)))
        wanted = int(min(context, n_prompt + text.n_left))
        cache = self._spare.take(least, wanted, text.n_bytes)
        begun = [text, *(other for other in (*self._reading, *self._running) if other.cache is not None)]
        n_bytes = self._kv_bytes - sum(other.n_bytes for other in begun)
        self._spare.shrink_to(n_bytes, self._batch_size - len(begun))
        if cache is None:
            cache = self._transformer.new_cache()
        self._reserve(cache, least)
        return cache

    def _reserve(self, cache: KVCache, length: int) -> None:
        """Make room in a cache for `length` positions; spare caches go if the memory is not enough.

        Raises:
            OutOfMemoryError, MemoryError: if it still is not.
        """
        try:
            cache.reserve(length)
        except (OutOfMemoryError, MemoryError):
            self._spare.shrink_to(0)
            cache.reserve(length)

    def _read_chunk(self, text: _Text, n: float) -> Logits | None:
        """Read at most n tokens of a prompt, and all if n is infinite; return the logits after the last token.

        Raises:
            LlamaletError: if there is no memory for them, or the logits are NaN or infinite.
        """
        start, n_before = self._clock(), text.n_read
        assert text.cache is not None
        end = min(len(text.prompt), text.n_read + n)
        logits: Logits | None = None
        while text.n_read < end:
            self._make_room(text)
            cache = text.cache
            piece = text.prompt[text.n_read : int(min(end, text.n_read + cache.context - cache.length))]
            logits = self._read_piece(text, cache, piece)
            text.n_read += len(piece)
        self._note_speed(self._clock() - start, text.n_read - n_before)
        self._has_read(text, n_before)
        return logits

    def _next_chunks(self, end: float, events: list[Event]) -> list[_Chunk]:
        """Return the next tokens of prompts: as many as `end` allows and fit into a pass."""
        chunks: list[_Chunk] = []
        n = self._chunk_size(end - self._clock())
        while n > 0 and (text := self._next_to_read([chunk.text for chunk in chunks])) is not None:
            n_in_pass = len(self._running) + sum(len(chunk.tokens) for chunk in chunks)
            if n_in_pass >= POSITIONS_PER_PASS or text.prompt_logprobs is not None:
                break
            try:
                if text.cache is None:
                    known = self._begin(text)
                    seconds = end - self._clock()  # copying what the prefix cache knows took some
                    n = min(n, self._chunk_size(seconds)) if seconds > 0 else 0
                    if known is not None:
                        self._start(text, known, events)
                        continue
                    if not n and chunks:
                        break
                    n = max(n, LEAST_CHUNK)  # a pass without any other chunk has room for the least
                self._make_room(text)
                cache = text.cache
                assert cache is not None
                size = min(n, POSITIONS_PER_PASS - n_in_pass, cache.context - cache.length)
                tokens = text.prompt[text.n_read : text.n_read + size]
                self._reserve(cache, cache.length + len(tokens))
            except (LlamaletError, MemoryError) as error:
                self._end(text, "error", events, error)
                continue
            chunks.append(_Chunk(text, cache, tokens))
            n -= len(tokens)
        return chunks

    def _take_chunk(self, chunk: _Chunk, logits: Logits, events: list[Event]) -> None:
        """Note that a chunk has been read, with these logits after it."""
        text, n_before = chunk.text, chunk.text.n_read
        text.n_read += len(chunk.tokens)
        self._has_read(text, n_before)
        if text.n_read == len(text.prompt):
            self._start(text, logits, events)

    def _read_piece(self, text: _Text, cache: KVCache, piece: list[int]) -> Logits:
        """Append tokens of a prompt to its cache; return the logits after the last one."""
        n_top, found = text.request.prompt_logprobs, text.prompt_logprobs
        if n_top is None or found is None:
            return self._transformer.prefill(cache, piece)
        first = text.n_read
        for start in range(0, len(piece), CHUNK):  # in parts: the logits of all are large
            part = piece[start : start + CHUNK]
            rows = self._transformer.extend(cache, part)
            if not np.isfinite(rows).all():
                raise NonFiniteError("the logits of the prompt are NaN or infinite: the model's weights are damaged")
            following = text.prompt[first + start + 1 : first + start + 1 + len(part)]
            found += logprobs_of(rows[: len(following)], following, n_top)
        return rows[-1]

    def _share(self, text: _Text, logits: Logits) -> None:
        """Keep a copy of a cache that has just read its prompt, if another text begins alike."""
        alike = text.begins_alike
        if alike is not None and self._shared is None and self._another_begins(alike):
            assert text.cache is not None
            with contextlib.suppress(MemoryError):  # without a copy the other reads its prompt itself
                self._shared = alike, text.cache.copy(), logits

    def _another_begins(self, alike: Any) -> bool:
        """Return whether a text without a token yet begins like this; of those that wait, the next of each group."""
        waiting = (texts[0] for texts in itertools.islice(self._waiting.values(), MAX_BATCH))
        return any(other.begins_alike == alike for other in itertools.chain(self._reading, waiting))

    # --- making tokens ---

    def _advance_and_read(self, events: list[Event]) -> None:
        """Let every running text advance by a token, and read chunks of prompts in the same pass."""
        start, n_running, text = self._clock(), len(self._running), self._next_to_read()
        is_measured = 0.75 * self._n_measured <= n_running <= 1.5 * self._n_measured
        is_measured &= self._n_with_chunks < MOST_WITH_CHUNKS
        # The logprobs of a prompt take the logits after every token.
        if text is None or not is_measured or text.prompt_logprobs is not None:
            self._advance(events)
            weight = NEW_WEIGHT if n_running == self._n_measured else 1
            self._pass_s += weight * (self._clock() - start - self._pass_s)
            self._n_measured, self._n_with_chunks = n_running, 0
            if text is not None and text.prompt_logprobs is not None:
                self._read(text, self._chunk_size((self._reading_share or 0) * self._pass_s), events)
            return
        self._n_with_chunks += 1
        pass_s = self._pass_s * n_running / self._n_measured
        n_prompts = len({text.begins_alike or text.id for text in self._reading})  # those that are alike are read once
        n_shares = min(n_prompts, MOST_SHARES)
        chunks = self._next_chunks(start + n_shares * (self._reading_share or 0) * pass_s, events)
        start, n_texts = self._clock(), len(self._running)
        n_read = self._advance(events, chunks)
        if n_read and n_texts == self._n_measured:  # the cost of other texts would count as that of tokens
            self._note_speed(self._clock() - start - pass_s, n_read)

    def _advance(self, events: list[Event], chunks: Sequence[_Chunk] = ()) -> int:
        """Let every running text advance by a token, and read chunks in the same pass; return their tokens' number."""
        if not chunks and len(self._running) == 1 and self._running[0].request.draft is not None:
            self._advance_drafted(self._running[0], self._running[0].request.draft, events)
            return 0
        texts = []
        for text in list(self._running):
            try:
                self._make_room(text)
                assert text.cache is not None
                self._reserve(text.cache, text.cache.length + 1)
                texts.append(text)
            except (LlamaletError, MemoryError) as error:
                self._end(text, "error", events, error)
        caches = [*(text.cache for text in texts), *(chunk.cache for chunk in chunks)]
        lengths = [(cache, cache.length) for cache in caches if cache is not None]
        rows = None
        while rows is None:
            try:
                rows = self._pass(texts, chunks)
            except MemoryError as error:
                for cache, length in lengths:  # in numpy some may have grown
                    cache.truncate(length)
                if len(self._spare):
                    self._spare.shrink_to(0)
                elif chunks:  # those that run had enough before
                    for chunk in chunks:
                        self._end(chunk.text, "error", events, error)
                    chunks = ()
                else:
                    raise
        for text, row in zip(texts, rows[: len(texts)], strict=True):
            self._choose(text, row, events)
        for chunk, row in zip(chunks, rows[len(texts) :], strict=True):
            self._take_chunk(chunk, row, events)
        return sum(len(chunk.tokens) for chunk in chunks)

    def _pass(self, texts: Sequence[_Text], chunks: Sequence[_Chunk]) -> Sequence[Logits]:
        """Append the newest tokens of texts and the chunks to their caches; return the logits after each."""
        caches, tokens = [text.cache for text in texts if text.cache is not None], [text.tokens[-1] for text in texts]
        if chunks:
            pieces = [*([token] for token in tokens), *(chunk.tokens for chunk in chunks)]
            return self._transformer.extend_batch([*caches, *(chunk.cache for chunk in chunks)], pieces)
        if len(texts) > 1:
            return list(self._transformer.decode_batch(caches, tokens))
        return [self._transformer.decode(caches[0], tokens[0])] if texts else []

    def _advance_drafted(self, text: _Text, draft: Draft, events: list[Event]) -> None:
        """Let the only text advance by as many tokens as its draft proposes rightly, and one more; see drafting.py."""
        cache, tokens = text.cache, text.tokens
        assert cache is not None
        try:
            self._make_room(text)
            # Not past the end of the context: it rolls, if it may, before the token that it would roll before without.
            n = int(min(draft.size, text.n_left - 1, cache.context - cache.length - 1))
            proposed = draft.propose([*text.prompt, *tokens], n, text.sampler) if n > 0 else []
            n_before = cache.length + 1  # positions before those of the proposals
            if proposed:
                rows = self._transformer.extend(cache, [tokens[-1], *proposed])
            else:
                rows = self._transformer.decode(cache, tokens[-1])[None]
        except (LlamaletError, MemoryError) as error:
            self._end(text, "error", events, error)
            return
        kept = 0
        while self._choose(text, rows[kept], events) and kept < len(proposed) and tokens[-1] == proposed[kept]:
            kept += 1
        draft.settle(len(proposed), kept)
        if text.cache is not None:
            cache.truncate(n_before + kept)  # what follows was computed from a token that is not in the text

    def _choose(self, text: _Text, logits: Logits, events: list[Event]) -> bool:
        """Choose a text's next token; return whether the text goes on."""
        request = text.request
        try:
            token = text.sampler.sample(logits if text.bias is None else _biased(logits, *text.bias))
        except LlamaletError as error:
            self._end(text, "error", events, error)
            return False
        is_stop = token in text.stop_tokens
        if is_stop and not request.yields_stop:
            self._end(text, "stop", events)
            return False
        logprobs = None if request.logprobs is None else logprobs_of(logits[None], [token], request.logprobs)[0]
        piece, at_string = "", False
        if not is_stop:
            text.tokens.append(token)
            text.n_left -= 1
            if text.stream is not None:
                piece, at_string = text.stream.push(token)
        events.append(NewToken(text.id, token, piece, logprobs))
        if is_stop or at_string:
            self._end(text, "stop", events)
        elif not text.n_left:
            self._end(text, "length", events)
        else:
            return True
        return False

    def _make_room(self, text: _Text) -> None:
        """Make a full cache roll; one that may not is not full, or its text has ended."""
        assert text.cache is not None
        if text.cache.length == text.cache.context:
            text.rolled = True
        make_room(text.cache, text.keep)


def make_room(cache: KVCache, keep: int) -> None:
    """Make a full cache forget the older half of what follows its first `keep` positions."""
    if cache.length == cache.context:
        cache.roll(keep, max(1, (cache.context - keep) // 2))


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


def _biased(logits: Logits, tokens: NDArray[np.int64], bias: Logits) -> Logits:
    """Return logits (V,) with a bias added to those of some tokens."""
    logits = logits.copy()
    logits[tokens] += bias
    return logits
