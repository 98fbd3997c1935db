import random

import pytest

from llamalet.marked_text import OTHERS, OWN, Marked, concat, fill, marks_of, own

# Each character says whose it is, so the right marks of any text can be read from it.
MINE, THEIRS = "AB<% \n", "ab>s\t\r"


def marked(text: str) -> Marked:
    return Marked(text, expected(text))


def expected(text: str) -> str:
    return "".join(OWN if character in MINE else OTHERS for character in text)


def some_text(rng: random.Random, most: int = 12) -> str:
    return "".join(rng.choices(MINE + THEIRS, k=rng.randint(0, most)))


def texts_in(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [text for item in value for text in texts_in(item)]


METHODS = {
    "add": lambda a, b, n: a + b,
    "concat": lambda a, b, n: concat((a, b, a)),
    "multiply": lambda a, b, n: a * n,
    "multiplied": lambda a, b, n: n * a,
    "join": lambda a, b, n: a.join([b] * abs(n)),
    "index": lambda a, b, n: a[n % len(a)] if a else a,
    "slice": lambda a, b, n: a[n:],
    "reversed": lambda a, b, n: a[::-1],
    "iterate": lambda a, b, n: list(a),
    "last": lambda a, b, n: list(reversed(a)),
    "strip": lambda a, b, n: a.strip(),
    "strip some": lambda a, b, n: (a.strip(b), a.lstrip(b), a.rstrip(b)),
    "affixes": lambda a, b, n: (a.removeprefix(b[:1]), a.removesuffix(b[:1])),
    "split": lambda a, b, n: (a.split(), a.rsplit(), a.split(None, n), a.rsplit(None, n)),
    "split at": lambda a, b, n: (a.split(b[:1] or "x"), a.rsplit(b[:1] or "x", n), a.split(b[:1] or "x", n)),
    "lines": lambda a, b, n: (a.splitlines(), a.splitlines(True), a.splitlines(keepends=n > 0)),
    "partition": lambda a, b, n: (a.partition(b[:1] or "x"), a.rpartition(b[:1] or "x")),
    "replace": lambda a, b, n: (a.replace(b[:1] or "x", b), a.replace(b[:1] or "x", b, n)),
    "format": lambda a, b, n: a.replace("%", "") % () + Marked("%s", "11").join(["", ""]) % (b,),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_text_is_that_of_plain_text_and_the_marks_follow_each_character(name):
    rng, method = random.Random(1), METHODS[name]
    for _ in range(400):
        a, b, n = some_text(rng), some_text(rng, 4), rng.randint(-3, 3)
        result = method(marked(a), marked(b), n)
        assert result == method(Marked(a), Marked(b), n) == method(a, b, n)
        for text in texts_in(result):
            assert marks_of(text) == expected(text)


def test_plain_text_is_someone_elses_wherever_it_goes():
    for text in ("x" + own("<s>"), own("<s>").replace("s", "y"), own("<").join(["y", "y"]), own("%s>") % "x"):
        assert marks_of(text).count(OTHERS) == sum(text.count(letter) for letter in "xy") > 0
    for text in (
        f"{own('<s>')}",
        "".join([own("<s>")]),
        own("<s>").center(9),
        own("%5s") % own("a"),
        own("a").zfill(5),
    ):
        assert OWN not in marks_of(text) or text == "<s>"
    assert marks_of("<s>".replace("s", own("t"))) == OTHERS * 3


def test_pieces_are_found_where_they_are_and_not_earlier():
    assert [marks_of(piece) for piece in (own("aba") + "bab").split("aba")] == ["", OTHERS * 3]
    assert marks_of((own("<s>") + "<s>").replace("<s>", "<t>", 1)) == OTHERS * 6
    assert marks_of((own("<s>") + "<s>").replace("<s>", own("<t>"), 1)) == OWN * 3 + OTHERS * 3


def test_a_percent_sign_is_no_directive():
    for template, values in (
        ("%%%s", ("x",)),
        ("%s%%s", ("x",)),
        ("%s%d", ("x", 1)),
        ("%%s", ()),
        ("%(a)s", {"a": "x"}),
    ):
        assert own(template) % values == template % values


def test_letters_change_and_keep_their_marks_unless_some_become_longer():
    text = own("<Im>") + "x\u00e9"
    for changed in (text.upper(), text.lower(), text.title(), text.capitalize()):
        assert marks_of(changed) == "111100"
    assert (text + "\u00df").upper() == (str.upper("<Im>x\u00e9") + "SS")
    assert marks_of((text + "\u00df").upper()) == OTHERS * 8


def test_formats_are_filled_in_with_marks_where_they_are_simple():
    for template in ("<{}|{}>", "<{0}|{1}>", "<{a}|{}>", "{{{}}}"):
        text = fill(own(template), template.format("x", "y", a="z"), ("x", "y"), {"a": "z"})
        assert marks_of(text) == "".join(OTHERS if letter in "xyz" else OWN for letter in text)
    for template in ("{:>3}", "{!r}", "{0.real}", "{0[0]}"):
        assert OWN not in marks_of(fill(own(template), "any", ("x",), {}))
    assert OWN not in marks_of(fill(Marked("<{}>"), "<x>", ("x",), {}))


def test_what_is_no_text_is_refused_as_by_plain_text():
    for wrong in (
        lambda t: t + 1,
        lambda t: 1 + t,
        lambda t: t.join([1]),
        lambda t: t * "x",
        lambda t: t % 1,
        lambda t: t[9],
    ):
        with pytest.raises((TypeError, IndexError)) as theirs:
            wrong("ab")
        with pytest.raises(theirs.type):
            wrong(own("ab"))
    with pytest.raises(ValueError, match="marks for"):
        Marked("ab", "1")


def test_constants_of_a_template_are_its_own_with_all_they_hold():
    value = own({"a": ["b", ("c", 1)], "d": {"e"}})
    assert value == {"a": ["b", ("c", 1)], "d": {"e"}}
    assert all(marks_of(text) == OWN for text in (*value, value["a"][0], value["a"][1][0], *value["d"]))
