"""What callers from Python may pass: numpy's numbers as well as Python's, and one error for everything else.

A command line's words have their types before they get here; a program's values may be anything.
"""

import functools
import numbers
import operator
import os
import reprlib
import types
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from llamalet.errors import ConfigError, UsageError

KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def shown(value: object) -> str:
    """Return a value as messages show it: short, and on one line."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # a whole number with more digits than Python prints
        return f"a {type(value).__name__} of thousands of digits"


def checked(name: str, value: Any, kind: Any) -> Any:
    """Return a value as a bool, int, float or str.

    Args:
        name: what messages call it.
        value: any value. Numbers may be numpy's. A bool is no number, and bytes are no text.
        kind: one of KINDS.

    Raises:
        ConfigError: if it is no such thing.
    """
    is_bool = isinstance(value, bool | np.bool_)
    try:
        if kind is int and not is_bool:
            return operator.index(value)
        if kind is float and not is_bool and isinstance(value, numbers.Real):
            return float(value)
    except (TypeError, OverflowError):
        pass
    if kind is bool and is_bool or kind is str and isinstance(value, str):
        return kind(value)
    raise ConfigError(f"{name}={shown(value)}: must be {KINDS[kind]}")


def choice(name: str, value: object, choices: Collection[str]) -> str:
    """Return one of a few words.

    Raises:
        ConfigError: if the value is not one of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name}={shown(value)}: must be one of {', '.join(choices)}")
    return value


def file_path(name: str, value: object) -> Path:
    """Return the path of a file or folder, which need not exist.

    Raises:
        UsageError: if it is no path, empty, has a null character, which no name can have, or cannot be looked up.
    """
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str):
        raise UsageError(f"{name}={shown(value)}: must be a path, as text or as a Path")
    if not found or "\0" in found:
        raise UsageError(f"{name}={shown(value)}: names no file or folder")
    try:
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, UnicodeEncodeError) as error:
        raise UsageError(f"{shown(found)}: {getattr(error, 'strerror', None) or error}") from None
    return Path(found)


def elements(name: str, value: Any) -> list[Any]:
    """Return the elements of a list, an array or an iterator.

    Raises:
        UsageError: if it is none. A text is none, although Python would take it for a list of characters, and neither
            is a set, which has no order.
    """
    try:
        if not isinstance(value, str | bytes | bytearray | set | frozenset | dict):
            return list(value)
    except TypeError:
        pass
    raise UsageError(f"{name}={shown(value)}: must be a list")


def token_ids(tokens: Any, vocab_size: int) -> NDArray[np.int64]:
    """Return tokens (T,) as an array.

    Args:
        tokens: a list, an array or an iterator of whole numbers of any type.
        vocab_size: every id is below it.

    Raises:
        UsageError: if there are none, they are not whole numbers, or one is not in the vocabulary.
    """
    tokens = tokens if isinstance(tokens, np.ndarray) and tokens.ndim else elements("tokens", tokens)
    try:
        ids = np.asarray(tokens)
    except (ValueError, TypeError, OverflowError, RuntimeError):  # rows of different lengths, a tensor with a gradient
        raise UsageError("tokens: the model needs a list of whole numbers") from None
    if ids.ndim != 1 or not len(ids):
        raise UsageError(f"tokens of shape {ids.shape}: the model needs a list of at least one")
    if ids.dtype.kind not in "iu":  # a list of several types, which numpy makes floats; or times
        ids = np.array([_token(token, vocab_size) for token in tokens], object)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise UsageError(f"token {outside[0]}: the model's vocabulary has the ids 0 to {vocab_size - 1}")
    return ids.astype(np.int64, copy=False)


def typed_fields(config: Any) -> None:
    """Give the fields of a frozen dataclass the types that they declare: numpy's numbers become Python's.

    Raises:
        ConfigError: listing every value of another type.
    """
    problems = []
    for name, kinds in _field_kinds(type(config)).items():  # type: ignore[arg-type]
        value = getattr(config, name)
        if not any(value is kind for kind in kinds):
            try:
                object.__setattr__(config, name, checked(name, value, kinds[0]))
            except ConfigError as error:
                problems.append(str(error))
    ConfigError.raise_for(problems)


def not_positive(config: object, *names: str) -> list[str]:
    """Return a problem for each of the named fields that is not above 0; None is allowed."""
    values = {name: getattr(config, name) for name in names}
    return [f"{name}={n}: must be positive" for name, n in values.items() if n is not None and not n > 0]


@functools.cache
def _field_kinds(config_class: type) -> dict[str, tuple[Any, ...]]:
    """Return the type of each field that has one of KINDS, followed by None if the field may be None."""
    hints, found = get_type_hints(config_class), {}
    for field in fields(config_class):
        hint = hints[field.name]
        several = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        kinds = [str if get_origin(kind) is Literal else kind for kind in several if kind is not types.NoneType]
        if kinds[0] in KINDS:
            found[field.name] = (kinds[0], None) if types.NoneType in several else (kinds[0],)
    return found


def _token(token: object, vocab_size: int) -> int:
    """Return a token as an int."""
    try:
        return checked("token", token, int)
    except ConfigError:
        raise UsageError(
            f"token {shown(token)}: the model's ids are whole numbers from 0 to {vocab_size - 1}"
        ) from None
