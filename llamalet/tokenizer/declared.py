"""What the files beside a tokenizer say of it.

A tokenizer.json does not say which of its tokens are BOS and EOS, nor at which tokens a model stops, and it may lack
tokens that were added later. In a Hugging Face folder other files do, and they are read as transformers reads them:

    tokenizer_config.json    bos_token and eos_token, the tokenizer's class, added tokens
    special_tokens_map.json  the same special tokens; counts only if the first file lists no added tokens
    added_tokens.json        added tokens; counts likewise
    generation_config.json   eos_token_id: where a text ends, a number or a list; else config.json's

The post-processor of tokenizer.json alone decides what begins every text; `add_bos_token` counts only without a
tokenizer.json. This project writes a generation_config.json too, as [NAME.]generation_config.json beside
[NAME.]tokenizer.SUFFIX, where the tokenizer's file alone would say something else. It has two fields of its own:
prefix_token_ids, what begins every text, and tokenizer_eos_id, which of the ids is called EOS.

Source: transformers 5.23, tokenization_utils_base.py (_from_pretrained), tokenization_utils_tokenizers.py,
models/auto/tokenization_auto.py, models/llama/tokenization_llama.py.
"""

import dataclasses
import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llamalet import strict
from llamalet.errors import TokenizerError, UsageError
from llamalet.tokenizer.base import SpecialIds, Tokenizer
from llamalet.tokenizer.huggingface import piece_decoder, prefix_of, refusals
from llamalet.tokenizer.llama2 import SPACE_MARK
from llamalet.tokenizer.rows import MAX_VOCAB

JSON, MODEL = "tokenizer.json", "tokenizer.model"
CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MODEL_CONFIG, GENERATION = "config.json", "generation_config.json"
PREFIX_KEY, EOS_KEY = "prefix_token_ids", "tokenizer_eos_id"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# The class that ignores how a tokenizer.json splits texts, and its own special tokens.
LLAMA_CLASS = "LlamaTokenizer"
BYTE_LEVEL = b'"ByteLevel"'
# Those that take a tokenizer.json as it is, and the one above.
PLAIN_CLASSES = ("", "PreTrainedTokenizer", "TokenizersBackend", LLAMA_CLASS)
LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def ids_path(tokenizer_path: Path) -> Path:
    """Return where the ids that begin and end texts stand beside a tokenizer, [NAME.]tokenizer.SUFFIX as a rule."""
    before, found, _ = tokenizer_path.name.rpartition("tokenizer.")
    before = before if found else f"{tokenizer_path.stem}."
    return tokenizer_path.with_name(before + GENERATION)


def ids_json(ids: SpecialIds) -> bytes:
    """Return a generation_config.json that says these ids."""
    fields = {"bos_token_id": ids.bos, "eos_token_id": ids.ordered_stops}
    return (json.dumps(fields | {PREFIX_KEY: list(ids.prefix), EOS_KEY: ids.eos}, indent=2) + "\n").encode()


def ids_beside(path: Path, found: Tokenizer, data: bytes) -> SpecialIds:
    """Return the ids that begin and end texts, as the files beside a tokenizer say.

    Args:
        path: the tokenizer's file.
        found: what it holds, with the tokens that `completed` adds.
        data: its bytes.

    Raises:
        TokenizerError: if one of the files is damaged.
    """
    folder, beside = path.parent, ids_path(path)
    if (own := own_ids(beside)) is not None:
        return own
    others = (CONFIG, SPECIAL_MAP, MODEL_CONFIG, GENERATION)
    if path.name not in (JSON, MODEL) or not any((folder / name).is_file() for name in others):
        ids, ends = ids_alone(found, data, str(path)), _stops(beside)
        return dataclasses.replace(ids, stops=frozenset(ends)) if ends else ids
    names = _Declared(folder).special
    alone = {"bos_token": found.file_ids.bos, "eos_token": found.file_ids.eos} if path.name == MODEL else {}
    bos, eos = (found.id_of(names[role]) if role in names else alone.get(role) for role in ("bos_token", "eos_token"))
    if (folder / JSON).is_file():
        fields = _object(data, path) if path.name == JSON else _tokenizer_json(folder)
        prefix = _prefix(fields, folder / JSON)
    else:
        prefix = (bos,) if bos is not None and _read(folder / CONFIG).get("add_bos_token") is True else ()
    if bos is None and prefix:
        bos = prefix[0]
    stops = stops_in(folder) or (() if eos is None else (eos,)) or found.ids.stops
    return SpecialIds(bos=bos, eos=eos, prefix=prefix, stops=frozenset(stops))


def ids_alone(found: Tokenizer, data: bytes, name: str) -> SpecialIds:
    """Return the ids of a tokenizer whose file is all there is: the post-processor of a tokenizer.json is asked.

    Args:
        found: what the file holds.
        data: the file's bytes.
        name: its name, for messages.

    Raises:
        TokenizerError: if the post-processor is damaged.
    """
    found = found.with_ids(found.file_ids)
    if found.suffix != "json":
        return found.ids
    prefix = _prefix(_object(data, name), name)
    bos = prefix[0] if prefix else None
    stops = found.ids.stops if bos == found.ids.bos else found.ids.stops - {found.ids.bos} | {found.ids.eos}
    return SpecialIds(bos=bos, eos=found.ids.eos, prefix=prefix, stops=frozenset(id for id in stops if id is not None))


def stops_in(folder: Path) -> tuple[int, ...]:
    """Return the ids at which a Hugging Face model stops; empty if it does not say.

    Raises:
        TokenizerError: if a file is damaged, or says something else than ids.
    """
    return _stops(folder / GENERATION) or _stops(folder / MODEL_CONFIG)


def _stops(path: Path) -> tuple[int, ...]:
    """Return the ids at which a model stops, as one file says; empty if it does not say, or is missing."""
    found = _read(path).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(id) is int for id in ids):
        raise TokenizerError(f"{path}: eos_token_id is {reprlib.repr(found)}: must be a token's id or a list of them")
    return tuple(id for id in ids if _is_id(id))  # -1 and the like are no token's, so no text ends there


def _is_id(value: object) -> bool:
    """Return whether a value can be a token's id."""
    return type(value) is int and 0 <= value < MAX_VOCAB


def names(folder: Path) -> set[str]:
    """Return the names of all tokens that transformers would add to the tokenizer in a folder, or finds in it.

    Raises:
        TokenizerError: if one of the files is damaged.
    """
    found = _Declared(folder)
    return {*found.special.values(), *found.extra, *(token["content"] for token in found.added)}


def other_class(folder: Path) -> str | None:
    """Return the tokenizer's class, if it is one that makes its own of a tokenizer.json in transformers 5."""
    named = _Declared(folder).tokenizer_class
    return None if named.removesuffix("Fast") in PLAIN_CLASSES else named


def completed(data: bytes, folder: Path) -> bytes:
    """Return a tokenizer.json with all tokens that transformers would add to it, and split as its class splits texts.

    Args:
        data: the file's bytes; the same object is returned if nothing is to be added.
        folder: where the files beside it are.

    Raises:
        TokenizerError: if one of the files is damaged.
        UsageError: if the tokenizers package is not installed.
    """
    declared = _Declared(folder)
    fields = _object(data, folder / JSON)
    listed = fields.get("added_tokens") or []
    if not isinstance(listed, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in listed
    ):
        raise TokenizerError(f"{folder / JSON}: added_tokens is not a list of tokens")
    known = {token["content"]: _flags(token) for token in listed}
    special = dict.fromkeys([*declared.special.values(), *declared.extra])
    missing = [token for token in declared.added if known.get(token["content"]) != _flags(token)]
    missing += [
        {"content": name, "special": True, "normalized": False}
        for name in special
        if name not in known and name not in {token["content"] for token in missing}
    ]
    if not missing and not declared.is_llama:
        return data
    try:
        import tokenizers
    except ImportError:
        raise UsageError(f"{folder}: a tokenizer.json needs the tokenizers package: pip install tokenizers") from None
    with refusals(str(folder / JSON)):
        if declared.is_llama:
            fields = _as_llama(fields, declared)
        library = tokenizers.Tokenizer.from_str(json.dumps(fields))
        for token in missing:
            added = tokenizers.AddedToken(**token)
            (library.add_special_tokens if token["special"] else library.add_tokens)([added])
        text: str = library.to_str()
    return text.encode()


def template_variables(folder: Path) -> dict[str, str] | None:
    """Return the special tokens that transformers gives to a chat template; None if no file beside it names any.

    Raises:
        TokenizerError: if one of the files is damaged.
    """
    is_said = any((folder / name).is_file() for name in (CONFIG, SPECIAL_MAP))
    return _Declared(folder).special if is_said else None


def chat_spaces(folder: Path) -> str | None:
    """Return which texts of a chat begin with a space: always, first or never, as a prepend_scheme; None: not said.

    Raises:
        TokenizerError: if one of the files is damaged.
    """
    declared = _Declared(folder)
    if declared.is_llama:
        return declared.prepend_scheme
    if not (folder / JSON).is_file():
        return "never" if (folder / CONFIG).is_file() else None
    steps = json.dumps([_tokenizer_json(folder).get(key) for key in ("normalizer", "pre_tokenizer")])
    found = re.search(r'"prepend_scheme": "(\w+)"', steps)
    return found[1] if found else "always" if '"Prepend"' in steps else "never"


def _as_llama(fields: Mapping[str, Any], declared: "_Declared") -> dict[str, Any]:
    """Return a tokenizer.json's fields as the class LlamaTokenizer changes them."""
    scheme = declared.prepend_scheme
    model = {"type": "BPE", "fuse_unk": True, "byte_fallback": True}
    return dict(fields) | {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": scheme, "split": False},
        "decoder": piece_decoder(strips=scheme != "never"),
        "model": model | {key: fields["model"][key] for key in ("vocab", "merges")},
    }


class _Declared:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say.

    Attributes:
        config: tokenizer_config.json.
        tokenizer_class: the name of transformers' class.
        is_llama: whether this is LlamaTokenizer, which transformers does not believe of byte-level vocabularies.
        special: the special tokens by their roles, like bos_token; other keys that end in _token too.
        extra: special tokens without a role.
        added: the added tokens, as tokenizer.json lists them, in the order of their ids.
    """

    def __init__(self, folder: Path) -> None:
        """Read the files of a folder; they may be missing.

        Raises:
            TokenizerError: if one is damaged.
        """
        self.config = _read(folder / CONFIG)
        named = self.config.get("tokenizer_class") or _read(folder / MODEL_CONFIG).get("tokenizer_class") or ""
        self.tokenizer_class = str(named)
        table, source = dict(self.config), folder / CONFIG
        listed = self.config.get("added_tokens_decoder")
        mapped = _read(folder / SPECIAL_MAP) if listed is None else {}
        table |= mapped
        self.is_llama = self.tokenizer_class.removesuffix("Fast") == LLAMA_CLASS and not _is_byte_level(folder)
        self.special: dict[str, str] = dict(LLAMA_TOKENS) if self.is_llama else {}
        others = [key for key, value in table.items() if key.endswith("_token") and isinstance(value, str)]
        for key in dict.fromkeys([*ROLES, *others]):
            if key in table:
                self.special.pop(key, None)
                if table[key] not in (None, ""):
                    self.special[key] = _name(folder / (SPECIAL_MAP if key in mapped else CONFIG), key, table[key])
        extra = table.get("extra_special_tokens") or table.get("additional_special_tokens") or []
        if isinstance(extra, dict):
            self.special |= {str(key): _name(source, str(key), value) for key, value in extra.items()}
            extra = []
        if not isinstance(extra, list):
            raise TokenizerError(f"{source}: extra_special_tokens is {extra!r}: must be a list of tokens")
        self.extra = [_name(source, "extra_special_tokens", value) for value in extra]
        if listed is None:
            names = {*self.special.values(), *self.extra}
            listed = [(id, _added(name, name in names)) for name, id in _read(folder / ADDED).items()]
            self.added = _sorted(folder / ADDED, listed)
        else:
            if not isinstance(listed, dict) or not all(isinstance(token, dict) for token in listed.values()):
                raise TokenizerError(f"{source}: added_tokens_decoder is not an object of tokens by id")
            self.added = []
            for token in _sorted(source, listed.items()):
                flags = {key: bool(token[key]) for key in FLAGS if key in token}
                self.added.append(
                    {"special": False} | flags | {"content": _name(source, "added_tokens_decoder", token)}
                )
        for token in self.added:
            token["special"] = token["special"] or token["content"] in self.special.values()

    @property
    def prepend_scheme(self) -> str:
        """Which texts between special tokens LlamaTokenizer begins with a space: always, first or never."""
        if self.config.get("add_prefix_space") not in (None, True):
            return "never"
        return "always" if self.config.get("legacy", False) else "first"


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    """Return how an added token is found in a text; by default, text that is normalized too."""
    special = bool(token.get("special", False))
    found = {flag: bool(token.get(flag, False)) for flag in FLAGS}
    return found | {"special": special, "normalized": bool(token.get("normalized", not special))}


def _added(name: str, special: bool) -> dict[str, Any]:
    """Return an added token of added_tokens.json, which knows names and ids only."""
    return {"content": name, "special": special, "normalized": not special}


def _is_byte_level(folder: Path) -> bool:
    """Return whether the tokenizer.json of a folder speaks of bytes, in transformers' eyes."""
    return (folder / JSON).is_file() and BYTE_LEVEL in (folder / JSON).read_bytes()


def _sorted(path: Path, tokens: Iterable[tuple[Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return tokens in the order of their ids, which may be written as text."""
    try:
        return [token for _, token in sorted(((int(id), token) for id, token in tokens), key=lambda pair: pair[0])]
    except (ValueError, TypeError):
        raise TokenizerError(f"{path}: the added tokens' ids must be numbers") from None


def _name(path: Path, key: str, value: Any) -> str:
    """Return the name of a token that is written as text or as an object with its content."""
    found = value.get("content") if isinstance(value, dict) else value
    if not isinstance(found, str) or not found:
        raise TokenizerError(f"{path}: {key} is {value!r}: must be a token, as text or as an object with a content")
    return found


def _prefix(fields: Mapping[str, Any], name: Path | str) -> tuple[int, ...]:
    """Return what the post-processor of a tokenizer.json puts before every text."""
    try:
        return prefix_of(fields)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise TokenizerError(f"{name}: its post_processor is damaged: {error!r}") from None


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
    if not isinstance(fields, dict) or PREFIX_KEY not in fields:
        return None
    prefix, stops = fields[PREFIX_KEY], fields.get("eos_token_id")
    bos, eos = fields.get("bos_token_id"), fields.get(EOS_KEY)
    lists = [prefix, stops]
    numbers = [id for ids in lists if isinstance(ids, list) for id in ids] + [id for id in (bos, eos) if id is not None]
    if not all(isinstance(ids, list) for ids in lists) or not all(_is_id(id) for id in numbers):
        raise TokenizerError(f"{name}: bos_token_id, eos_token_id and {PREFIX_KEY} must be ids and lists of ids")
    return SpecialIds(bos=bos, eos=eos, prefix=tuple(prefix), stops=frozenset(stops or ()))


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no file."""
    return strict.read_json(path, TokenizerError) if path.is_file() else {}


def _tokenizer_json(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's tokenizer.json."""
    return _object((folder / JSON).read_bytes(), folder / JSON)


def _object(data: bytes, path: Path | str) -> dict[str, Any]:
    """Return the object in a tokenizer.json, which may be larger than other files and is checked by the library.

    Raises:
        TokenizerError: if they are no JSON object.
    """
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise TokenizerError(f"{path}: must hold a JSON object")
    return fields
