"""From logits to the next token, with the draws of llama2.c's run.c.

The same seed and settings give the same tokens as run.c: its generator, its order of operations (temperature, softmax,
one coin per token, then all tokens or the nucleus) and its float32 sums from left to right, so that even the rounding
agrees. Top-k and min-p, which run.c lacks, shorten the same sorted list.
"""

import copy
import dataclasses
import difflib
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import NDArray

from llamalet.checks import shown, typed_fields
from llamalet.errors import ConfigError, NonFiniteError

MASK = (1 << 64) - 1
# A generator of the xorshift family never leaves the state 0, so seed 0 starts from here. (2**64 / golden ratio.)
STATE_FOR_SEED_0 = 0x9E3779B97F4A7C15
MAX_TEMPERATURE = 1000.0

# What happens to a text that fills the context: it ends, or the cache rolls.
Overflow = Literal["stop", "roll"]

# Number of initial positions that a rolling cache keeps. A softmax has to put its weight somewhere, and models learn to
# put what they do not need on the first tokens, which all others see; without these they fall apart. Four are enough.
# Source: https://arxiv.org/abs/2309.17453, table 2.
KEEP = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How tokens are chosen and when the text ends. The command line takes its options and their help from here.

    The filters apply after the temperature, in the order top-k, top-p, min-p; each works on what the previous one left.
    Values out of range are refused together, in one ConfigError.
    """

    temperature: float = 1.0
    """divide the logits by this: 0 takes the most likely token, 1 draws as the model has learnt"""
    top_p: float = 0.9
    """draw from the fewest most likely tokens whose probabilities exceed this sum; 0 and 1 switch it off"""
    top_k: int = 0
    """draw from this many of the most likely tokens; 0 switches it off"""
    min_p: float = 0.0
    """drop tokens below this share of the most likely one's probability; 0 switches it off"""
    seed: int = -1
    """the same seed gives the same text; -1 picks one at random"""
    max_new_tokens: int | None = None
    """end the text, or each answer of a chat, after this many new tokens"""
    ignore_eos: bool = False
    """keep generating past the end-of-text token"""
    overflow: Overflow = "stop"
    """when the context is full: stop, or roll, which forgets its older half, except the first --keep tokens, and
    continues"""
    keep: int = KEEP
    """number of initial tokens that a rolling context always keeps; without a few of them models lose the thread"""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value of another type, or every one out of range."""
        typed_fields(self)
        problems = []
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            problems.append(
                f"temperature={self.temperature}: must be between 0 (the most likely token) and {MAX_TEMPERATURE}"
            )
        if not 0 <= self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: must be between 0 and 1 (both switch it off)")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k}: must not be negative (0 switches it off)")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p={self.min_p}: must be between 0 (off) and 1")
        if not -1 <= self.seed <= MASK:
            problems.append(f"seed={self.seed}: must be -1 (random) or between 0 and 2**64 - 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            problems.append(f"max_new_tokens={self.max_new_tokens}: must not be negative")
        if self.overflow not in get_args(Overflow):
            problems.append(f"overflow={self.overflow!r}: must be one of {', '.join(get_args(Overflow))}")
        if self.keep < 0:
            problems.append(f"keep={self.keep}: must not be negative")
        ConfigError.raise_for(problems)

    @classmethod
    def create(cls, base: Self | None, options: Mapping[str, Any]) -> Self:
        """Return `base`, or the defaults, with some fields replaced.

        Raises:
            ConfigError: if an option is unknown, naming the nearest one, or a value is out of range.
        """
        names = [known.name for known in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                raise ConfigError(f"unknown sampling option {name}; {hint}")
        if not isinstance(base, cls | None):
            raise ConfigError(f"sampling={shown(base)}: must be a SamplingConfig")
        return dataclasses.replace(cls() if base is None else base, **options)

    def for_texts(self, n: int) -> list[Self]:
        """Return the settings of n texts: each has its own seed, one more than the last; a random one is drawn here."""
        first = random_seed() if self.seed == -1 else self.seed
        return [dataclasses.replace(self, seed=(first + number) & MASK) for number in range(n)]


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


class Rule(NamedTuple):
    """How a token is drawn from logits, in numbers that a kernel can take."""

    n_drawn: int
    """No token from here on is drawn."""
    left_out: NDArray[np.int64]
    """Nor one of these below it (n,)."""
    temperature: np.float32
    top_p: np.float32
    """0 is off."""
    top_k: int
    min_p: np.float32

    @classmethod
    def create(cls, config: SamplingConfig, vocab_size: int, undrawn: Collection[int] = ()) -> Self:
        """Return the rule of these settings for vocab_size tokens, of which those in `undrawn` are never drawn."""
        n_drawn, left_out = vocab_size, np.array([], np.int64)
        if undrawn:
            drawn = np.setdiff1d(np.arange(vocab_size), np.fromiter(undrawn, np.int64))
            n_drawn = int(drawn[-1]) + 1
            left_out = np.setdiff1d(np.arange(n_drawn), drawn)
        return cls(
            n_drawn=n_drawn,
            left_out=left_out,
            temperature=np.float32(config.temperature),
            top_p=np.float32(config.top_p) % np.float32(1),
            top_k=config.top_k if config.top_k < n_drawn else 0,
            min_p=np.float32(config.min_p),
        )


Choose = Callable[[NDArray[np.float32], Rule, np.float32], int]
"""From logits (V,), all finite or not, a rule and a coin in [0, 1) to a token, or NOT_FINITE."""
NOT_FINITE = -1


class Sampler:
    """Chooses the tokens of one text: its generator advances with every token."""

    def __init__(
        self, vocab_size: int, config: SamplingConfig, undrawn: Collection[int] = (), choose: Choose | None = None
    ) -> None:
        """Prepare to draw from vocab_size (V) logits, never an id in `undrawn`; a seed of -1 becomes a random one.

        `choose` may be another `choose_token`, a compiled one.
        """
        self._vocab_size, self._choose = vocab_size, choose or choose_token
        self._rule = Rule.create(config, vocab_size, undrawn)
        self._generator = Generator(random_seed() if config.seed == -1 else config.seed)

    def fork(self) -> "Sampler":
        """Return a sampler that will draw what this one would; what it draws does not advance this one."""
        twin = copy.copy(self)
        twin._generator = copy.copy(self._generator)
        return twin

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Return the next token.

        Args:
            logits: float32 (V,); not changed.

        Raises:
            NonFiniteError: if a logit is NaN or infinite.
        """
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits of shape {logits.shape}, but the sampler was made for ({self._vocab_size},)")
        coin = self._generator.next_float() if self._rule.temperature else np.float32(0)
        token = self._choose(logits, self._rule, coin)
        if token == NOT_FINITE:
            raise NonFiniteError(
                f"{np.count_nonzero(~np.isfinite(logits))} of {len(logits)} logits are NaN or infinite: "
                "the model's weights are damaged, or its training diverged"
            )
        return token


def choose_token(logits: NDArray[np.float32], rule: Rule, coin: np.float32) -> int:
    """Return the token that a coin in [0, 1) falls on, or NOT_FINITE if a logit of (V,) is NaN or infinite.

    kernels.sampling does the same, faster, with powers of its own, which may differ in the last bit.
    """
    if not np.isfinite(logits).all():
        return NOT_FINITE
    logits = logits[: rule.n_drawn]
    if len(rule.left_out):
        logits = logits.copy()
        logits[rule.left_out] = -np.inf
    if rule.temperature == 0:
        return int(np.argmax(logits))
    with np.errstate(over="ignore"):
        scaled = logits / rule.temperature
    peak = scaled.max()
    if not np.isfinite(peak):  # a temperature so small that the division overflows
        return int(np.argmax(logits))
    return choose_by_weight(np.exp(scaled - peak), rule, coin)


def choose_by_weight(weights: NDArray[np.float32], rule: Rule, coin: np.float32) -> int:
    """Return the token that a coin falls on if each has a weight (n_drawn,), the largest of which is 1."""
    probabilities = weights / _running_sum(weights)[-1]
    if not (rule.top_p or rule.top_k or rule.min_p):
        return _first_above(_running_sum(probabilities), coin)
    # What the filters keep is a prefix of the tokens sorted by probability.
    tokens = _sort_descending(probabilities, _floor(probabilities, rule))
    if not len(tokens):  # a tiny top-p over equal probabilities: none reaches the floor
        return int(np.argmax(probabilities))
    if rule.top_k:
        tokens = tokens[: rule.top_k]
    ranked = probabilities[tokens]
    sums = _running_sum(ranked)
    last = len(tokens) - 1
    if rule.top_p:
        last = _first_above(sums, rule.top_p * sums[-1] if rule.top_k else rule.top_p)
    if rule.min_p:
        last = min(last, int(np.count_nonzero(ranked >= rule.min_p * ranked[0])) - 1)
    return int(tokens[_first_above(sums[: last + 1], coin * sums[last])])


def _floor(probabilities: NDArray[np.float32], rule: Rule) -> np.float32:
    """Return a probability below which some filter drops every token, so that few need sorting."""
    if rule.top_k:
        return np.float32(np.partition(probabilities, -rule.top_k)[-rule.top_k])
    if rule.top_p and rule.n_drawn > 1:
        # run.c drops these before it sorts: even V - 1 of them do not make up the 1 - top_p outside the nucleus.
        return (np.float32(1) - rule.top_p) / np.float32(rule.n_drawn - 1)
    return rule.min_p * probabilities.max()


def _running_sum(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the float32 sums of values[: i + 1], added one by one as C does (np.sum adds in pairs)."""
    return np.cumsum(values, dtype=np.float32)


def _first_above(sums: NDArray[np.float32], bound: np.float32) -> int:
    """Return the first index whose sum exceeds `bound`, or the last one if rounding leaves none."""
    return min(int(np.searchsorted(sums, bound, side="right")), len(sums) - 1)


def _sort_descending(probabilities: NDArray[np.float32], floor: np.float32) -> NDArray[np.int64]:
    """Return the tokens with a probability of at least `floor`: the most likely first, ties in order of their id."""
    tokens = np.flatnonzero(probabilities >= floor)
    # One integer per token, the inverted bits of its probability above its number: positive floats order as their bits
    # do, and numpy sorts integers with vector instructions.
    keys = (~probabilities[tokens].view(np.uint32)).astype(np.uint64) << np.uint64(32) | tokens.astype(np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def random_seed() -> int:
    """Return a random seed, small enough for run.c's -s and to be typed again."""
    return secrets.randbelow((1 << 31) - 1) + 1
