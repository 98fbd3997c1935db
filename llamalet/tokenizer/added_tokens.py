"""Tokens that are found in a text by name, before anything is merged, as the files beside a tokenizer list them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamalet.errors import TokenizerError

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
    try:
        by_id = {int(id): token for id, token in tokens}
    except (ValueError, TypeError):
        raise TokenizerError(f"{path}: the added tokens' ids must be numbers") from None
    return [by_id[id] for id in sorted(by_id)]


def token_of(path: Path, key: str, value: Any) -> Token:
    """Return a token that is written as text, or as an object with its content and its flags."""
    name = value.get("content") if isinstance(value, dict) else value
    if not isinstance(name, str) or not name:
        raise TokenizerError(f"{path}: {key} is {value!r}: must be a token, as text or as an object with a content")
    flags = {flag: bool(value[flag]) for flag in FLAGS if flag in value} if isinstance(value, dict) else {}
    return flags | {"content": name}
