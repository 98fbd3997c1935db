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
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

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


class _NotAStory(Exception):
    """The text is not in the language."""


def _tell(steps: tuple[_Step, ...], driver: _Writer | _Reader, memory: dict[str, str]) -> None:
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
