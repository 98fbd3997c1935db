"""What jinja2 does with text, done so that marked text (marked_text.py) keeps its marks: filters, formats and HTML.

Each filter gives the text that jinja2's own gives; those that are not here keep the marks as they are. Plain text,
which is never a special token, remains of:

    pprint, striptags, urlize, xmlattr, and urlencode of a mapping
    in JSON, all but the texts: its brackets, commas and numbers
    the names of keyword arguments, as in dict(name=1)
    everything in {% autoescape true %}
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import filters, pass_environment, pass_eval_context
from jinja2.sandbox import SandboxedEscapeFormatter, SandboxedFormatter

from llamalet.marked_text import OWN, Marked, as_marked, concat, cut, follow, marks_of

JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')


class Html(filters.Markup, Marked):  # type: ignore[misc]
    """Marked text that is HTML, into which other text goes escaped; markupsafe's methods end in those of Marked."""

    def __new__(cls, text: Any = "") -> "Html":
        """Take a text for HTML, with the marks that it has."""
        text = as_marked(text.__html__() if hasattr(text, "__html__") else text)
        return Marked.__new__(cls, text, marks_of(text))  # type: ignore[return-value]

    def __str__(self) -> Marked:
        return Marked(str.__str__(self), self._marks)

    def __repr__(self) -> str:
        return f"Markup({str.__repr__(self)})"

    def __add__(self, other: Any) -> Any:
        is_text = isinstance(other, str) or hasattr(other, "__html__")
        return Html(concat((self, self.escape(other)))) if is_text else NotImplemented

    @classmethod
    def escape(cls, value: Any, /) -> "Html":
        """Return a value's text as HTML."""
        return cls(value if hasattr(value, "__html__") else follow(as_marked(value), _escaped))


def _field_length(field: str, spec: str, conversion: str | None, template: str, at: int) -> int:
    """Return how many characters the field at `at` of a format takes."""
    length = len("{}") + len(field)  # {a}
    if conversion:
        length += len("!r")  # {a!r}
    if template[at + length - 1] == ":":
        length += len(":") + len(spec)  # {a:>4}, and {a:}, whose spec is as empty as that of {a}
    return length


class _Formatter(SandboxedFormatter):
    """The sandbox's str.format, which also collects the pieces of the result with their marks."""

    def vformat(self, template: str, args: Any, kwargs: Any) -> Marked:
        """Return the format, filled in."""
        self._pieces: list[str] = [Marked()]
        self._depth = 0  # the spec of a field may be a format too
        text = super().vformat(template, args, kwargs)
        found: Marked = concat(self._pieces)
        return found if found == text else Marked(text)

    def parse(self, template: str) -> Iterator[Any]:
        """Yield the literals and fields of a format."""
        self._depth += 1
        at = 0
        for literal, field, spec, conversion in super().parse(template):
            if self._depth == 1:
                self._pieces.append(Marked(literal, marks_of(template)[at : at + len(literal)]))
            at += len(literal)
            if field is not None:
                at += _field_length(field, spec or "", conversion, template, at)
            elif template[at - 1 : at + 1] in ("{{", "}}"):
                at += 1  # the literal has one of the two
            yield literal, field, spec, conversion
        self._depth -= 1

    def format_field(self, value: Any, spec: str) -> Any:
        """Return a value's text."""
        text = super().format_field(value, spec)
        if self._depth == 1:
            self._pieces.append(text)
        return text


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """The same for HTML."""


def formatter(environment: Any, template: Marked) -> _Formatter:
    """Return what fills in a format."""
    is_html = isinstance(template, Html)
    return _EscapeFormatter(environment, escape=Html.escape) if is_html else _Formatter(environment)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> Marked:
    """Return a value as JSON, as transformers does; jinja2's own filter would escape it for HTML."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    inside = list(_texts_in(value, sort_keys))
    found = list(JSON_TEXT.finditer(text))
    if len(found) != len(inside) or not any(OWN in marks_of(one) for one in inside):
        return Marked(text)
    pieces: list[str] = []
    at = 0
    for match, one in zip(found, inside, strict=True):
        pieces += [
            text[at : match.start() + 1],
            follow(one, lambda part: json.dumps(part, ensure_ascii=ensure_ascii)[1:-1]),
        ]
        at = match.end() - 1
    marked: Marked = concat([Marked(), *pieces, text[at:]])
    return marked if marked == text else Marked(text)


def _texts_in(value: Any, sort_keys: bool) -> Iterator[Marked]:
    """Yield the texts in a value as JSON has them, one after the other."""
    if isinstance(value, str):
        yield as_marked(value)
    elif isinstance(value, dict):
        for key, item in sorted(value.items()) if sort_keys else value.items():
            yield as_marked(key)
            yield from _texts_in(item, sort_keys)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts_in(item, sort_keys)


@pass_eval_context
def join(context: Any, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    """Join texts."""
    return filters.do_join(context, value, d if hasattr(d, "__html__") else as_marked(d), attribute)


@pass_eval_context
def replace(context: Any, s: Any, old: str, new: str, count: int | None = None) -> str:
    """Replace a text."""
    return filters.do_replace(context, s if isinstance(s, str) else as_marked(s), old, new, count)


@pass_environment
def wordwrap(
    environment: Any,
    s: str,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: Any = None,
    break_on_hyphens: bool = True,
) -> str:
    """Wrap each line of a text."""
    if wrapstring is None or type(wrapstring) is str:
        wrapstring = Marked(environment.newline_sequence if wrapstring is None else wrapstring)
    options: dict[str, Any] = {"break_long_words": break_long_words, "break_on_hyphens": break_on_hyphens}
    options |= {"expand_tabs": False, "replace_whitespace": False}
    lines = [cut(as_marked(line), textwrap.wrap(line, width=width, **options)) for line in s.splitlines()]
    wrapped: str = wrapstring.join([wrapstring.join(line) for line in lines])
    return wrapped


def indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    """Put spaces, or a text, before the lines of a text."""
    kind = Html if hasattr(s, "__html__") else as_marked
    newline, before = kind("\n"), kind(width if isinstance(width, str) else " " * width)
    begin, *lines = (s + newline).splitlines()
    lines = newline.join([begin, *(before + line if line or blank else line for line in lines)])
    return before + lines if first else lines


def urlencode(value: Any) -> str:
    """Quote a text for a URL, or write a mapping as a query."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return follow(as_marked(value), filters.do_urlencode)
    return filters.do_urlencode(value)


def _text(value: Any) -> str:
    """Return the text of a value; HTML remains that."""
    return value if hasattr(value, "__html__") else as_marked(value)


def _escaped(text: str) -> str:
    return str(filters.escape(text))


FILTERS: Mapping[str, Callable[..., Any]] = {
    "e": Html.escape,
    "escape": Html.escape,
    "forceescape": lambda value: Html.escape(as_marked(value)),
    "format": lambda value, *args, **kwargs: filters.do_format(_text(value), *args, **kwargs),
    "indent": indent,
    "join": join,
    "replace": replace,
    "safe": Html,
    "string": _text,
    "title": lambda s: follow(as_marked(s), filters.do_title),
    "tojson": to_json,
    "urlencode": urlencode,
    "wordwrap": wordwrap,
}
