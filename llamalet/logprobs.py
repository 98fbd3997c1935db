"""The log-probabilities of tokens: the log-softmax of a model's logits, before temperature, filters and bias."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Logprobs(NamedTuple):
    """What a model thought of a token, and of others in its place.

    logprob: the natural logarithm of its probability.
    rank: how many tokens were more likely.
    entropy: of the whole distribution, in nats.
    top: the most likely tokens and their logprobs, the likeliest first, equals in the order of their ids.
    """

    logprob: float
    rank: int
    entropy: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(logits: NDArray[np.float32], tokens: Sequence[int], n_top: int) -> list[Logprobs]:
    """Return what logits (T, V) say of one token each, with the n_top most likely ones; computed in float64."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    weights = np.exp(rows)
    totals = weights.sum(axis=-1, keepdims=True)
    logs = np.log(totals)
    # The entropy is that of exp(row - log): log - sum(weights * rows) / total.
    entropies = logs[:, 0] - np.einsum("tv,tv->t", weights, rows) / totals[:, 0]
    rows -= logs
    return [
        Logprobs(float(row[token]), int(np.count_nonzero(row > row[token])), float(entropy), _most_likely(row, n_top))
        for row, token, entropy in zip(rows, tokens, entropies, strict=True)
    ]


def _most_likely(row: NDArray[np.float64], n: int) -> tuple[tuple[int, float], ...]:
    """Return the n largest of log-probabilities (V,) and their tokens."""
    n = min(n, len(row))
    if not n:
        return ()
    least = np.partition(row, -n)[-n]
    tokens = np.flatnonzero(row >= least)
    tokens = tokens[np.argsort(-row[tokens], kind="stable")][:n]
    return tuple(zip(tokens.tolist(), row[tokens].tolist(), strict=True))
