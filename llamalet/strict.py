"""JSON and TOML read strictly: anyone may have written the file, and by hand.

`read_json`, `parse_json` and `read_toml` refuse what Python's readers let through or stumble over: files of any size,
values nested thousands deep, numbers of thousands of digits, NaN, a key with two values, half a surrogate pair.
`build` then makes a dataclass or a NamedTuple of an object: the annotations say what each field must be.
"""

import codecs
import collections.abc
import dataclasses
import functools
import json
import math
import sys
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llamalet import checks
from llamalet.checks import shown
from llamalet.errors import LlamaletError
from llamalet.files import MAX_NAME, open_file

Record = TypeVar("Record")

MAX_BYTES = 1 << 24  # hundreds of times what such files have; parsed, 16 MB can take 400 MB
MAX_DEPTH = 64
MAX_DIGITS = 1000
MAX_WHOLE = 2**63 - 1
MAX_SHOWN = 5  # problems in a message

KINDS = checks.KINDS | {int: "a whole number from 0 up"}


def read_json(path: Path, error: type[LlamaletError], missing: str = "no such file") -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file.
        error: what to raise.
        missing: what to say if there is no such file.

    Raises:
        error: if it is missing, not a JSON object, or beyond the limits above.
    """
    fields = parse_json(read_bytes(path, error, missing), str(path), error)
    if not isinstance(fields, dict):
        raise error(f"{path}: must hold a JSON object, not {shown(fields)}")
    return fields


def parse_json(data: bytes, name: str, error: type[LlamaletError]) -> Any:
    """Return the value in JSON.

    Args:
        data: JSON, perhaps behind a byte order mark.
        name: where it is from, for the message.
        error: what to raise.

    Raises:
        error: if it is not JSON or beyond the limits above.
    """
    try:
        found = json.loads(data, object_pairs_hook=_object, parse_int=_whole_number)
    except (ValueError, RecursionError) as problem:
        raise error(f"{name}: not valid JSON: {_in_short(problem)}") from None
    _check_values(found, name, error)
    return found


def read_toml(path: Path, error: type[LlamaletError]) -> dict[str, Any]:
    """Return the table in a TOML file.

    Raises:
        error: if it is missing, not TOML, or beyond the limits above.
    """
    data = read_bytes(path, error, "no such config file")
    try:
        found = tomllib.loads(data.removeprefix(codecs.BOM_UTF8).decode())
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid TOML: {_in_short(problem)}") from None
    _check_values(found, str(path), error)
    return found


def read_bytes(path: Path, error: type[LlamaletError], missing: str, most: int = MAX_BYTES) -> bytes:
    """Return a file's content.

    Args:
        path: the file.
        error: what to raise.
        missing: what to say if there is no such file.
        most: the largest number of bytes that is read.

    Raises:
        error: if it is missing, larger, or no file; a pipe would be waited for.
    """
    try:
        with open_file(path) as file:
            data = file.read(most + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{path}: {missing}") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    if len(data) > most:
        raise error(f"{path}: has more than {most >> 20} MB: too large to be such a file")
    return data


def is_file_name(text: object) -> bool:
    """Return whether something can be the name of a file in a folder; others make the system's calls fail."""
    if not isinstance(text, str) or text in ("", "..") or "\0" in text:
        return False
    return Path(text).name == text and len(text.encode()) <= MAX_NAME


def build(
    kind: type[Record], fields: object, name: str, error: type[LlamaletError], *, ignore_unknown: bool = False
) -> Record:
    """Return a dataclass or NamedTuple with these fields.

    Whole numbers are counts, sizes and ids, so they are never negative; numbers are finite. Nothing is converted, but
    a whole number will do where any number would.

    Args:
        kind: its annotations may be int, float, bool, str, Any, Literal, a list, tuple or mapping of these, another
            such class, several such classes with different fields, and any of them or None.
        fields: an object from JSON or TOML.
        name: where it is from, for the message.
        error: what to raise.
        ignore_unknown: whether fields that the class lacks are ignored; inside other objects they never are.

    Raises:
        error: naming every field that is missing, unknown, of another type or out of range.
    """
    checker = _Checker()
    built = checker.record(kind, fields, "", ignore_unknown)
    if checker.problems:
        rest = f"; and {len(checker.problems) - MAX_SHOWN} more" if len(checker.problems) > MAX_SHOWN else ""
        raise error(f"{name}: {'; '.join(checker.problems[:MAX_SHOWN])}{rest}")
    return built


class _Checker:
    """Checks values against annotations and collects the problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def record(self, kind: type[Any], fields: object, name: str, ignore_unknown: bool = False) -> Any:
        """Return a dataclass or NamedTuple; None if there are problems."""
        if not isinstance(fields, dict):
            return self._refuse(name or "it", fields, "an object")
        before, prefix = len(self.problems), f"{name}." if name else ""
        hints, required = _fields_of(kind)  # type: ignore[arg-type]
        self.problems += [f"{prefix}{key} is missing" for key in required if key not in fields]
        if not ignore_unknown:
            self.problems += [f"{prefix}{key:.40} is unknown" for key in fields if key not in hints]
        values = {key: self.value(fields[key], hint, f"{prefix}{key}") for key, hint in hints.items() if key in fields}
        if len(self.problems) > before:
            return None
        try:
            return kind(**values)
        except LlamaletError as problem:  # a value that the class itself refuses
            self.problems.append(f"{name}: {problem}" if name else str(problem))

    def value(self, value: Any, hint: Any, name: str) -> Any:
        """Return a value that has the annotated type."""
        origin, parts = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            if value is None and types.NoneType in parts:
                return None
            hints = [part for part in parts if part is not types.NoneType]
            if len(hints) > 1:  # classes that differ in their fields
                keys = value.keys() if isinstance(value, dict) else None
                hints = [hint for hint in hints if _fields_of(hint)[0].keys() == keys]
            if not hints:
                return self._refuse(name, value, "an object of a known kind")
            return self.value(value, hints[0], name)
        if origin is Literal:
            return value if value in parts else self._refuse(name, value, f"one of {', '.join(parts)}")
        if origin in (list, tuple):
            if not isinstance(value, list):
                return self._refuse(name, value, "a list")
            return origin(self.value(item, parts[0], f"{name}[{i}]") for i, item in enumerate(value))
        if origin in (dict, collections.abc.Mapping):
            if not isinstance(value, dict):
                return self._refuse(name, value, "an object")
            return {key: self.value(item, parts[1], f"{name}.{key:.40}") for key, item in value.items()}
        if hint is Any:
            return value
        if hint not in KINDS:
            return self.record(hint, value, name)
        kinds = int | float if hint is float else hint
        if not isinstance(value, kinds) or isinstance(value, bool) is not (hint is bool):
            return self._refuse(name, value, KINDS[hint])
        low, high = (0, MAX_WHOLE) if hint is int else (-sys.float_info.max, sys.float_info.max)
        if hint in (int, float) and not low <= value <= high:
            return self._refuse(name, value, KINDS[hint])
        return float(value) if hint is float else value

    def _refuse(self, name: str, value: object, wanted: str) -> None:
        """Note that a field must hold something else."""
        self.problems.append(f"{name}={shown(value)}: must be {wanted}")


@functools.cache
def _fields_of(kind: type[Any]) -> tuple[Mapping[str, Any], Sequence[str]]:
    """Return the annotations of a dataclass or NamedTuple, and the names of the fields that have no default."""
    hints = get_type_hints(kind)
    if not dataclasses.is_dataclass(kind):
        return hints, [name for name in hints if name not in kind._field_defaults]
    fields = dataclasses.fields(kind)
    missing = dataclasses.MISSING
    return (
        {field.name: hints[field.name] for field in fields},
        [field.name for field in fields if field.default is missing and field.default_factory is missing],
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; a key may be repeated with the same value."""
    table = dict(pairs)
    if len(table) < len(pairs):
        for key, value in pairs:
            if table[key] != value:
                raise ValueError(f"{shown(key)} is there twice, with different values")
    return table


def _whole_number(text: str) -> int:
    """Return an integer of JSON."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{text[:20]}... is a number of {len(text)} digits")
    return int(text)


def _check_values(value: Any, name: str, error: type[LlamaletError], depth: int = 0) -> None:
    """Raise an error if values are nested too deep, a text is not valid Unicode, or a number not finite or too long."""
    if depth > MAX_DEPTH:
        raise error(f"{name:.200}: is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        _check_text(value, name, error)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, name, error)
            _check_values(item, f"{name}: {key}" if depth == 0 else f"{name}.{key}", error, depth + 1)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_values(item, f"{name}[{number}]", error, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise error(f"{name}={value}: must be a finite number")
    elif isinstance(value, int) and value.bit_length() > 4 * MAX_DIGITS:  # hexadecimal, in TOML
        raise error(f"{name} is a number of {value.bit_length()} bits")


def _check_text(text: str, name: str, error: type[LlamaletError]) -> None:
    """Raise an error if a text holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise error(f"{name}: {text[:40]!a} holds half of a surrogate pair, which is no character") from None


def _in_short(problem: BaseException) -> str:
    """Return what is wrong, in short."""
    if isinstance(problem, RecursionError):
        return f"it is nested more than {MAX_DEPTH} deep"
    return f"{problem!s:.200}"
