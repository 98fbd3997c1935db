"""Text that knows which of its characters a chat template wrote itself.

A template joins its own words with what people wrote. Only its own may become special tokens, so each character of a
Marked text carries a mark: OWN, or OTHERS for what came from a message. The marks follow the characters through the
operators and all methods of str. What an operation adds that nobody wrote is OTHERS: numbers, the spaces of center, the
zeros of zfill. Where marks cannot follow, the result is plain text, which counts as OTHERS: a lost mark makes a special
token plain text, and never the reverse. The text itself is always what the same operation on plain text gives.

The repr of a text loses its marks: %r, {!r}, and the text of a list or a dict.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

OWN, OTHERS = "1", "0"
DIRECTIVE = re.compile(
    r"%(?:\((?P<key>[^()]*)\))?"
    r"(?P<rest>(?P<flags>[#0\- +]*)(?P<width>\*|\d*)(?P<cut>\.(?P<most>\*|\d*))?[hlL]?(?P<type>[%a-zA-Z]))"
)


class Marked(str):
    """Text with a mark for each character.

    Attributes:
        _marks: OWN or OTHERS for each character; templates cannot read names that begin with an underscore.
    """

    _marks: str

    def __new__(cls, text: object = "", marks: str | None = None) -> "Marked":
        """Mark a text; without marks, it is someone else's.

        Raises:
            ValueError: if there is not one mark for each character.
        """
        self = super().__new__(cls, text)
        self._marks = OTHERS * len(self) if marks is None else marks
        if len(self._marks) != len(self):
            raise ValueError(f"{len(self._marks)} marks for {len(self)} characters")
        return self

    def __str__(self) -> "Marked":
        return self

    # --- joining ---

    def __add__(self, other: Any) -> Any:
        return concat((self, other)) if _is_text(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return concat((other, self)) if _is_text(other) else NotImplemented

    def __mul__(self, count: Any) -> Any:
        text = str.__mul__(self, count)
        return text if text is NotImplemented else Marked(text, self._marks * count)

    __rmul__ = __mul__

    def join(self, pieces: Iterable[str], /) -> "Marked":
        pieces = list(pieces)
        str.join(self, pieces)  # raises what plain text raises
        between = [self] * (2 * len(pieces) - 1)
        between[::2] = pieces  # type: ignore[assignment]
        return concat((Marked(), *between))

    def __mod__(self, values: Any) -> "Marked":
        """Fill in a format: its literals keep their marks, and so do the values of %s."""
        text = str.__mod__(self, values)
        left = list(values) if isinstance(values, tuple) else [values]
        pieces: list[str] = []
        at = 0
        for found in DIRECTIVE.finditer(self):
            if "%" in (literal := self[at : found.start()]):
                return Marked(text)  # a directive that is not understood
            pieces.append(literal)
            at = found.end()
            if found["type"] == "%":
                pieces.append(self[at - 1 : at])
            elif found["key"] is not None:
                pieces.append(_filled(found, [values[found["key"]]]))
            else:
                n_values = 1 + (found["width"] == "*") + (found["most"] == "*")
                pieces.append(_filled(found, left[:n_values]))
                del left[:n_values]
        return _checked([*pieces, self[at:]], text)

    def __rmod__(self, template: Any) -> Any:
        return Marked(template) % self if type(template) is str else NotImplemented

    def __format__(self, spec: str) -> "Marked":
        cut = re.search(r"\.(\d+)s?\Z", spec)
        align = next((spec[at] for at in (1, 0) if spec[at : at + 1] in ("<", ">", "^")), "<")
        return _padded(self[: int(cut[1])] if cut else self, str.__format__(self, spec), align)

    # --- cutting ---

    def __getitem__(self, key: Any) -> "Marked":
        return Marked(str.__getitem__(self, key), self._marks[key])

    def __iter__(self) -> Iterator["Marked"]:
        return map(Marked, str.__iter__(self), self._marks)

    def lstrip(self, chars: str | None = None, /) -> "Marked":
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "Marked":
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars: str | None = None, /) -> "Marked":
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> "Marked":
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> "Marked":
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: int = -1) -> "list[Marked]":  # type: ignore[override]
        return cut(self, str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: int = -1) -> "list[Marked]":  # type: ignore[override]
        return cut(self, str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> "list[Marked]":  # type: ignore[override]
        return cut(self, str.splitlines(self, keepends), None)

    def partition(self, sep: str, /) -> tuple["Marked", "Marked", "Marked"]:
        first, middle, last = cut(self, str.partition(self, sep), "")
        return first, middle, last

    def rpartition(self, sep: str, /) -> tuple["Marked", "Marked", "Marked"]:
        first, middle, last = cut(self, str.rpartition(self, sep), "")
        return first, middle, last

    # --- changing ---

    def replace(self, old: str, new: str, /, *count: Any, **named: Any) -> "Marked":
        text = str.replace(self, old, new, *count, **named)
        times = int([-1, *count, *named.values()][-1])
        if old:
            pieces: list[str] = list(self.split(old, times))
        else:  # before each character, and at the end
            times = len(self) + 1 if times < 0 else min(times, len(self) + 1)
            pieces = ["", *self[: times - 1], self[times - 1 :]] if times else [self]
        return _checked([Marked.join(as_marked(new), pieces)], text)

    @staticmethod
    def maketrans(x: Any, /, *others: str) -> dict[int, Any]:
        table = str.maketrans(x, *others)
        if others:  # texts: what becomes of each character, and perhaps those to leave out
            codes = {ord(old): _Code(ord(new), marks_of(new)) for old, new in zip(x, as_marked(others[0]), strict=True)}
            table |= {code: codes[code] for code, new in table.items() if new is not None}
        return table

    def translate(self, table: Any, /) -> "Marked":
        text = str.translate(self, table)
        return _checked([_translated(character, table) for character in self], text)

    def expandtabs(self, tabsize: Any = 8) -> "Marked":
        text = str.expandtabs(self, tabsize)
        marks, column = "", 0
        for character, mark in zip(str(self), self._marks, strict=True):
            width = (tabsize - column % tabsize if tabsize > 0 else 0) if character == "\t" else 1
            column = 0 if character in "\r\n" else column + width
            marks += mark * width
        return Marked(text, marks)

    def center(self, width: Any, fillchar: str = " ", /) -> "Marked":
        text = str.center(self, width, fillchar)
        added = len(text) - len(self)
        return self._between(text, added // 2 + (added & int(width) & 1), fillchar)

    def ljust(self, width: Any, fillchar: str = " ", /) -> "Marked":
        return self._between(str.ljust(self, width, fillchar), 0, fillchar)

    def rjust(self, width: Any, fillchar: str = " ", /) -> "Marked":
        text = str.rjust(self, width, fillchar)
        return self._between(text, len(text) - len(self), fillchar)

    def _between(self, text: str, left: int, fillchar: str) -> "Marked":
        """Return the text between fill characters, `left` of them before it."""
        mark = marks_of(fillchar)
        return Marked(text, mark * left + self._marks + mark * (len(text) - len(self) - left))

    def zfill(self, width: Any, /) -> "Marked":
        text = str.zfill(self, width)
        n_signs = len(self[:1]) - len(self[:1].lstrip("+-"))
        zeros = OTHERS * (len(text) - len(self))
        return Marked(text, self._marks[:n_signs] + zeros + self._marks[n_signs:])

    def lower(self) -> "Marked":
        return follow(self, str.lower)

    def upper(self) -> "Marked":
        return follow(self, str.upper)

    def title(self) -> "Marked":
        return follow(self, str.title)

    def capitalize(self) -> "Marked":
        return follow(self, str.capitalize)

    def casefold(self) -> "Marked":
        return follow(self, str.casefold)

    def swapcase(self) -> "Marked":
        return follow(self, str.swapcase)


class _Code(int):
    """A character's number, in a table of maketrans, with the mark of the character."""

    mark: str

    def __new__(cls, number: int, mark: str) -> "_Code":
        self = super().__new__(cls, number)
        self.mark = mark
        return self


def own(value: Any) -> Any:
    """Return a constant of a template, with all text in it marked as the template's own."""
    if type(value) is str:
        return Marked(value, OWN * len(value))
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(own, value))
    return {own(key): own(item) for key, item in value.items()} if type(value) is dict else value


def marks_of(text: str) -> str:
    """Return the marks of any text."""
    return text._marks if isinstance(text, Marked) else OTHERS * len(text)


def concat(pieces: Iterable[str]) -> Any:
    """Return texts joined: plain text if none of them is marked."""
    pieces = list(pieces)
    text = "".join(pieces)
    if not any(isinstance(piece, Marked) for piece in pieces):
        return text
    return Marked(text, "".join(map(marks_of, pieces)))


def as_marked(value: Any) -> Marked:
    """Return the text of any value, with the marks that it has."""
    text = str(value)
    return text if isinstance(text, Marked) else Marked(text)


def cut(text: Marked, pieces: Iterable[str], between: str | None = None) -> list[Marked]:
    """Return pieces of a text, in order, with their marks.

    Args:
        text: the text.
        pieces: what it was cut into.
        between: what lies between two pieces; None: characters with which no piece begins.
    """
    found, at = [], 0
    for piece in pieces:
        at = text.index(piece, at)
        found.append(text[at : at + len(piece)])
        at += len(piece) + len(between or "")
    return found


def follow(text: Marked, change: Callable[[str], str]) -> Marked:
    """Return a text changed, in which each character becomes one or more, with the marks of what they came from.

    Args:
        text: the text.
        change: how many characters one becomes may depend on the one before it, and on nothing else.
    """
    changed, lengths = change(_plain(text)), {}
    if len(changed) == len(text):
        return Marked(changed, marks_of(text))
    pairs = list(zip(["", *_plain(text)], _plain(text), strict=False))
    for before, character in set(pairs):
        lengths[before, character] = len(change(before + character)) - len(change(before))
    marks = "".join(mark * lengths[pair] for pair, mark in zip(pairs, marks_of(text), strict=True))
    return Marked(changed, marks if len(marks) == len(changed) else None)


def _plain(text: str) -> str:
    """Return a text without its marks."""
    return str.__str__(text)


def _checked(pieces: Iterable[str], text: str) -> Marked:
    """Return pieces joined if that is the text that plain text gives, else this text."""
    found: Marked = concat([Marked(), *pieces])
    return found if found == text else Marked(text)


def _filled(directive: re.Match[str], values: list[Any]) -> str:
    """Return what a % directive makes of its values, of which the last is to be shown."""
    text = str.__mod__("%" + directive["rest"], tuple(values))
    if directive["type"] != "s":
        return text
    value, *more = as_marked(values[-1]), *values[:-1]
    if directive["cut"]:
        value = value[: max(0, more.pop() if directive["most"] == "*" else int(directive["most"] or 0))]
    return _padded(value, text, "<" if "-" in directive["flags"] or more and more[0] < 0 else ">")


def _padded(text: Marked, padded: str, align: str) -> Marked:
    """Return a text with the padding that formats put around it."""
    added = len(padded) - len(text)
    left = {"<": 0, ">": added, "^": added // 2}[align]
    return _checked([padded[:left], text, padded[left + len(text) :]], padded)


def _translated(character: Marked, table: Any) -> str:
    """Return what a table for str.translate makes of a character."""
    try:
        found = table[ord(character)]
    except LookupError:
        return character
    if isinstance(found, int):
        return Marked(chr(found), found.mark if isinstance(found, _Code) else OTHERS)
    return as_marked("" if found is None else found)


def _is_text(value: Any) -> bool:
    """Return whether a value is text, but not HTML, which has its own rules for joining."""
    return isinstance(value, str) and not hasattr(value, "__html__")
