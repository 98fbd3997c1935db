"""Byte-pair encoding: neighbours are joined, best pair first, the leftmost of equals, until none can be.

Llama 2's tokenizer.bin and Llama 3's rank table differ in what they call good, in their first parts (characters or
bytes) and in how they cut a text into words beforehand. The joining is the same.
"""

import abc
import functools
import heapq
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from llamalet.tokenizer.base import Tokenizer

# Of the words of a text nearly all have been seen before. Long ones are not kept.
CACHED_WORDS, CACHED_CHARS = 1 << 16, 64
# A longer word is checked for repetition: as long as it has few different pairs, for some rounds.
LONG_WORD, FEW_PAIRS, ROUNDS = 1024, 64, 16


class MergingTokenizer(Tokenizer):
    """A vocabulary that cuts a text into words and joins within each."""

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
        """Cut a text where no token can reach across."""

    @abc.abstractmethod
    def _word_ids(self, word: str) -> tuple[int, ...]:
        """Return the ids of one word."""


def merge(text: str, ranks: Mapping[str, int]) -> list[str]:
    """Return the pieces of a text, in O(n log n).

    A piece is known by the position of its first part. The queue holds rank * n + position for every pair of
    neighbours that may join, so its smallest number is the best pair, leftmost first. Joining changes the pairs on
    both sides and leaves their old entries in the queue; an entry whose pair no longer has its rank is skipped.

    Args:
        text: every character is a piece at first.
        ranks: what pieces may be joined to, and how good that is: 0 is best; equals share a rank.
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
    """Return the pieces of a long text after the joins that it repeats: a megabyte of one letter in a moment.

    The best pair is joined wherever it stands, in one call. That is the order of `merge` as long as no other pair is as
    good, and no join makes a pair that is: with what follows it, which may be the next occurrence's first half, or with
    what is left beside it, which the next round sees. Each piece is one character of `codes` meanwhile.
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
