"""Text that knows which of its characters a chat template wrote itself.

A template joins its own words with what people wrote. Only its own may become special tokens, so each character of a
Marked text carries a mark: OWN, or OTHERS for what came from a message. The marks follow the characters through the
operations that templates use. Any other operation gives plain text, which counts as OTHERS: a lost mark makes a special
token plain text, and never the reverse. The text itself is always what the same operation on plain text gives.
"""

import itertools
import string
from collections.abc import Iterable, Iterator
from typing import Any

OWN, OTHERS = "1", "0"


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
        """Fill in a format; the marks survive where every directive is %s and every value is text."""
        text = str.__mod__(self, values)
        found, pieces = values if isinstance(values, tuple) else (values,), self.split("%s")
        if len(pieces) != len(found) + 1 or not all(_is_text(value) for value in found):
            return Marked(text)
        filled = concat([pieces[0], *(part for pair in zip(found, pieces[1:], strict=True) for part in pair)])
        return filled if filled == text else Marked(text)

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
        return self._pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: int = -1) -> "list[Marked]":  # type: ignore[override]
        return self._pieces(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> "list[Marked]":  # type: ignore[override]
        return self._pieces(str.splitlines(self, keepends), None)

    def partition(self, sep: str, /) -> tuple["Marked", "Marked", "Marked"]:
        first, middle, last = self._pieces(str.partition(self, sep), "")
        return first, middle, last

    def rpartition(self, sep: str, /) -> tuple["Marked", "Marked", "Marked"]:
        first, middle, last = self._pieces(str.rpartition(self, sep), "")
        return first, middle, last

    def _pieces(self, pieces: Iterable[str], between: str | None) -> "list[Marked]":
        """Return pieces of the text, in order, with their marks.

        Args:
            pieces: what a method of str cut the text into.
            between: what lies between two pieces; None: characters with which no piece begins.
        """
        found, at = [], 0
        for piece in pieces:
            at = self.index(piece, at)
            found.append(self[at : at + len(piece)])
            at += len(piece) + len(between or "")
        return found

    # --- changing ---

    def replace(self, old: str, new: str, /, count: Any = -1) -> "Marked":
        text = str.replace(self, old, new, count)
        return Marked.join(Marked(new, marks_of(new)), self.split(old, count)) if old else Marked(text)

    def lower(self) -> "Marked":
        return self._changed(str.lower(self))

    def upper(self) -> "Marked":
        return self._changed(str.upper(self))

    def title(self) -> "Marked":
        return self._changed(str.title(self))

    def capitalize(self) -> "Marked":
        return self._changed(str.capitalize(self))

    def _changed(self, text: str) -> "Marked":
        """Return the text with other letters; some become longer, and then the marks are lost."""
        return Marked(text, self._marks if len(text) == len(self) else None)


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


def fill(template: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return what str.format gave, with marks where every field is a bare {}, {0} or {name} of text.

    Args:
        template: the format.
        text: the result.
        args: the values by position.
        kwargs: the values by name.
    """
    if not isinstance(template, Marked) or OTHERS in template._marks:
        return text
    values = {str(number): value for number, value in enumerate(args)} | kwargs
    numbers = map(str, itertools.count())
    pieces: list[str] = []
    for literal, field, spec, conversion in string.Formatter().parse(template):
        pieces.append(own(literal))
        if field is not None:
            value = values.get(field or next(numbers))
            if spec or conversion or not isinstance(value, str):
                return text
            pieces.append(value)
    filled: str = concat(pieces)
    return filled if filled == text else text


def _is_text(value: Any) -> bool:
    """Return whether a value is text, but not HTML, which has its own rules for joining."""
    return isinstance(value, str) and not hasattr(value, "__html__")
