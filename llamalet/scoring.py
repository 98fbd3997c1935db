"""How well a model predicts a text: loss and bits per byte.

There are two ways to cut the data. `evaluate_documents` scores each document whole, from its BOS up to and including
the BOS that closes it, and nothing before it; only then is the loss comparable with the corpus entropy, which no model
can beat. `evaluate_windows` scores all tokens in windows of the context, as training sees them: a window may begin
inside a document.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet.engine import make_room
from llamalet.errors import NonFiniteError, UsageError
from llamalet.forward_pass import ForwardPass, LogitsOf
from llamalet.kv_cache import KVCache
from llamalet.sampler import KEEP
from llamalet.shards import TokenArray
from llamalet.tokenizer import Tokenizer

Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The negative log-likelihood of some text under a model."""

    nats: float
    """Sum of -log p over all scored tokens."""
    tokens: int
    """Number of scored tokens."""
    text_bytes: int
    """Number of bytes of text that they spell."""
    documents: int
    """Number of documents that they close."""

    @property
    def nats_per_token(self) -> float:
        """The loss as training reports it; NaN without tokens."""
        return _per(self.nats, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """The loss independent of the vocabulary.

        Only bytes that tokens spell count: it is infinite if all are <unk>, because that spells no text.
        """
        return _per(self.nats / math.log(2), self.text_bytes)

    @property
    def bits_per_document(self) -> float:
        """The average loss of a whole document; infinite if none is closed."""
        return _per(self.nats / math.log(2), self.documents)

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
            self.documents + other.documents,
        )


def _per(total: float, count: int) -> float:
    """Return total / count: infinite or, if there is no total either, NaN if the count is 0."""
    if count:
        return total / count
    return math.inf if total else math.nan


NOTHING = Evaluation(0.0, 0, 0, 0)


class Tally:
    """Counts the bytes and documents that tokens of one vocabulary spell."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._separator_id = tokenizer.separator_id
        self._text_bytes = np.array([len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)])
        spaced = [tokenizer.adds_space and tokenizer.token_bytes(id)[:1] == b" " for id in range(tokenizer.vocab_size)]
        self._spaced = np.array(spaced)

    def of(self, tokens: Ids, first: int, nats: float) -> Evaluation:
        """Return the Evaluation of tokens[first:], of ids (T + 1,), whose total negative log-likelihood is `nats`."""
        before, targets = tokens[first - 1 : -1], tokens[first:]
        # The dummy space that the tokenizer puts before a document is not part of its text.
        prefixes = np.count_nonzero((before == self._separator_id) & self._spaced[targets])
        text_bytes = int(self._text_bytes[targets].sum()) - int(prefixes)
        return Evaluation(nats, len(targets), text_bytes, int(np.count_nonzero(targets == self._separator_id)))


class Scorer:
    """Scores sequences with one model and one vocabulary."""

    def __init__(self, transformer: LogitsOf, tokenizer: Tokenizer) -> None:
        self._transformer = transformer
        self._tally = Tally(tokenizer)

    def score(self, tokens: Ids, first: int = 1) -> Evaluation:
        """Score the tokens from position `first` on, each given all before it.

        Args:
            tokens: ids (T + 1,), T at most the context.
            first: 1 .. T.

        Raises:
            UsageError: if there is no such token.
            NonFiniteError: if the model's logits are NaN or infinite.
        """
        if len(tokens) <= first:
            raise UsageError(
                "there is no text to score: in this vocabulary it has no tokens, or one that nothing predicts"
            )
        logits = self._transformer.logits(tokens[:-1])[first - 1 :]  # (n, V)
        return self._tally.of(tokens, first, float(losses(self._transformer, logits, tokens[first:]).sum()))


def evaluate_windows(
    transformer: LogitsOf, tokenizer: Tokenizer, tokens: Ids | TokenArray, max_tokens: int | None = None
) -> Iterator[Evaluation]:
    """Yield the score of each window of the context; their sum is the score of all tokens except the first.

    Args:
        transformer: the model.
        tokenizer: its vocabulary.
        tokens: ids (n,).
        max_tokens: score no more than this many.
    """
    scorer, context = Scorer(transformer, tokenizer), transformer.config.max_seq_len
    end = len(tokens) - 1 if max_tokens is None else min(len(tokens) - 1, max_tokens)
    for start in range(0, end, context):
        yield scorer.score(tokens[start : min(start + context, end) + 1])


def evaluate_documents(transformer: LogitsOf, tokenizer: Tokenizer, documents: Iterable[Ids]) -> Iterator[Evaluation]:
    """Yield the score of each document.

    Args:
        transformer: the model.
        tokenizer: its vocabulary.
        documents: ids (T + 1,) of each: BOS, its tokens, BOS. One longer than the context is scored in windows that
            overlap by half, so that every token beyond the first window has at least half the context before it.
    """
    scorer, context = Scorer(transformer, tokenizer), transformer.config.max_seq_len
    for document in documents:
        yield sum((scorer.score(*part) for part in cut(document, context)), NOTHING)


def cut(document: Ids, context: int) -> Iterator[tuple[Ids, int]]:
    """Yield a document (T + 1,) as sequences that fit into the context, each with its first position to score."""
    yield document[: context + 1], 1
    step = max(context // 2, 1)
    for start in range(step, len(document) - 1 - (context - step), step):
        yield document[start : start + context + 1], context - step + 1


def evaluate_streams(
    transformer: ForwardPass, streams: Ids, caches: Sequence[KVCache], keep: int = KEEP
) -> Iterator[NDArray[np.float64]]:
    """Yield the losses of the next tokens of several long texts, (B,) for each position.

    The model sees them as in generation: a text's tokens pass through its cache one by one, and a full cache rolls.

    Args:
        transformer: the model.
        streams: ids (B, T + 1); T may be far more than the context.
        caches: an empty one for each text.
        keep: number of initial positions that a rolling cache keeps.
    """
    for position in range(streams.shape[1] - 1):
        for cache in caches:
            make_room(cache, keep)
        logits = transformer.decode_batch(caches, streams[:, position].tolist())
        yield losses(transformer, logits, streams[:, position + 1])


def losses(transformer: LogitsOf, logits: NDArray[np.float32], targets: Ids) -> NDArray[np.float64]:
    """Return -log softmax(logits)[target] for each row of (n, V), in nats: (n,).

    Raises:
        NonFiniteError: if a logit is NaN or infinite.
    """
    nats = transformer.losses(logits, targets)
    if not np.isfinite(nats).all():
        raise NonFiniteError("the logits are NaN or infinite: the weights are damaged, or the training diverged")
    return nats


def read_documents(tokens: TokenArray, bos_id: int, max_tokens: int | None = None) -> Iterator[Ids]:
    """Yield the documents of a split, each from its BOS up to and including the BOS that closes it.

    Args:
        tokens: the split.
        bos_id: the token that begins a document.
        max_tokens: end before the scored tokens exceed this number, but after the first document at the earliest.
    """
    starts = tokens.document_starts(bos_id)
    scored = 0
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        scored += int(stop - start)
        if max_tokens is not None and start > starts[0] and scored > max_tokens:
            return
        yield np.append(tokens[start:stop], bos_id)
