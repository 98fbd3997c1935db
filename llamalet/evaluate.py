"""Loss and bits per byte of a model on prepared data, without torch.

    python -m llamalet.evaluate MODEL.bin [DATA_FOLDER]

Two ways to cut the data. `evaluate_documents` scores each document whole, from its BOS up to and including the BOS that
closes it, and nothing before it: only so is the loss comparable with the corpus entropy, which no model can beat.
`evaluate_windows` scores all tokens in windows of the context, as training sees them, documents cut where they fall.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet.errors import DataError, NonFiniteError, Parser, run
from llamalet.generate import KEEP, ForwardPass, LogitsOf, make_room
from llamalet.kv_cache import KVCache
from llamalet.runtime import BACKENDS, Model
from llamalet.shards import SPLITS, Entropy, Shards, TokenArray, find_newest
from llamalet.tokenizer import Tokenizer

Ids = NDArray[np.integer[Any]]

PROGRESS_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the model needed to spell out some text."""

    nats: float
    """Sum of -log p over all scored tokens."""
    tokens: int
    """How many tokens were scored."""
    text_bytes: int
    """How many bytes of text they spell."""
    documents: int
    """How many documents were closed."""

    @property
    def nats_per_token(self) -> float:
        """The loss as training reports it."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """The loss independent of the vocabulary."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def bits_per_document(self) -> float:
        """The loss of a whole document on average."""
        return self.nats / math.log(2) / self.documents

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
            self.documents + other.documents,
        )


NOTHING = Evaluation(0.0, 0, 0, 0)


class Tally:
    """Counts what tokens spell in one vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bos_id = tokenizer.bos_id
        self._text_bytes = np.array([len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)])
        spaced = [tokenizer.adds_space and tokenizer.token_bytes(id)[:1] == b" " for id in range(tokenizer.vocab_size)]
        self._spaced = np.array(spaced)

    def of(self, tokens: Ids, first: int, nats: float) -> Evaluation:
        """Return what it means that the tokens (T + 1,) from position `first` on cost so many nats."""
        before, targets = tokens[first - 1 : -1], tokens[first:]
        # A document's dummy prefix space is none of its text.
        prefixes = np.count_nonzero((before == self._bos_id) & self._spaced[targets])
        text_bytes = int(self._text_bytes[targets].sum()) - int(prefixes)
        return Evaluation(nats, len(targets), text_bytes, int(np.count_nonzero(targets == self._bos_id)))


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
        """
        logits = self._transformer.logits(tokens[:-1])[first - 1 :]  # (n, V)
        return self._tally.of(tokens, first, float(losses(logits, tokens[first:]).sum()))


def evaluate_windows(
    transformer: LogitsOf, tokenizer: Tokenizer, tokens: Ids | TokenArray, max_tokens: int | None = None
) -> Iterator[Evaluation]:
    """Yield the score of one window of the context after the other; their sum is the score of all tokens but the first.

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
            overlap by half, so that every token but the first has at least half the context before it.
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
    """Yield the loss of each next token of several long texts, each (B,): one position after the other, without end.

    It is what generation sees: a text's tokens pass through its cache one by one, and a cache that is full rolls.

    Args:
        transformer: the model.
        streams: ids (B, T + 1); T may be far more than the context.
        caches: an empty one for each text.
        keep: first positions that a rolling cache keeps.
    """
    for position in range(streams.shape[1] - 1):
        for cache in caches:
            make_room(cache, keep)
        logits = transformer.decode_batch(caches, streams[:, position].tolist())
        yield losses(logits, streams[:, position + 1])


def losses(logits: NDArray[np.float32], targets: Ids) -> NDArray[np.float64]:
    """Return -log softmax(logits)[target] for each row of (n, V), in nats: (n,).

    Raises:
        NonFiniteError: if one is NaN or infinite.
    """
    peaks = logits.max(axis=1)
    sums = np.exp(logits - peaks[:, None]).sum(axis=1, dtype=np.float64)
    nats = np.log(sums) + peaks - logits[np.arange(len(targets)), targets]
    if not np.isfinite(nats).all():
        raise NonFiniteError("the logits are NaN or infinite: the weights are damaged, or the training diverged")
    return nats


def read_documents(tokens: TokenArray, bos_id: int, max_tokens: int | None = None) -> Iterator[Ids]:
    """Yield the documents of a split, each from its BOS up to and including the BOS that closes it.

    Args:
        tokens: the split.
        bos_id: what begins a document.
        max_tokens: end before the scored tokens exceed this number, but not before the first document.
    """
    starts = tokens.document_starts(bos_id)
    scored = 0
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        scored += int(stop - start)
        if max_tokens is not None and start > starts[0] and scored > max_tokens:
            return
        yield np.append(tokens[start:stop], bos_id)


def report(evaluation: Evaluation, entropy: Entropy | None = None) -> str:
    """Return the result as a table, one column per unit.

    Args:
        evaluation: a sum of scores.
        entropy: the corpus entropy of the same documents, each scored whole.

    Raises:
        DataError: if nothing was scored.
    """
    e = evaluation
    if not e.text_bytes:
        raise DataError("no text to score: the split has none")
    lines = [
        f"{e.documents} stories, {e.tokens} tokens, {e.text_bytes} bytes of text",
        f"{'':16}{'nats per token':>16}{'bits per byte':>16}{'bits per story':>16}",
    ]
    model = (e.nats_per_token, e.bits_per_byte, e.bits_per_document if e.documents else math.nan)
    rows = {"model": model}
    if entropy is not None:
        floor = (entropy.nats_per_token, entropy.bits_per_byte, entropy.bits_per_story)
        rows["corpus entropy"] = floor
        rows["distance"] = (model[0] - floor[0], model[1] - floor[1], model[2] - floor[2])
    lines += [f"{name:16}{row[0]:16.4f}{row[1]:16.4f}{row[2]:16.2f}" for name, row in rows.items()]
    if entropy is not None:
        lines.append(f"The model is {100 * rows['distance'][0] / floor[0]:.2f} % above the corpus entropy.")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Evaluate a model as the command line says."""
    args = _parse(argv)
    folder = args.data if args.data is not None else find_newest()
    if folder is None:
        raise DataError("no prepared data below data/; name its folder, or make some with tinystories.py")
    shards = Shards.open(folder)
    model = Model.load(
        args.model, tokenizer=shards.tokenizer_path, backend=args.backend, threads=args.threads, verify=args.verify
    )
    print(f"{model.path} on the {args.split} split of {shards.folder}", flush=True)
    tokens, bos_id = shards.split(args.split), shards.meta.bos_id
    n_tokens = len(tokens) if args.max_tokens is None else min(args.max_tokens, len(tokens))
    if args.windows:
        scores = evaluate_windows(model.transformer, model.tokenizer, tokens, args.max_tokens)
    else:
        documents = read_documents(tokens, bos_id, args.max_tokens)
        scores = evaluate_documents(model.transformer, model.tokenizer, documents)
    total = sum(with_progress(scores, n_tokens), NOTHING)
    entropy = shards.meta.entropy
    comparable = args.split == "val" and not args.windows
    if entropy is not None and comparable and total.documents < entropy.stories:
        print(f"The corpus entropy is that of all {entropy.stories} stories; without --max-tokens it is compared.")
        entropy = None
    print(report(total, entropy if comparable else None))
    return 0


def with_progress(scores: Iterator[Evaluation], n_tokens: int) -> Iterator[Evaluation]:
    """Pass the scores on; tell how far they are on stderr, every few seconds."""
    start = told = time.monotonic()
    done = 0
    for score in scores:
        done += score.tokens
        now = time.monotonic()
        if now - told > PROGRESS_AFTER_S:
            told = now
            speed = done / (now - start)
            print(f"{done} of about {n_tokens} tokens, {speed:.0f} tokens/s", file=sys.stderr, flush=True)
        yield score


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    description = "Loss and bits per byte of a model on prepared data, without torch."
    parser = Parser(prog="python -m llamalet.evaluate", description=description)
    parser.add_argument("model", help="a .bin or a training checkpoint")
    parser.add_argument("data", nargs="?", help="a folder of prepared data; the newest below data/ if not given")
    parser.add_argument("--split", choices=SPLITS, default="val", help="which stories to score (val)")
    parser.add_argument(
        "--max-tokens", "--max_tokens", type=_positive, help="score about this many tokens instead of all"
    )
    parser.add_argument("--windows", action="store_true", help="cut into windows of the context, not into stories")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help=f"what computes ({BACKENDS[0]})")
    parser.add_argument("--threads", type=_positive, help="how many threads compute; one for each core if not given")
    parser.add_argument("--verify", action="store_true", default=None, help="verify the checksum of a large file too")
    return parser.parse_args(argv)


def _positive(word: str) -> int:
    """Read an integer of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be a positive integer")
    return int(word)


if __name__ == "__main__":
    run(main)
