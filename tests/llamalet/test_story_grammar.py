import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from llamalet import story_grammar as grammar
from llamalet.tokenizer import Tokenizer

DEMO = Path(grammar.__file__).parent / "assets" / "demo.bin"
N_STORIES = 10_000
ROOT = grammar._compile(grammar.STORY)


@pytest.fixture(scope="module")
def stories() -> list[tuple[str, float]]:
    rng = np.random.default_rng(20)
    return [grammar.draw_scored(rng) for _ in range(N_STORIES)]


@cache
def rule_names() -> tuple[str, ...]:
    return (*grammar.SENTENCES, *grammar.WORDS)


def draws(steps: tuple[grammar._Step, ...]) -> Iterator[grammar._Rule]:
    return (step.rule for step in steps if isinstance(step, grammar._Draw))


def probability(option: grammar._Option) -> float:
    return math.exp(option.log_prob)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_drawing_and_recognising_agree(stories: list[tuple[str, float]]) -> None:
    for text, drawn in stories:
        assert grammar.log_prob(text) == pytest.approx(drawn, abs=1e-9)
    assert len({text for text, _ in stories}) == N_STORIES


def test_the_same_seed_tells_the_same_story() -> None:
    again = [grammar.draw(np.random.default_rng(3)) for _ in range(2)]
    assert again[0] == again[1]
    assert again[0] != grammar.draw(np.random.default_rng(4))
    rng = np.random.default_rng(3)
    assert [grammar.draw(rng) for _ in range(2)] != again


def test_options_are_drawn_as_often_as_they_should(stories: list[tuple[str, float]]) -> None:
    plots = [text.split("\n")[1].split(" ", 3)[3] for text, _ in stories]
    for option in grammar._rule("plot").options:
        share, expected = np.mean([plot.startswith(option.head) for plot in plots]), probability(option)
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / N_STORIES)


def test_no_head_of_a_rule_begins_another() -> None:
    """With a literal head on every option, this is what makes the derivation of a text unique."""
    assert len(rule_names()) > 50
    for name in rule_names():
        heads = sorted(option.head for option in grammar._rule(name).options)
        for head, following in zip(heads, heads[1:], strict=False):
            assert not following.startswith(head), f"{name}: {head!r} begins {following!r}"


def test_weights_are_uneven_and_probabilities_sum_to_one() -> None:
    for name in rule_names():
        log_probs = [option.log_prob for option in grammar._rule(name).options]
        assert math.fsum(map(math.exp, log_probs)) == pytest.approx(1, abs=1e-12)
        assert len(log_probs) <= 200
        assert all(likelier > rarer for likelier, rarer in zip(log_probs, log_probs[1:], strict=False)), name


def test_every_story_has_80_to_250_words(stories: list[tuple[str, float]]) -> None:
    @cache
    def bounds(steps: tuple[grammar._Step, ...]) -> tuple[int, int]:
        """Fewest and most words of a text; every slot but a note stands for at least one."""
        fewest = most = 0
        for step in steps:
            if isinstance(step, grammar._Draw):
                spans = [bounds((option.head, *option.rest)) for option in step.rule.options]
                fewest, most = fewest + min(low for low, _ in spans), most + max(high for _, high in spans)
            else:
                n = len(words_of(step)) if isinstance(step, str) else int(isinstance(step, grammar._Recall))
                fewest, most = fewest + n, most + n
        return fewest, most

    fewest, most = bounds(ROOT)
    assert 80 <= fewest <= most <= 250
    assert all(fewest <= len(words_of(text)) <= most for text, _ in stories)


def test_the_corpus_is_rich(stories: list[tuple[str, float]]) -> None:
    assert len({word for text, _ in stories for word in words_of(text)}) >= 1500

    def entropy(steps: tuple[grammar._Step, ...]) -> float:
        return math.fsum(
            probability(option) * (entropy(option.rest) - option.log_prob)
            for rule in draws(steps)
            for option in rule.options
        )

    exact, drawn = entropy(ROOT), np.array([log_prob for _, log_prob in stories])
    assert exact >= 150 * math.log(2)
    assert abs(exact + drawn.mean()) < 4 * drawn.std() / math.sqrt(N_STORIES)


def test_the_english_is_clean(stories: list[tuple[str, float]]) -> None:
    for text, _ in stories:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE), text
        assert not re.search(r"[<>{}=]|  | [.,!?\n]|\n\n", text), text
        assert text.count('"') % 2 == 0 and text.endswith("."), text
        assert all(re.match(r'"?[A-Z]', sentence) for sentence in re.split(r'\n|(?<=[.!?]) (?=[^"])', text)), text


def test_characters_and_things_stay_the_same(stories: list[tuple[str, float]]) -> None:
    names = {name: rule for rule in ("girl", "boy", "pet") for name in grammar.WORDS[rule].split()}
    for text, _ in stories:
        told = set(re.findall(r"[A-Z][a-z]+", text)) & set(names)
        assert sorted(names[name] for name in told) in (["girl", "pet"], ["boy", "pet"]), text
        is_girl = "girl" in {names[name] for name in told}
        assert not re.search(r"\b([Hh]e|[Hh]is|him)\b" if is_girl else r"\b([Ss]he|[Hh]er)\b", text), text


def test_what_is_not_a_story_is_refused(stories: list[tuple[str, float]]) -> None:
    rng = np.random.default_rng(5)
    for text, _ in stories[:500]:
        cut = int(rng.integers(len(text)))
        start, end = rng.choice([match.span() for match in re.finditer(r"[A-Za-z]+", text)])
        hero = re.findall(r"(?:girl|boy) named (\w+)", text)[0]
        before, after = text.rsplit(hero, 1)
        for broken in (
            text[:cut],
            text + text[cut],
            text[:cut] + text[cut + 1 :],
            text[:cut] + "?!" + text[cut:],
            text[:start] + "quokka" + text[end:],
            before + ("Tom" if hero != "Tom" else "Ben") + after,
        ):
            assert grammar.log_prob(broken) == -math.inf, broken
    assert grammar.log_prob("") == grammar.log_prob("Once upon a time") == -math.inf


@pytest.fixture(scope="module")
def vocabulary() -> Tokenizer:
    return Tokenizer.load(DEMO.with_name("demo.tokenizer.model"))


def test_the_words_that_follow_have_the_shares_that_the_grammar_gives_them() -> None:
    assert grammar.next_words("Once upon a") == {" time": 1.0}
    start = "Once upon a time there was a"
    traits = {f" {option.head}": probability(option) for option in grammar._rule("trait").options}
    assert grammar.next_words(start) == pytest.approx(traits, rel=1e-9)
    assert grammar.next_words("Hello") == grammar.next_words(f"{start} time") == {}
    # "the" begins "there" too, but a word is whole.
    story = grammar.draw(np.random.default_rng(3))
    assert "day, the glossy" in story
    looks = {f" {option.head}": probability(option) for option in grammar._rule("look").options}
    assert grammar.next_words(story[: story.index(" glossy")]) == pytest.approx(looks, rel=1e-9)
    assert grammar.next_words(story) == {"": 1.0}
    assert grammar.next_words(story[: story.rindex(" ")])[story[story.rindex(" ") :]] < 0.1


def test_a_storys_tokens_have_the_probability_of_the_story(
    vocabulary: Tokenizer, stories: list[tuple[str, float]]
) -> None:
    """The chain rule, up to and including the token that ends the story."""
    for text, log_prob in stories[:8]:
        ids = [*vocabulary.encode_document(text), vocabulary.separator_id]
        nats = []
        for n in range(1, len(ids)):
            following = grammar.next_tokens(vocabulary, ids[:n])
            assert math.fsum(following.values()) == pytest.approx(1, abs=1e-12)
            nats.append(math.log(following[ids[n]]))
        assert math.fsum(nats) == pytest.approx(log_prob, abs=1e-9)
        assert grammar.next_tokens(vocabulary, ids[:-1]) == {vocabulary.separator_id: 1.0}
        assert grammar.next_tokens(vocabulary, ids) == grammar.next_tokens(vocabulary, [])


def test_tokens_follow_as_often_as_in_drawn_stories(vocabulary: Tokenizer, stories: list[tuple[str, float]]) -> None:
    start = vocabulary.encode_document("Once upon a time there was a")
    seen: Counter[int] = Counter()
    for ids in map(vocabulary.encode_document, (text for text, _ in stories)):
        if ids[: len(start)] == start:
            seen[ids[len(start)]] += 1
    n = seen.total()
    expected = grammar.next_tokens(vocabulary, start)
    assert n > 4000 and seen.keys() <= expected.keys() and len(expected) > 40
    for token, share in expected.items():
        assert abs(seen[token] / n - share) < 4.5 * math.sqrt(share * (1 - share) / n)


def test_what_begins_no_story_has_no_next_token(vocabulary: Tokenizer) -> None:
    assert not grammar.next_tokens(vocabulary, vocabulary.encode_document("Once upon a tree"))
    assert not grammar.next_tokens(vocabulary, vocabulary.encode_document("Once  upon"))
    # " Once" is one token; cut otherwise, it is in no story.
    assert grammar.next_tokens(vocabulary, vocabulary.encode("Once"))
    assert not grammar.next_tokens(vocabulary, vocabulary.encode("O"))
    story = grammar.draw(np.random.default_rng(1))
    assert not grammar.next_tokens(vocabulary, [*vocabulary.encode_document(story), vocabulary.encode("A")[0]])
