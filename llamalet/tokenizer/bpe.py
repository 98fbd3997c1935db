"""Byte-pair encoding: merge the best pair of neighbours, the leftmost of equals, until no pair can be merged.

Llama 2's tokenizer.bin and Llama 3's rank table differ in how they rank pairs, in the initial pieces (characters or
bytes) and in how they first split a text into words. The merging is the same.
"""

import abc
import functools
import heapq
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from llamalet.tokenizer.base import Tokenizer

# Most words of a text repeat, so their ids are cached; those of long words are not.
CACHED_WORDS, CACHED_CHARS = 1 << 16, 64
# Longer words are first merged pair by pair, for at most ROUNDS rounds and while they have few distinct pairs.
LONG_WORD, FEW_PAIRS, ROUNDS = 1024, 64, 16


class MergingTokenizer(Tokenizer):
    """A vocabulary that splits a text into words and merges within each."""

    def __init__(self, texts: list[bytes], **facts: Any) -> None:
        super().__init__(texts, **facts)
        self._cached_ids = functools.lru_cache(CACHED_WORDS)(self._word_ids)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._words(text):
            ids += self._cached_ids(word) if len(word) <= CACHED_CHARS else self._word_ids(word)
        return ids

    @abc.abstractmethod
    def _words(self, text: str) -> Iterable[str]:
        """Split a text where no token can cross."""

    @abc.abstractmethod
    def _word_ids(self, word: str) -> tuple[int, ...]:
        """Return the ids of one word."""


def merge(text: str, ranks: Mapping[str, int]) -> list[str]:
    """Return the pieces of a text, in O(n log n).

    A piece is identified by the position of its first character. The queue holds rank * n + position for every pair of
    neighbours that may merge, so its smallest number is the best pair, leftmost first. A merge changes the pairs on
    both sides and leaves their old entries in the queue; an entry is skipped if its pair no longer has that rank.

    Args:
        text: initially every character is a piece.
        ranks: the possible merged pieces and their ranks: 0 is best; equals share a rank.
    """
    pieces = list(text) if len(text) < LONG_WORD else _merge_repeated(text, ranks)
    n = len(pieces)
    left, right = list(range(-1, n - 1)), list(range(1, n + 1))
    queue = []
    for i, pair in enumerate(map(operator.add, pieces, pieces[1:])):
        if pair in ranks:
            queue.append(ranks[pair] * n + i)
    heapq.heapify(queue)
    while queue:
        rank, first = divmod(heapq.heappop(queue), n)
        second = right[first]
        if not pieces[first] or second == n:
            continue
        joined = pieces[first] + pieces[second]
        if ranks.get(joined) != rank:
            continue
        pieces[first], pieces[second] = joined, ""
        before, after = left[first], right[second]
        right[first] = after
        if after < n:
            left[after] = first
            pair = joined + pieces[after]
            if pair in ranks:
                heapq.heappush(queue, ranks[pair] * n + first)
        if before >= 0:
            pair = pieces[before] + joined
            if pair in ranks:
                heapq.heappush(queue, ranks[pair] * n + before)
    return [piece for piece in pieces if piece]


def _merge_repeated(text: str, ranks: Mapping[str, int]) -> list[str]:
    """Return the pieces of a long text after its most repeated merges, so that a megabyte of one letter is fast.

    The best pair is merged everywhere in one call. That equals the order of `merge` while no other pair is as good and
    no merge creates a pair that is: neither with its right neighbour, possibly the first half of the next occurrence,
    nor with its left one, which the next round sees. Each piece is one character of `codes`.
    """
    pieces = list(dict.fromkeys(text))
    codes = text.translate({ord(piece): code for code, piece in enumerate(pieces)})
    last = -1
    for _ in range(ROUNDS):
        pairs = set(map(operator.add, codes, codes[1:]))
        if len(pairs) > FEW_PAIRS:
            break
        texts = {pair: pieces[ord(pair[0])] + pieces[ord(pair[1])] for pair in pairs}
        good = sorted((ranks[joined], pair) for pair, joined in texts.items() if joined in ranks)
        if not good or len(good) > 1 and good[0][0] == good[1][0]:
            break
        rank, best = good[0]
        if rank <= last:
            return list(text)
        if ranks.get(texts[best] + pieces[ord(best[0])], rank + 1) <= rank:
            break
        last = rank
        codes = codes.replace(best, chr(len(pieces)))
        pieces.append(texts[best])
    return [pieces[ord(code)] for code in codes]
