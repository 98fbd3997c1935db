"""Batches as a pure function of seed and position: to resume is to know one integer, and processes share nothing.

A split is one long stream of tokens, cut into windows of T + 1. Where possible a window begins at a document's BOS, so
the model sees documents from their start. An epoch visits each window once, in an order drawn from seed and epoch.

A model that has seen only beginnings fails in the middle of a text. So in each epoch a share of the windows, drawn too,
gives way to windows that begin at a random token.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from llamalet.config import IGNORED
from llamalet.errors import DataError
from llamalet.shards import TokenArray

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Inputs and targets, each int64 (B, T); IGNORED targets do not count."""


def window_starts(n_tokens: int, seq_len: int, document_starts: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Return where the windows of seq_len + 1 tokens begin.

    The next window begins at the last document start within seq_len tokens of this window's start, or seq_len tokens
    after it if there is none. So every token except a tail shorter than a window is a target at least once, and a
    document that fits into a window is seen whole.

    Args:
        n_tokens: length of the token stream.
        seq_len: inputs per window (T).
        document_starts: ascending positions of the documents' BOS; None cuts plain chunks, seq_len apart.

    Returns:
        int64 (W,), ascending; empty if the stream is shorter than one window.
    """
    end = n_tokens - seq_len  # a window must begin before this to have all its tokens
    if end < 1:
        return np.empty(0, dtype=np.int64)
    if document_starts is None or not len(document_starts):
        return np.arange(0, end, seq_len, dtype=np.int64)
    documents = document_starts if document_starts[0] == 0 else np.concatenate(([0], document_starts))
    # For each document, if a window begins at its start: `plain` windows follow, seq_len apart, before a window that
    # has a document start within reach; `follower` is the last such document, where the next window begins.
    to_next = np.diff(documents, append=n_tokens)
    plain = np.maximum(-(-to_next // seq_len) - 1, 0)
    reach = documents + (plain + 1) * seq_len
    follower = np.searchsorted(documents, reach, side="right") - 1
    chain = []
    hops = follower.tolist()
    at = 0
    while at < len(hops):
        chain.append(at)
        at = hops[at] if hops[at] > at else len(hops)
    begins, windows = documents[chain], plain[chain] + 1
    offsets = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
    starts = np.repeat(begins, windows) + offsets * seq_len
    return starts[starts < end]


class Windows:
    """The windows of one split, in batches.

    Args:
        tokens: the split's tokens.
        seq_len: inputs per window (T).
        document_starts: where documents begin, to align windows with them; None for plain chunks.
        random_starts: share of the training windows that begin at a random token instead, in [0, 1]. Evaluation has
            none.

    Raises:
        DataError: if there are fewer tokens than one window needs.
    """

    def __init__(
        self,
        tokens: TokenArray,
        seq_len: int,
        document_starts: NDArray[np.int64] | None = None,
        random_starts: float = 0.0,
    ) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.random_starts = random_starts
        self.starts = window_starts(len(tokens), seq_len, document_starts)
        if not len(self.starts):
            raise DataError(
                f"{len(tokens)} tokens are fewer than the {seq_len + 1} of one window; "
                f"prepare more data or set --max_seq_len below {len(tokens)}"
            )
        self._epoch: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def epoch_starts(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return where the windows of `epoch` begin, in the order of training: int64 (W,)."""
        known = self._epoch  # read once: another thread may replace it
        if known is None or known[0] != (seed, epoch):
            known = (seed, epoch), self._drawn_starts(seed, epoch)
            self._epoch = known
        return known[1]

    def _drawn_starts(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Draw `epoch_starts`: a permutation of all windows, then random places for a share of them."""
        starts = self.starts[np.random.default_rng([seed, epoch]).permutation(len(self))]
        if not self.random_starts:
            return starts
        draws = np.random.default_rng([seed, epoch, 1])  # another generator, so the order is the same with any share
        chosen = draws.random(len(self)) < self.random_starts
        anywhere = draws.integers(len(self.tokens) - self.seq_len, size=len(self))
        return np.where(chosen, anywhere, starts)

    def training_batch(self, seed: int, first: int, batch_size: int) -> Batch:
        """Return sequences first, first + 1, ... of the endless training stream of a seed.

        Args:
            seed: the run's seed.
            first: number of sequences before this batch, over all steps and processes.
            batch_size: number of sequences (B); a batch may cross the end of an epoch.
        """
        sequences = np.arange(first, first + batch_size)
        epochs, positions = np.divmod(sequences, len(self))
        starts = [int(self.epoch_starts(seed, int(e))[position]) for e, position in zip(epochs, positions, strict=True)]
        rows = np.stack([self.tokens[start : start + self.seq_len + 1] for start in starts])
        return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])

    def evaluation_batches(self, batch_size: int, n_batches: int, rank: int = 0, n_ranks: int = 1) -> Iterator[Batch]:
        """Yield this process's share of at most `n_batches` fixed batches, spread evenly over the split.

        Every token is a target at most once: targets that the next window covers too are IGNORED. So are rows that pad
        the last batch, and whole batches of padding that give every process the same number.
        """
        wanted = min(batch_size * n_batches, len(self))
        picks = np.linspace(0, len(self), num=wanted, endpoint=False).astype(np.int64)
        own = np.diff(self.starts, append=self.starts[-1] + self.seq_len)
        for first in range(0, wanted, n_ranks * batch_size):
            begin = first + rank * batch_size
            inputs = np.zeros((batch_size, self.seq_len), dtype=np.int64)
            targets = np.full((batch_size, self.seq_len), IGNORED, dtype=np.int64)
            for row, pick in enumerate(picks[begin : begin + batch_size]):
                start = int(self.starts[pick])
                window = self.tokens[start : start + self.seq_len + 1]
                inputs[row] = window[:-1]
                targets[row, : own[pick]] = window[1 : own[pick] + 1]
            yield inputs, targets


class Prefetcher:
    """Makes batches, and the next one in a thread while the caller is busy.

    A wrong guess of the next index costs only the time of making a batch.

    Args:
        make: returns the batch of an index; it is called in the thread, one call at a time.
        stride: difference between an index and the next.
    """

    def __init__(self, make: Callable[[int], Batch], stride: int) -> None:
        self._make, self._stride = make, stride
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[Batch]] | None = None

    def batch(self, index: int) -> Batch:
        """Return batch `index`, or raise what making it raised."""
        self._thread = self._thread or ThreadPoolExecutor(1, "batches")
        if self._ahead is None or self._ahead[0] != index:
            self._ahead = index, self._thread.submit(self._make, index)
        batch = self._ahead[1].result()
        self._ahead = index + self._stride, self._thread.submit(self._make, index + self._stride)
        return batch

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = self._ahead = None
