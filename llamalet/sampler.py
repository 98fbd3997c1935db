"""From logits to the next token, with the draws of llama2.c's run.c.

The same seed and settings give the same tokens as run.c: its generator, its order of operations (temperature, softmax,
one coin per token, then all tokens or the nucleus) and its float32 sums from left to right, so that even the rounding
agrees. Top-k and min-p, which run.c lacks, shorten the same sorted list.
"""

import secrets

import numpy as np
from numpy.typing import NDArray

from llamalet.errors import ConfigError, NonFiniteError

MASK = (1 << 64) - 1
# A generator of the xorshift family never leaves the state 0, so seed 0 starts from here. (2**64 / golden ratio.)
STATE_FOR_SEED_0 = 0x9E3779B97F4A7C15
MAX_TEMPERATURE = 1000.0


class Generator:
    """xorshift64*: 64 bits of state, a float32 in [0, 1) per draw.

    Source: Vigna, https://arxiv.org/abs/1402.6246; the shifts and the multiplier are run.c's.
    """

    def __init__(self, seed: int) -> None:
        """Start from a seed in 0 .. 2**64 - 1."""
        self._state = seed or STATE_FOR_SEED_0

    def next_float(self) -> np.float32:
        """Return the next number: a multiple of 2**-24 in [0, 1)."""
        state = self._state
        state ^= state >> 12
        state ^= state << 25 & MASK
        state ^= state >> 27
        self._state = state
        return np.float32((state * 0x2545F4914F6CDD1D & MASK) >> 40) / np.float32(1 << 24)


class Sampler:
    """Chooses tokens. One sampler draws one text: its generator moves on with every token."""

    def __init__(
        self,
        vocab_size: int,
        *,
        temperature: float = 1.0,
        top_p: float = 0.9,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Check the settings and seed the generator.

        The filters apply after the temperature, in this order; each works on what the one before has left.

        Args:
            vocab_size: number of logits (V).
            temperature: divides the logits; 0 takes the most likely token.
            top_k: keep this many of the most likely tokens; 0 or V and more keep all.
            top_p: of these, keep the fewest whose probabilities exceed this share; 0 and 1 keep all.
            min_p: of these, keep those with at least this share of the most likely token's probability; 0 keeps all.
            seed: start of the generator, 0 .. 2**64 - 1.

        Raises:
            ConfigError: listing every setting out of range.
        """
        problems = check_settings(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
        if not 0 <= seed <= MASK:
            problems.append(f"seed={seed}: must lie between 0 and 2**64 - 1")
        if problems:
            raise ConfigError.from_problems(problems)
        self._vocab_size = vocab_size
        self._temperature = np.float32(temperature)
        self._top_p = np.float32(top_p) % np.float32(1)
        self._top_k = top_k if top_k < vocab_size else 0
        self._min_p = np.float32(min_p)
        self._generator = Generator(seed)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Return the next token.

        Args:
            logits: float32 (V,); not changed.

        Raises:
            NonFiniteError: if a logit is NaN or infinite.
        """
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits of shape {logits.shape} where the sampler was made for ({self._vocab_size},)")
        if not np.isfinite(logits).all():
            raise NonFiniteError(
                f"{np.count_nonzero(~np.isfinite(logits))} of {len(logits)} logits are NaN or infinite: "
                "the model's weights are damaged, or its training diverged"
            )
        if self._temperature == 0:
            return int(np.argmax(logits))
        with np.errstate(over="ignore"):
            scaled = logits / self._temperature
        peak = scaled.max()
        if not np.isfinite(peak):  # a temperature so small that the division overflows
            return int(np.argmax(logits))
        weights = np.exp(scaled - peak)
        probabilities = weights / _running_sum(weights)[-1]
        coin = self._generator.next_float()
        if self._top_p or self._top_k or self._min_p:
            return self._draw_filtered(probabilities, coin)
        return _first_above(_running_sum(probabilities), coin)

    def _draw_filtered(self, probabilities: NDArray[np.float32], coin: np.float32) -> int:
        """Draw from the most likely tokens that all filters keep: a prefix of the tokens, sorted by probability."""
        tokens = _sort_descending(probabilities, self._floor(probabilities))
        if not len(tokens):  # a tiny top-p over equal probabilities: none reaches the floor
            return int(np.argmax(probabilities))
        if self._top_k:
            tokens = tokens[: self._top_k]
        ranked = probabilities[tokens]
        sums = _running_sum(ranked)
        last = len(tokens) - 1
        if self._top_p:
            last = _first_above(sums, self._top_p * sums[-1] if self._top_k else self._top_p)
        if self._min_p:
            last = min(last, int(np.count_nonzero(ranked >= self._min_p * ranked[0])) - 1)
        return int(tokens[_first_above(sums[: last + 1], coin * sums[last])])

    def _floor(self, probabilities: NDArray[np.float32]) -> np.float32:
        """Return a probability below which no filter keeps a token, so that few need sorting."""
        if self._top_k:
            return np.float32(np.partition(probabilities, -self._top_k)[-self._top_k])
        if self._top_p and self._vocab_size > 1:
            # run.c drops these before it sorts: even V - 1 of them do not make up the 1 - top_p outside the nucleus.
            return (np.float32(1) - self._top_p) / np.float32(self._vocab_size - 1)
        return self._min_p * probabilities.max()


def check_settings(*, temperature: float, top_p: float, top_k: int, min_p: float) -> list[str]:
    """Return one complaint for each sampling setting that is out of range."""
    problems = []
    if not 0 <= temperature <= MAX_TEMPERATURE:
        problems.append(f"temperature={temperature}: must lie between 0 (the most likely token) and {MAX_TEMPERATURE}")
    if not 0 <= top_p <= 1:
        problems.append(f"top_p={top_p}: must lie between 0 and 1 (both switch it off)")
    if top_k < 0:
        problems.append(f"top_k={top_k}: must not be negative (0 switches it off)")
    if not 0 <= min_p <= 1:
        problems.append(f"min_p={min_p}: must lie between 0 (off) and 1")
    return problems


def _running_sum(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the float32 sums of values[: i + 1], added one by one as C does (np.sum adds in pairs)."""
    return np.cumsum(values, dtype=np.float32)


def _first_above(sums: NDArray[np.float32], bound: np.float32) -> int:
    """Return the first index whose sum exceeds `bound`, the last one where rounding leaves none."""
    return min(int(np.searchsorted(sums, bound, side="right")), len(sums) - 1)


def _sort_descending(probabilities: NDArray[np.float32], floor: np.float32) -> NDArray[np.int64]:
    """Return the tokens of at least `floor`, the most likely first, equal ones by their number."""
    tokens = np.flatnonzero(probabilities >= floor)
    # One integer per token, the inverted bits of its probability above its number: positive floats order as their bits
    # do, and numpy sorts integers with vector instructions.
    keys = (~probabilities[tokens].view(np.uint32)).astype(np.uint64) << np.uint64(32) | tokens.astype(np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def random_seed() -> int:
    """Return a seed that nobody chose, small enough for run.c's -s and for typing it again."""
    return secrets.randbelow((1 << 31) - 1) + 1
