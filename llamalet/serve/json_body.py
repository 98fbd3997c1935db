"""The body of a request, which anyone may have written: JSON read strictly, and its fields checked one by one.

Python's reader takes NaN, numbers beyond float64, half a surrogate pair and a key with two values; here the client gets
an error that names the field.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from llamalet.checks import shown
from llamalet.serve.api_error import ApiError

MAX_DIGITS = 400  # of a whole number, after Python's reader has met one of thousands
HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
MAX_UNKNOWN, MAX_NAME_CHARS = 20, 40  # unknown fields that are reported, and how much of their names


class Fields:
    """The fields of a JSON object, each taken out and checked. A field that is null counts as missing.

    All methods raise an ApiError of status 400 that names the field if its value is not of the kind asked for. Nothing
    is converted, but a whole number will do where any number would.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self._left = dict(fields)

    @classmethod
    def read(cls, body: bytes) -> "Fields":
        """Return the fields of a body.

        Raises:
            ApiError: 400, if it is no JSON object.
        """
        return cls(read_object(body))

    def take(self, name: str) -> Any:
        """Return a field as it is; None if it is missing."""
        return self._left.pop(name, None)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a field that is true or false."""
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        refuse(name, value, "true or false")

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return a number between two others."""
        value = self.take(name)
        if value is None:
            return default
        if not is_number(value) or not low <= value <= high:
            refuse(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, low: int = 0, high: int | None = None) -> int | None:
        """Return a whole number from `low` to `high`; None if it is missing."""
        value = self.take(name)
        if value is None or type(value) is int and low <= value and (high is None or value <= high):
            return value
        refuse(name, value, f"a whole number from {low} {'up' if high is None else f'to {high}'}")

    def text(self, name: str, most: int | None = None) -> str | None:
        """Return a text of at most `most` characters; None if it is missing."""
        value = self.take(name)
        if value is None or isinstance(value, str) and (most is None or len(value) <= most):
            return value
        refuse(name, value, "a text" if most is None else f"a text of at most {most} characters")

    def only(self, name: str, neutral: Iterable[Any], reason: str = "is not supported") -> None:
        """Refuse a field that would change the answer, unless its value is one that changes nothing."""
        value = self.take(name)
        if value is not None and not any(value == other and is_bool(value) == is_bool(other) for other in neutral):
            raise ApiError(400, f"{name}={shown(value)}: {reason}", param=name, code="unsupported_parameter")

    @property
    def left(self) -> list[str]:
        """The names of the fields that nobody took, in ASCII and short, so that a log can show them."""
        return [ascii(name[:MAX_NAME_CHARS])[1:-1] for name in list(self._left)[:MAX_UNKNOWN]]


def refuse(name: str, value: object, wanted: str) -> NoReturn:
    """Raise an ApiError of status 400: a field must be something else."""
    what = f"{name}: is missing: must be" if value is None else f"{name}={shown(value)}: must be"
    raise ApiError(400, f"{what} {wanted}", param=top_of(name))


def top_of(name: str) -> str:
    """Return the field of the request that a name like messages[0].content is in."""
    return re.split(r"[.\[]", name, maxsplit=1)[0]


def is_bool(value: object) -> bool:
    """Return whether a value is true or false, which Python takes for 1 and 0."""
    return isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not is_bool(value) and abs(value) <= sys.float_info.max


def read_object(body: bytes) -> dict[str, Any]:
    """Return the object in a body.

    Raises:
        ApiError: 400, if it is not an object in JSON and UTF-8; if it is nested too deep for Python, or has a number
            that is not finite or has thousands of digits, half of a surrogate pair, or a key twice.
    """
    odd: list[str] = []
    twice: list[str] = []

    def number(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):
            odd.append(word)
        return value

    def whole(word: str) -> float:
        return int(word) if len(word) <= MAX_DIGITS else number(word)

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.extend(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        return found

    options: dict[str, Any] = {"object_pairs_hook": fields, "parse_float": number, "parse_constant": number}
    try:
        text = body.decode()
        try:
            found = json.loads(text, **options)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a whole number of thousands of digits: it is named below
            found = json.loads(text, parse_int=whole, **options)
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error!s:.200}") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shown(found)}")
    if twice:
        raise ApiError(400, f"{shown(twice[0])}: is there twice", param=ascii(twice[0][:MAX_NAME_CHARS])[1:-1])
    if odd:
        _refuse_first(found, lambda value: isinstance(value, float) and not is_number(value), "a finite number")
    if HALF_OF_A_PAIR.search(text):
        _refuse_first(found, _has_half, "valid Unicode, without half of a surrogate pair")
    return found


def _refuse_first(found: dict[str, Any], is_bad: Callable[[object], bool], wanted: str) -> None:
    """Refuse an object with a bad value anywhere in it, naming the first one."""
    levels = [_parts("", found)]
    while levels:
        name, value = next(levels[-1], (None, None))
        if name is None:
            levels.pop()
        elif is_bad(value):
            refuse(name, value, wanted)
        elif isinstance(value, dict | list):
            levels.append(_parts(name, value))


def _parts(name: str, value: dict[str, Any] | list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of what is in an object or a list; of an object also the keys, which are texts."""
    if isinstance(value, list):
        yield from ((f"{name}[{number}]", item) for number, item in enumerate(value))
        return
    for key, item in value.items():
        inner = ascii(key[:MAX_NAME_CHARS])[1:-1]
        yield (f"{name}.{inner}" if name else inner), key
        yield (f"{name}.{inner}" if name else inner), item


def _has_half(value: object) -> bool:
    """Return whether a text has half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False
