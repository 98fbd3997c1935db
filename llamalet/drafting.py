"""Drafts: cheap guesses at the next tokens, which the model reads in one pass. The text stays the same, bit for bit.

Reading a few tokens at once costs little more than one: the weights make one trip through memory. So a draft proposes
some, the model reads them all, and each is kept if it is what the sampler draws at its place, with the random number
that it would have drawn there anyway. What follows the first other token never happened.

The published rule keeps a proposal with a probability that preserves the distribution of texts, not the text
(https://arxiv.org/abs/2211.17192). This one keeps fewer, so a draft that is a model draws with the random numbers that
the sampler will use next: two similar distributions then mostly agree on the token.
"""

from collections.abc import Sequence

from llamalet.errors import NonFiniteError, UsageError
from llamalet.forward_pass import ForwardPass
from llamalet.sampler import Sampler
from llamalet.tokenizer import Tokenizer

LOOKUP = "lookup"
MAX_PROPOSED = 8
"""Tokens proposed at once, at most: a pass over more costs the processor time that memory no longer hides."""
MATCH = 3
"""Newest tokens that must have occurred before for `Lookup` to propose what followed. Stories repeat two by chance."""
KEEP_OF_CONTEXT = 2
"""A draft whose context is full reads the last 1 / KEEP_OF_CONTEXT of it again."""


class Draft:
    """What all drafts have in common: how many tokens they propose, and how many of them were kept.

    Attributes:
        proposed: tokens proposed so far.
        kept: tokens kept so far.
        size: tokens to propose next: twice as many if all were kept, else one more than were kept.
    """

    def __init__(self) -> None:
        self.proposed = self.kept = 0
        self.size = MAX_PROPOSED // 2

    def propose(self, tokens: Sequence[int], n: int, sampler: Sampler) -> list[int]:
        """Return at most n tokens that may follow all tokens so far.

        Args:
            tokens: the prompt and the text; it grows from call to call.
            n: at least 1.
            sampler: what will draw the text's next tokens; it must not be advanced.
        """
        raise NotImplementedError

    def settle(self, proposed: int, kept: int) -> None:
        """Take note of how many tokens of a proposal were kept."""
        self.proposed += proposed
        self.kept += kept
        if proposed:
            self.size = min(2 * self.size, MAX_PROPOSED) if kept == proposed else kept + 1


class Lookup(Draft):
    """Proposes what followed when the newest tokens occurred before; it costs nothing, and texts repeat themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._after: dict[tuple[int, ...], int] = {}  # MATCH tokens -> the number of the token after them
        self._n_seen = 0

    def propose(self, tokens: Sequence[int], n: int, sampler: Sampler) -> list[int]:
        """Return at most n tokens that followed the newest MATCH tokens the last time; see Draft."""
        for end in range(max(self._n_seen, MATCH), len(tokens)):
            self._after[tuple(tokens[end - MATCH : end])] = end
        self._n_seen = len(tokens)
        begin = self._after.get(tuple(tokens[-MATCH:]))
        return [] if begin is None else list(tokens[begin : begin + n])


class SmallModel(Draft):
    """Proposes what a smaller model of the same vocabulary draws with the sampler's next random numbers."""

    def __init__(self, transformer: ForwardPass) -> None:
        super().__init__()
        self._transformer = transformer
        self._cache = transformer.new_cache()
        self._start = 0  # the number of the first token in the cache
        self._read: list[int] = []  # the tokens in the cache; the last ones may not have been kept

    def propose(self, tokens: Sequence[int], n: int, sampler: Sampler) -> list[int]:
        """Return at most n tokens; see Draft."""
        context = self._transformer.config.max_seq_len
        n = min(n, context - 1)
        if n < 1:
            return []
        self._forget(tokens, context - n)
        logits = self._transformer.prefill(self._cache, tokens[self._start + len(self._read) :])
        self._read = list(tokens[self._start :])
        drawn, fork = [], sampler.fork()
        while True:
            try:
                drawn.append(fork.sample(logits))
            except NonFiniteError as error:
                raise NonFiniteError(f"draft: {error}") from None
            if len(drawn) == n:
                return drawn
            logits = self._transformer.decode(self._cache, drawn[-1])
            self._read.append(drawn[-1])

    def _forget(self, tokens: Sequence[int], room: int) -> None:
        """Drop what was not kept, and the last token, whose logits are needed; or begin anew if there is no room."""
        known, end = max(0, len(self._read) - MAX_PROPOSED), len(tokens) - 1 - self._start
        while known < min(len(self._read), end) and self._read[known] == tokens[self._start + known]:
            known += 1
        known = min(known, end)
        if len(tokens) - self._start > room:
            window = max(1, min(room, self._transformer.config.max_seq_len // KEEP_OF_CONTEXT))
            self._start, known = len(tokens) - window, 0
        del self._read[known:]
        self._cache.truncate(known)


def check_vocabulary(small: Tokenizer, model: Tokenizer) -> None:
    """Raise a UsageError if a draft's tokens are not the model's."""
    if small.vocab_size != model.vocab_size or any(
        small.token_bytes(token) != model.token_bytes(token) for token in range(model.vocab_size)
    ):
        raise UsageError("draft: has another vocabulary than the model, so it cannot propose tokens to it")
