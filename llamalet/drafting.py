"""Drafts: cheap guesses at the next tokens, which the model reads in one pass. The text stays the same, bit for bit.

The weights of a large model make one trip through memory for several tokens as for one. So a draft proposes some, the
model reads them all, and each is kept if it is what the sampler draws at its place, with the random number that it
would have drawn there anyway. What follows the first other token never happened.

The published rule keeps a proposal with a probability that preserves the distribution of texts, not the text
(https://arxiv.org/abs/2211.17192). This one keeps fewer, so a draft that is a model draws with the random numbers that
the sampler will use next: two similar distributions then mostly agree on the token.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from llamalet.errors import NonFiniteError
from llamalet.forward_pass import ForwardPass
from llamalet.sampler import Sampler

LOOKUP = "lookup"
MAX_PROPOSED = 7
"""Tokens proposed at once, at most: a pass over these and the newest token costs less than two of a single token."""
LEAST_CHANCE = 0.4
"""A model proposes no more tokens once its probability of all that it has proposed is lower."""
MATCH = 3
"""Newest tokens that must have occurred before for `Lookup` to propose what followed. Stories repeat two by chance."""
LONGEST_WAIT = 64
"""Tokens without a proposal, at most, after proposals of which none was kept."""


class Draft(ABC):
    """What all drafts have in common: how many tokens they propose, and how many of them were kept.

    Attributes:
        proposed: tokens proposed in this text.
        kept: how many of them were kept.
        size: tokens to propose next, at most: twice as many if all were kept, else one more than were kept; none for a
            while if none was kept `patience` times in a row.
    """

    patience = 2

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget the text before: a new one begins."""
        self.proposed = self.kept = 0
        self.size = MAX_PROPOSED // 2
        self._misses = self._wait = 0

    @abstractmethod
    def propose(self, tokens: Sequence[int], n: int, sampler: Sampler) -> list[int]:
        """Return at most n tokens that may follow all tokens so far.

        Args:
            tokens: the prompt and the text, the newest token included; it grows from call to call.
            n: 1 to MAX_PROPOSED.
            sampler: what will draw the text's next tokens; it must not be advanced.
        """

    def settle(self, proposed: int, kept: int) -> None:
        """Take note of how many tokens of a proposal were kept, or that there was none."""
        self.proposed += proposed
        self.kept += kept
        if kept:
            self._misses = 0
            self.size = min(2 * self.size, MAX_PROPOSED) if kept == proposed else kept + 1
        elif proposed:
            self._misses += 1
            self.size = 1
            if self._misses >= self.patience:
                self.size, self._wait = 0, min(2 ** (self._misses - self.patience + 2), LONGEST_WAIT)
        elif self.size == 0:
            self._wait -= 1
            self.size = int(self._wait == 0)


class Lookup(Draft):
    """Proposes what followed when the newest tokens occurred before; it costs nothing, and texts repeat themselves."""

    def begin(self) -> None:
        """See Draft."""
        super().begin()
        self._after: dict[tuple[int, ...], int] = {}  # MATCH tokens -> the number of the token after them
        self._n_seen = 0

    def propose(self, tokens: Sequence[int], n: int, sampler: Sampler) -> list[int]:
        """Return n tokens that followed the newest MATCH tokens the last time, again and again if they are fewer."""
        for end in range(max(self._n_seen, MATCH), len(tokens)):
            self._after[tuple(tokens[end - MATCH : end])] = end
        self._n_seen = len(tokens)
        begin = self._after.get(tuple(tokens[-MATCH:]))
        return [] if begin is None else [tokens[begin + i % (len(tokens) - begin)] for i in range(n)]


class SmallModel(Draft):
    """Proposes what a smaller model of the same vocabulary draws with the sampler's next random numbers.

    It knows how sure it is, so it stops by itself: it proposes long runs where there is little to choose, and one token
    where there is much.
    """

    patience = 8

    def __init__(self, transformer: ForwardPass) -> None:
        self._transformer = transformer
        super().__init__()

    def begin(self) -> None:
        """See Draft."""
        super().begin()
        self._cache = self._transformer.new_cache()
        self._start = 0  # the number of the first token in the cache
        self._read: list[int] = []  # the tokens in the cache; those of the last proposal may not have been kept

    def settle(self, proposed: int, kept: int) -> None:
        """See Draft; except for waits, the number of tokens does not depend on how many were kept."""
        super().settle(proposed, kept)
        if self.size:
            self.size = MAX_PROPOSED

    def propose(self, tokens: Sequence[int], n: int, sampler: Sampler) -> list[int]:
        """Return at most n tokens; see Draft."""
        context = self._transformer.config.max_seq_len
        n = min(n, context - 1)
        if n < 1:
            return []
        self._forget(tokens, context - n)
        new = tokens[self._start + len(self._read) :]
        logits = self._transformer.prefill(self._cache, new)
        self._read += new
        drawn, fork, chance = [], sampler.fork(), 1.0
        while True:
            try:
                drawn.append(fork.sample(logits))
            except NonFiniteError as error:
                raise NonFiniteError(f"draft: {error}") from None
            chance *= math.exp(-self._transformer.losses(logits[None], np.array(drawn[-1:]))[0])
            if len(drawn) == n or chance < LEAST_CHANCE:
                return drawn
            logits = self._transformer.decode(self._cache, drawn[-1])
            self._read.append(drawn[-1])

    def _forget(self, tokens: Sequence[int], room: int) -> None:
        """Drop what was not kept, and the last token, whose logits are needed; or begin anew if there is no room."""
        # Only what the last proposal added can be wrong.
        known, end = max(0, len(self._read) - MAX_PROPOSED), len(tokens) - 1 - self._start
        while known < min(len(self._read), end) and self._read[known] == tokens[self._start + known]:
            known += 1
        known = min(known, end)
        if len(tokens) - self._start > room:
            window = max(1, min(room, self._transformer.config.max_seq_len // 2))  # the newest half
            self._start, known = len(tokens) - window, 0
        del self._read[known:]
        self._cache.truncate(known)
