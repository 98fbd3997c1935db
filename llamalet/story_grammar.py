"""A small grammar of children's stories: it draws random stories, and gives the exact probability of any text.

The corpus that it writes therefore has a known entropy, and the loss of a model trained on it can be compared with the
best loss that any model could reach.

The grammar is the two tables of story_grammar.toml. A rule is a list of options, the likelier ones first. An option
is text:

    <color>        draws an option of the rule `color` and writes it
    <goal:toy>     the same, and remembers the option's first words under the name `goal`
    {goal}         writes them again: this is how characters and things stay the same throughout a story
    {he=she}       remembers without writing; {he} then writes "she" and {He} writes "She"

Why probabilities are exact: every option begins with literal words, its head, which are written when the option is
chosen, and no head of a rule is a prefix of another head of that rule (the tests check the whole table). So the choices
can be read off a story from left to right. One program, `_tell`, walks the grammar for two drivers: `_Writer` makes
each choice with a random number, `_Reader` finds it in the text. Each text has one derivation, and its probability is
the product over its choices.

Weights are integers, and the only randomness is `rng.random()`: a seed gives the same story on every platform.
"""

import functools
import math
import re
import tomllib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamalet.tokenizer import Tokenizer

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
SENTENCES: dict[str, tuple[str, ...]] = {rule: tuple(texts) for rule, texts in _TABLES["sentences"].items()}
WORDS: dict[str, str] = _TABLES["words"]
STORY = "<opening> {He} <habit>. {His} <friendship>\nOne <weather> <daytime>, <plot>\n<ending>"


def draw(rng: np.random.Generator) -> str:
    """Draw one story."""
    return draw_scored(rng)[0]


def draw_scored(rng: np.random.Generator) -> tuple[str, float]:
    """Draw one story.

    Returns:
        The story, and the natural logarithm of its probability, summed while drawing.
    """
    writer = _Writer(rng)
    _tell(_compile(STORY), writer, {})
    return "".join(writer.words), writer.log_prob


def log_prob(text: str) -> float:
    """Natural logarithm of the probability that `draw` returns exactly this text; -inf if it never does."""
    reader = _Reader(text)
    try:
        _tell(_compile(STORY), reader, {})
    except _NotAStory:
        return -math.inf
    return reader.log_prob if reader.position == len(text) else -math.inf


def next_words(prefix: str) -> dict[str, float]:
    """The probability of each word that can follow in a story that begins with the words of `prefix`.

    Args:
        prefix: whole words; a word is what stands between spaces, such as `friend.`

    Returns:
        The probability of each word, with the space before it; an empty one is the end of the story. Nothing if no
        story begins with these words.
    """
    log_probs: dict[str, list[float]] = defaultdict(list)
    waiting: list[tuple[_Option, ...]] = [()]
    while waiting:
        explorer = _Explorer(prefix, waiting.pop())
        try:
            _tell(_compile(STORY), explorer, {})
        except _NotAStory:
            continue
        except _WordEnds:
            pass
        finally:
            waiting += explorer.others
        if explorer.position >= len(prefix) and (not prefix or explorer.following[:1] in " "):
            log_probs[explorer.following].append(explorer.log_prob)
    peak = max((found for many in log_probs.values() for found in many), default=0.0)
    weights = {word: math.fsum(math.exp(found - peak) for found in many) for word, many in log_probs.items()}
    total = math.fsum(weights.values())
    return {word: weight / total for word, weight in weights.items()}


def next_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> dict[int, float]:
    """The exact distribution of the next token of a story.

    No token of a SentencePiece vocabulary reaches past a space, so a story's tokens are those of its words in a row:
    only the ways to end the word in progress, and to begin the one after it, have to be enumerated.

    Args:
        tokenizer: the vocabulary.
        tokens: the ids of the story so far, with or without the token that begins it. Of several stories, the last.

    Returns:
        The probability of each id that can follow. After a whole story that is the token that begins the next one.
        Nothing if no story begins with these tokens: with such a text, or cut into them.
    """
    end = tokenizer.separator_id
    first = max((i + 1 for i, token in enumerate(tokens) if token == end), default=0)
    told = list(tokens[first:])
    begun = max((i for i, token in enumerate(told) if tokenizer.token_bytes(token).startswith(b" ")), default=0)
    text, word_so_far = tokenizer.decode(told[:begun]), told[begun:]
    if tokenizer.encode(text) != told[:begun]:
        return {}

    def ids(word: str) -> list[int]:
        """Return the ids of a word of next_words."""
        return tokenizer.encode(word.removeprefix(" ") if tokenizer.adds_space else word) if word else [end]

    found: dict[int, list[float]] = defaultdict(list)
    n = len(word_so_far)
    for word, probability in next_words(text).items():
        whole = ids(word)
        if whole[:n] != word_so_far:
            continue
        if len(whole) > n:
            found[whole[n]].append(probability)
        else:
            for following, share in next_words(text + word).items():
                found[ids(following)[0]].append(probability * share)
    total = math.fsum(math.fsum(many) for many in found.values())
    return {token: math.fsum(many) / total for token, many in found.items()}


class _Draw(NamedTuple):
    """The step `<rule>` or `<name:rule>`."""

    rule: "_Rule"
    name: str | None


class _Recall(NamedTuple):
    """The step `{name}` or `{Name}`."""

    name: str
    capitalize: bool


class _Note(NamedTuple):
    """The step `{name=value}`."""

    name: str
    value: str


_Step = str | _Draw | _Recall | _Note


class _Option(NamedTuple):
    """One option of a rule: the words that distinguish it, what follows them, and its log-probability."""

    head: str
    rest: tuple[_Step, ...]
    log_prob: float


@dataclass(frozen=True, slots=True, eq=False)
class _Rule:
    """A compiled rule, for both drivers."""

    options: tuple[_Option, ...]
    cumulative_weights: tuple[int, ...]
    heads: re.Pattern[str]
    by_head: dict[str, _Option]


class _Writer:
    """Draws: a random number makes each choice."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.random = rng.random
        self.words: list[str] = []
        self.log_prob = 0.0

    def choose(self, rule: _Rule) -> _Option:
        """Draw an option and write its head."""
        weights = rule.cumulative_weights
        option = rule.options[bisect_right(weights, int(self.random() * weights[-1]))]
        self.words.append(option.head)
        self.log_prob += option.log_prob
        return option

    def write(self, words: str) -> None:
        """Append words to the story."""
        self.words.append(words)


class _Reader:
    """Recognises: each choice is the option whose head comes next in the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.log_prob = 0.0

    def choose(self, rule: _Rule) -> _Option:
        """Find the one option whose head comes next, and move past the head."""
        match = rule.heads.match(self.text, self.position)
        if match is None:
            raise _NotAStory
        self.position = match.end()
        option = rule.by_head[match.group()]
        self.log_prob += option.log_prob
        return option

    def write(self, words: str) -> None:
        """Move past words that must come next."""
        if not self.text.startswith(words, self.position):
            raise _NotAStory
        self.position += len(words)


class _Explorer:
    """Follows a prefix and takes given options; then the first option that is possible, and notes the others.

    Attributes:
        position: number of characters told.
        following: those after the prefix; the story is told until a space ends the first word there.
        others: the options to give to other explorers, so that together they see all ways.
        log_prob: of all choices.
    """

    def __init__(self, prefix: str, options: tuple[_Option, ...]) -> None:
        self.prefix, self.options, self.taken = prefix, options, list[_Option]()
        self.position = 0
        self.following = ""
        self.others: list[tuple[_Option, ...]] = []
        self.log_prob = 0.0

    def choose(self, rule: _Rule) -> _Option:
        """Take the next of the given options, or the first possible one."""
        n = len(self.taken)
        if n < len(self.options):
            option = self.options[n]
        elif match := rule.heads.match(self.prefix, self.position):
            option = rule.by_head[match.group()]
        else:
            rest = self.prefix[self.position :]
            possible = [option for option in rule.options if option.head.startswith(rest)]
            if not possible:
                raise _NotAStory
            option = possible[0]
            self.others = [*self.others, *((*self.taken, other) for other in possible[1:])]
        self.taken.append(option)
        self.log_prob += option.log_prob
        self.write(option.head)
        return option

    def write(self, words: str) -> None:
        """Move past words, which must agree with the prefix as far as it goes."""
        known = self.prefix[self.position : self.position + len(words)]
        if not words.startswith(known):
            raise _NotAStory
        self.position += len(words)
        self.following += words[len(known) :]
        if " " in self.following[1:]:
            self.following = self.following[: self.following.index(" ", 1)]
            raise _WordEnds


class _NotAStory(Exception):
    """The text is not in the language."""


class _WordEnds(Exception):
    """What was asked for is told."""


def _tell(steps: tuple[_Step, ...], driver: _Writer | _Reader | _Explorer, memory: dict[str, str]) -> None:
    """Walk the steps; the driver makes the choices and takes the words."""
    for step in steps:
        if isinstance(step, str):
            driver.write(step)
        elif isinstance(step, _Draw):
            option = driver.choose(step.rule)
            if step.name:
                memory[step.name] = option.head
            _tell(option.rest, driver, memory)
        elif isinstance(step, _Recall):
            words = memory[step.name]
            driver.write(words.capitalize() if step.capitalize else words)
        else:
            memory[step.name] = step.value


_SLOT = re.compile(r"<(?:(\w+):)?(\w+)>|\{(\w+)(?:=(\w+))?\}")


@functools.cache
def _compile(text: str) -> tuple[_Step, ...]:
    """Turn an option's text into steps."""
    steps: list[_Step] = []
    end = 0
    for slot in _SLOT.finditer(text):
        if slot.start() > end:
            steps.append(text[end : slot.start()])
        end = slot.end()
        drawn_name, rule, name, value = slot.groups()
        if rule:
            steps.append(_Draw(_rule(rule), drawn_name))
        elif value:
            steps.append(_Note(name, value))
        else:
            steps.append(_Recall(name.lower(), name[0].isupper()))
    if end < len(text):
        steps.append(text[end:])
    return tuple(steps)


@functools.cache
def _rule(name: str) -> _Rule:
    """Compile a rule of the tables, with Zipf-Mandelbrot weights 1 / (rank + 1 + n / 8) over its n options."""
    texts = SENTENCES[name] if name in SENTENCES else tuple(WORDS[name].split())
    weights = [10**6 // (8 * rank + 8 + len(texts)) for rank in range(len(texts))]
    options = []
    for text, weight in zip(texts, weights, strict=True):
        head, *rest = _compile(text)
        if not isinstance(head, str):
            raise TypeError(f"rule {name!r}: an option begins with a slot: {text!r}")
        options.append(_Option(head, tuple(rest), math.log(weight / sum(weights))))
    heads = re.compile("|".join(re.escape(option.head) for option in options))
    return _Rule(tuple(options), tuple(accumulate(weights)), heads, {option.head: option for option in options})
