"""The file in which this project says what begins and ends texts, where the tokenizer's file alone says something else.

It is a generation_config.json, as [NAME.]generation_config.json beside [NAME.]tokenizer.SUFFIX, with two fields of its
own: prefix_token_ids, what begins every text, and tokenizer_eos_id, which of the ids is called EOS.
"""

import json
from pathlib import Path
from typing import Any

from llamalet import strict
from llamalet.errors import TokenizerError
from llamalet.hf_names import GENERATION_CONFIG_JSON
from llamalet.tokenizer.base import SpecialIds
from llamalet.tokenizer.rows import MAX_VOCAB

PREFIX_KEY, EOS_KEY = "prefix_token_ids", "tokenizer_eos_id"


def ids_path(tokenizer_path: Path) -> Path:
    """Return where the ids that begin and end texts stand beside a tokenizer, [NAME.]tokenizer.SUFFIX as a rule."""
    before, found, _ = tokenizer_path.name.rpartition("tokenizer.")
    before = before if found else f"{tokenizer_path.stem}."
    return tokenizer_path.with_name(before + GENERATION_CONFIG_JSON)


def ids_json(ids: SpecialIds) -> bytes:
    """Return a generation_config.json that says these ids."""
    fields = {"bos_token_id": ids.bos, "eos_token_id": ids.ordered_stops}
    return (json.dumps(fields | {PREFIX_KEY: list(ids.prefix), EOS_KEY: ids.eos}, indent=2) + "\n").encode()


def own_ids(path: Path) -> SpecialIds | None:
    """Return the ids in a generation_config.json that this project wrote; None if it is missing, or another's.

    Raises:
        TokenizerError: if it is damaged.
    """
    return parse_ids(path.read_bytes(), str(path)) if path.is_file() else None


def parse_ids(data: bytes, name: str) -> SpecialIds | None:
    """Return the ids in the bytes of such a file; None if it is another's.

    Raises:
        TokenizerError: if they are damaged.
    """
    fields = strict.parse_json(data, name, TokenizerError)
    return ids_in(fields, name) if isinstance(fields, dict) else None


def ids_in(fields: dict[str, Any], name: str) -> SpecialIds | None:
    """Return the ids in the fields of such a file; None if it is another's.

    Raises:
        TokenizerError: if they are no ids.
    """
    if PREFIX_KEY not in fields:
        return None
    prefix, stops = fields[PREFIX_KEY], fields.get("eos_token_id")
    bos, eos = fields.get("bos_token_id"), fields.get(EOS_KEY)
    lists = [prefix, stops]
    numbers = [id for ids in lists if isinstance(ids, list) for id in ids] + [id for id in (bos, eos) if id is not None]
    if not all(isinstance(ids, list) for ids in lists) or not all(is_id(id) for id in numbers):
        raise TokenizerError(f"{name}: bos_token_id, eos_token_id and {PREFIX_KEY} must be ids and lists of ids")
    return SpecialIds(bos=bos, eos=eos, prefix=tuple(prefix), stops=frozenset(stops or ()))


def is_id(value: object) -> bool:
    """Return whether a value can be a token's id."""
    return type(value) is int and 0 <= value < MAX_VOCAB
