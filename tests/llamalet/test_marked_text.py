import random

import pytest

from llamalet.marked_text import OTHERS, OWN, Marked, concat, marks_of, own

# Each character says whose it is in any case, so the right marks of any text can be read from it.
MINE, THEIRS = "AaBb<%\u00df\n", " \t\r>YyZz+0\ufb01"
OF_MINE = MINE + "Ss"  # what \u00df becomes


def marked(text: str) -> Marked:
    return Marked(text, expected(text))


def expected(text: str) -> str:
    return "".join(OWN if character in OF_MINE else OTHERS for character in text)


def some_text(rng: random.Random, most: int = 12) -> str:
    return "".join(rng.choices(MINE + THEIRS, k=rng.randint(0, most)))


def texts_in(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [text for item in value for text in texts_in(item)]


METHODS = {
    # operators
    "+": lambda a, b, n: (a + b, concat((a, b, a))),
    "*": lambda a, b, n: (a * n, n * a),
    "[]": lambda a, b, n: (a[n % len(a)] if a else a, a[n:], a[:n], a[::-1], list(a), list(reversed(a))),
    "%": lambda a, b, n: a.replace("%", marked("%%")) % ()
    + marked("<%s|%8s|%-8s|%.3s|%*s|%-*.*s|%%|%5d|%r>") % (b, b, b, b, n, b, n, 4, b, n, "y"),
    "% one": lambda a, b, n: (marked("A%sB") % b, marked("%9.2s") % b, marked("%(y)s<%(z)7s%%") % {"y": a, "z": b}),
    # methods
    "capitalize": lambda a, b, n: a.capitalize(),
    "casefold": lambda a, b, n: a.casefold(),
    "center": lambda a, b, n: (a.center(n * 4), marked(a).center(8, marked("<"))),
    "encode": lambda a, b, n: a.encode().decode().swapcase() and "",
    "expandtabs": lambda a, b, n: (a.expandtabs(), a.expandtabs(n), a.expandtabs(tabsize=3)),
    "join": lambda a, b, n: (a.join([b] * abs(n)), a.join(b)),
    "ljust": lambda a, b, n: (a.ljust(n * 4), marked(a).ljust(8, marked("<"))),
    "lower": lambda a, b, n: a.lower(),
    "lstrip": lambda a, b, n: (a.lstrip(), a.lstrip(b)),
    "partition": lambda a, b, n: a.partition(b[:1] or "x"),
    "removeprefix": lambda a, b, n: a.removeprefix(b[:1]),
    "removesuffix": lambda a, b, n: a.removesuffix(b[:1]),
    "replace": lambda a, b, n: (a.replace(b[:1], b), a.replace(b[:1], b, n), a.replace("", b), a.replace("", b, n)),
    "rjust": lambda a, b, n: (a.rjust(n * 4), marked(a).rjust(8, marked("<"))),
    "rpartition": lambda a, b, n: a.rpartition(b[:1] or "x"),
    "rsplit": lambda a, b, n: (a.rsplit(), a.rsplit(None, n), a.rsplit(b[:1] or "x", n)),
    "rstrip": lambda a, b, n: (a.rstrip(), a.rstrip(b)),
    "split": lambda a, b, n: (a.split(), a.split(None, n), a.split(b[:1] or "x"), a.split(b[:1] or "x", n)),
    "splitlines": lambda a, b, n: (a.splitlines(), a.splitlines(True), a.splitlines(keepends=n > 0)),
    "strip": lambda a, b, n: (a.strip(), a.strip(b)),
    "swapcase": lambda a, b, n: a.swapcase(),
    "title": lambda a, b, n: a.title(),
    "translate": lambda a, b, n: (
        a.translate({65: b, 66: None, 97: marked("<<"), 98: 89, 121: "z", 122: "YYY"}), a.translate("xyz"),
        a.translate(a.maketrans(marked("AY"), marked("BZ"))),
        a.translate(a.maketrans(marked("AY%"), marked("YAb"), "%B")),
    ),
    "upper": lambda a, b, n: a.upper(),
    "zfill": lambda a, b, n: (a.zfill(9), a.zfill(n), ("+" + a).zfill(9)),
    "__format__": lambda a, b, n: [
        format(a, spec) for spec in ("", "s", "9", "<9", ">9", "^9", "x>9s", "><9", ">^12.3", "09", ".2", ">.2s")
    ],
}  # fmt: skip
# They give no text, or are the sandbox's (test_template_filters.py).
NO_TEXT = {"count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
           "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "maketrans", "rfind",
           "rindex", "startswith", "format", "format_map"}  # fmt: skip


def test_every_method_of_text_is_tried():
    assert {name for name in dir(str) if name[0] != "_"} == NO_TEXT | {name for name in METHODS if name.isidentifier()} - {"__format__"}  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("name", METHODS)
def test_the_text_is_that_of_plain_text_and_the_marks_follow_each_character(name, monkeypatch):
    rng, method = random.Random(1), METHODS[name]
    for _ in range(300):
        a, b, n = some_text(rng), some_text(rng, 4), rng.randint(-3, 3)
        result = method(marked(a), marked(b), n)
        assert result == method(Marked(a), Marked(b), n)
        for text in texts_in(result):
            assert marks_of(text) == expected(text), text
        with monkeypatch.context() as plainly:
            plainly.setitem(globals(), "marked", str)
            assert method(a, b, n) == result


def test_plain_text_is_someone_elses_wherever_it_goes():
    for text in ("x" + own("<s>"), own("<s>").replace("s", "y"), own("<").join(["y", "y"]), own("%s>") % "x"):
        assert marks_of(text).count(OTHERS) == sum(text.count(letter) for letter in "xy") > 0
    assert marks_of("<s>".replace("s", own("t"))) == OTHERS * 3


def test_pieces_are_found_where_they_are_and_not_earlier():
    assert [marks_of(piece) for piece in (own("aba") + "bab").split("aba")] == ["", OTHERS * 3]
    assert marks_of((own("<s>") + "<s>").replace("<s>", "<t>", 1)) == OTHERS * 6
    assert marks_of((own("<s>") + "<s>").replace("<s>", own("<t>"), 1)) == OWN * 3 + OTHERS * 3


def test_a_percent_sign_is_no_directive():
    for template, values, marks in (
        ("%%%s", ("x",), "10"),
        ("%s%%s", ("x",), "011"),
        ("%s%d", ("x", 1), "00"),
        ("<%d>", 1, "101"),
        ("%%s", (), "11"),
        ("<%(a)s>", {"a": "x"}, "101"),
        ("<%((a))s>", {"(a)": "x"}, "000"),  # not read by our expression, so plain
        ("%s", {"a": "x"}, "0" * 10),
    ):
        assert own(template) % values == template % values
        assert marks_of(own(template) % values) == marks
    assert marks_of("<%s>" % own("x")) == "010"  # noqa: UP031


def test_letters_that_become_several_keep_their_marks():
    text = own("<\u00df>") + "\u00df\ufb03\u0130"
    for change in (str.upper, str.lower, str.casefold, str.swapcase, str.title, str.capitalize):
        parts = [getattr(own("<\u00df>"), change.__name__)(), change(str.__str__(text))[-1:]]
        found = getattr(text, change.__name__)()
        assert found == change(str.__str__(text))
        n_own = marks_of(found).count(OWN)
        assert n_own == len(parts[0]) and marks_of(found) == OWN * n_own + OTHERS * (len(found) - n_own)


def test_a_number_is_no_character_of_a_template():
    assert marks_of(own("<x>").translate({120: 60})) == "101"  # a message may have said 60
    assert own("x").maketrans("ab", "cd") == {97: 99, 98: 100}
    assert marks_of(own("<x>").translate(own("").maketrans("x", own("y")))) == "111"
    for table in ("", ["ab", "c"], [5, "a"]):
        with pytest.raises((TypeError, ValueError)):
            own("").maketrans(*table)


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
