"""Tokens that are found in a text by name, before anything is merged, as the files beside a tokenizer list them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamalet.checks import shown
from llamalet.errors import TokenizerError
from llamalet.tokenizer.ids_file import is_id
from llamalet.tokenizer.rows import MAX_VOCAB

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# Its content, and those of the FLAGS that a file gives.
Token = dict[str, Any]


def flags_of(token: Token) -> dict[str, bool]:
    """Return how an added token is found in a text; by default, text that is normalized too."""
    special = bool(token.get("special", False))
    found = {flag: bool(token.get(flag, False)) for flag in FLAGS}
    return found | {"special": special, "normalized": bool(token.get("normalized", not special))}


def as_special(token: Token) -> Token:
    """Return a token as transformers adds it for its role: by default, it is found in a text before normalizing."""
    return {"normalized": False} | token | {"special": True}


def in_order(path: Path, tokens: Iterable[tuple[Any, Token]]) -> list[Token]:
    """Return tokens in the order of their ids, which may be written as text; of two with one id the last."""
    by_id = {_number(path, id): token for id, token in tokens}
    return [by_id[id] for id in sorted(by_id)]


def _number(path: Path, id: Any) -> int:
    """Return a token's id, which may be written as text."""
    is_text = isinstance(id, str) and id.isascii() and id.isdecimal() and len(id) <= len(str(MAX_VOCAB))
    found = int(id) if is_text else id
    if not is_id(found):
        raise TokenizerError(
            f"{path}: an added token has the id {shown(id)}: must be a whole number from 0 to {MAX_VOCAB - 1}"
        )
    return int(found)


def token_of(path: Path, key: str, value: Any) -> Token:
    """Return a token that is written as text, or as an object with its content and its flags."""
    name = value.get("content") if isinstance(value, dict) else value
    if not isinstance(name, str) or not name:
        raise TokenizerError(f"{path}: {key} is {value!r}: must be a token, as text or as an object with a content")
    flags = {flag: bool(value[flag]) for flag in FLAGS if flag in value} if isinstance(value, dict) else {}
    return flags | {"content": name}
