"""What the files beside a tokenizer say of it.

A tokenizer.json does not say which of its tokens are BOS and EOS, nor at which tokens a model stops, and it may lack
tokens that were added later. In a Hugging Face folder other files do, and they are read as transformers reads them:

    tokenizer_config.json    bos_token and eos_token, the tokenizer's class (classes.py), added tokens
    special_tokens_map.json  the same special tokens; counts only if the first file lists no added tokens
    added_tokens.json        added tokens; counts likewise
    generation_config.json   eos_token_id: where a text ends, a number or a list; else config.json's

The post-processor of tokenizer.json decides what begins every text, unless the class does; `add_bos_token` counts only
without a tokenizer.json. What this project wrote itself (ids_file.py) counts over all of them.

Source: transformers 5.23, tokenization_utils_base.py (_from_pretrained), tokenization_utils_tokenizers.py,
models/auto/tokenization_auto.py.
"""

import dataclasses
import functools
import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from llamalet import strict
from llamalet.errors import TokenizerError, UsageError
from llamalet.files import read_file, reading
from llamalet.hf_names import (
    ADDED_TOKENS_JSON,
    CONFIG_JSON,
    GENERATION_CONFIG_JSON,
    SPECIAL_TOKENS_MAP_JSON,
    TOKENIZER_CONFIG_JSON,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
)
from llamalet.tokenizer.added_tokens import Token, as_special, flags_of, in_order, token_of
from llamalet.tokenizer.base import SpecialIds, Tokenizer
from llamalet.tokenizer.classes import CLASSES, REFUSED, TokenizerClass
from llamalet.tokenizer.huggingface import json_object, prefix_of, refusals
from llamalet.tokenizer.ids_file import ids_in, ids_path, is_id

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
SPECIFIC = "model_specific_special_tokens"
BYTE_LEVEL = b'"ByteLevel"'
# Other files (a model, a device) are not read into memory.
MAX_FILE_BYTES = 1 << 26


class Folder:
    """The files beside a tokenizer. Each is read and parsed once, when it is first asked for; any may be missing.

    Whatever reads one raises a TokenizerError if it is damaged.
    """

    def __init__(self, path: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
        """Begin with no file, or with the fields of `known` ones by their names."""
        self.path = path
        self._files = dict(known or {})

    def fields_of(self, name: str) -> dict[str, Any]:
        """Return the object in a small JSON file; an empty one if there is no file."""
        if name not in self._files:
            path = self.path / name
            self._files[name] = strict.read_json(path, TokenizerError) if path.is_file() else {}
        return self._files[name]

    # -- what the files say -------------------------------------------------------------------------------------------

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids at which a Hugging Face model stops; empty if it does not say."""
        return self._stops(GENERATION_CONFIG_JSON) or self._stops(CONFIG_JSON)

    @property
    def all_names(self) -> set[str]:
        """The names of all tokens that transformers would add to the tokenizer, or finds in it."""
        return {token["content"] for token in [*self._special_and_extra, *self._added([])]}

    @property
    def template_variables(self) -> dict[str, str] | None:
        """The special tokens that transformers gives to a chat template; None if no file names any."""
        is_said = any((self.path / name).is_file() for name in (TOKENIZER_CONFIG_JSON, SPECIAL_TOKENS_MAP_JSON))
        said = {**self._config, **self._map, **self._late}.items()
        empty = {role: "" for role, value in said if value == "" and (role in ROLES or _is_unusual(role))}
        return empty | {role: token["content"] for role, token in self._special.items()} if is_said else None

    @property
    def splits_special(self) -> bool:
        """Whether transformers makes plain text of special tokens, in a rendered chat too."""
        return bool(self._config.get("split_special_tokens", False))

    @property
    def chat_spaces(self) -> str | None:
        """Which texts of a chat begin with a space: always, first or never, as a prepend_scheme; None: not said."""
        if self._class is not None:
            steps = self._class.steps(self._config)
        elif self._has_json:
            steps = self.tokenizer_json
        else:
            return "never" if (self.path / TOKENIZER_CONFIG_JSON).is_file() else None
        text = json.dumps([steps.get(key) for key in ("normalizer", "pre_tokenizer")])
        found = re.search(r'"prepend_scheme": "(\w+)"', text)
        return found[1] if found else "always" if '"Prepend"' in text else "never"

    def special_ids(self, path: Path, found: Tokenizer, fields: Mapping[str, Any] | None) -> SpecialIds:
        """Return the ids that begin and end texts.

        Args:
            path: the tokenizer's file, in this folder.
            found: what it holds, with the tokens that `completed` adds.
            fields: its fields, if it is a tokenizer.json.
        """
        beside = ids_path(path)
        if (own := ids_in(self.fields_of(beside.name), str(beside))) is not None:
            return found.with_ids(own, str(beside)).ids
        others = (TOKENIZER_CONFIG_JSON, SPECIAL_TOKENS_MAP_JSON, CONFIG_JSON, GENERATION_CONFIG_JSON)
        if path.name not in (TOKENIZER_JSON, TOKENIZER_MODEL) or not any((self.path / x).is_file() for x in others):
            ids, ends = ids_alone(found, fields, str(path)), self._stops(beside.name)
            return dataclasses.replace(ids, stops=frozenset(ends)) if ends else ids
        alone = {"bos_token": found.file_ids.bos, "eos_token": found.file_ids.eos} if fields is None else {}
        bos, eos = (
            found.id_of(self._special[role]["content"]) if role in self._special else alone.get(role)
            for role in ("bos_token", "eos_token")
        )
        prefix = self._text_prefix(fields, bos)
        if bos is None and prefix:
            bos = prefix[0]
        stops = self.stops or (() if eos is None else (eos,)) or found.ids.stops
        return SpecialIds(bos=bos, eos=eos, prefix=prefix, stops=frozenset(stops))

    def _text_prefix(self, fields: Mapping[str, Any] | None, bos: int | None) -> tuple[int, ...]:
        """Return what begins every text; `fields`: the tokenizer.json that is read, if it is one."""
        begins_with_bos = self._config.get("add_bos_token") is True
        if self._has_json:
            begins = "file" if self._class is None else self._class.begins
            if begins == "file":
                return _prefix_in_json(self.tokenizer_json if fields is None else fields, self.path / TOKENIZER_JSON)
            begins_with_bos = begins == "bos"
        return (bos,) if begins_with_bos and bos is not None else ()

    # -- what transformers makes of a tokenizer.json ------------------------------------------------------------------

    def check(self) -> None:
        """Raise a TokenizerError if a file that speaks of tokens is damaged, or the tokenizer's class not supported."""
        _ = self.all_names
        if self._has_json and self._class_name in REFUSED:
            raise self._refused("makes another tokenizer of the file, and is not supported")

    def completed(self, data: bytes, fields: dict[str, Any], n_rows: int | None = None) -> tuple[bytes, dict[str, Any]]:
        """Return a tokenizer.json with all tokens that transformers would add to it, and with its class's steps.

        Args:
            data: the tokenizer.json.
            fields: what `json_object` makes of it.
            n_rows: the model's vocab_size. Tokens beyond it that only the class names are left out: no text but their
                names would have them.

        Returns:
            The new file and its fields; the same ones if nothing would change.

        Raises:
            TokenizerError: if a file is damaged, or the class is not supported.
            UsageError: if the tokenizers package is not installed.
        """
        self.check()
        name, made = str(self.path / TOKENIZER_JSON), self._class
        tokens = self._tokens_to_add(fields)
        if not tokens and made is None:
            return data, fields
        try:
            import tokenizers
        except ImportError:
            raise UsageError(f"{name}: a tokenizer.json needs the tokenizers package: pip install tokenizers") from None
        with refusals(name):
            library = tokenizers.Tokenizer.from_str(json.dumps(fields if made is None else self._remade(fields, made)))
            for token in tokens:
                add = library.add_special_tokens if token["special"] else library.add_tokens
                add([tokenizers.AddedToken(**token)])
            if made is not None and made.begins == "bos" and (bos := self._special.get("bos_token")):
                name_and_id = (bos["content"], library.token_to_id(bos["content"]))
                library.post_processor = tokenizers.processors.TemplateProcessing(
                    single=[bos["content"], "$A"], special_tokens=[name_and_id]
                )
            text: str = library.to_str()
        new = json_object(text.encode(), name)
        optional = self._named_by_class_only(fields)
        kept = [x for x in new["added_tokens"] if n_rows is None or x["id"] < n_rows or x["content"] not in optional]
        if len(kept) < len(new["added_tokens"]):
            new["added_tokens"] = kept
            text = json.dumps(new, ensure_ascii=False)
        return text.encode(), new

    def _named_by_class_only(self, fields: Mapping[str, Any]) -> set[str]:
        """Return the names that only the class gives, except BOS where it begins every text."""
        made = self._class
        if made is None:
            return set()
        said = {*self._config, *self._map} | ({"bos_token"} if made.begins == "bos" else set())
        listed = {token["content"] for token in self._added(fields.get("added_tokens") or [])}
        named = {token["content"] for role, token in self._special.items() if role in said}
        return {name for role, name in made.special.items() if role not in said} - listed - named

    def _tokens_to_add(self, fields: Mapping[str, Any]) -> list[Token]:
        """Return the tokens that transformers adds to a tokenizer.json, in order: all that it has not, or otherwise.

        A class with a tokenizer of its own begins with none of the file's.
        """
        listed = fields.get("added_tokens") or []
        if not isinstance(listed, list) or not all(
            isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
            for token in listed
        ):
            raise TokenizerError(f"{self.path / TOKENIZER_JSON}: added_tokens is not a list of tokens with ids")
        known = {} if self._class else {token["content"]: flags_of(token) for token in listed}
        changed = self._listed_changes(listed, known)
        return changed + self._missing_special({*known, *(token["content"] for token in changed)}) + self._again()

    def _listed_changes(self, listed: Iterable[Token], known: Mapping[str, dict[str, bool]]) -> list[Token]:
        """Return the tokens that files list and the tokenizer lacks, or has with other flags.

        Args:
            listed: those in tokenizer.json.
            known: name -> flags of those that the tokenizer begins with.
        """
        named = {token["content"] for token in self._special.values()}
        tokens = [token | {"special": token["special"] or token["content"] in named} for token in self._added(listed)]
        return [token for token in tokens if known.get(token["content"]) != flags_of(token)]

    def _missing_special(self, found: Set[str]) -> list[Token]:
        """Return the special tokens that the tokenizer lacks; `found`: the names that it has by then."""
        special = {token["content"]: as_special(token) for token in self._special_and_extra}
        return [token for name, token in special.items() if name not in found]

    def _again(self) -> list[Token]:
        """Return the special tokens that the class adds again: see `adds_again`."""
        kind = "none" if self._class is None else self._class.adds_again
        if kind == "all":
            return [as_special({"content": token["content"]}) for token in self._special_and_extra]
        if kind == "unnamed":
            unnamed = [token for role, token in self._special.items() if role not in self._said_roles]
            return [as_special(token) for token in [*unnamed, *self._extra]]
        return []

    def _remade(self, fields: Mapping[str, Any], made: TokenizerClass) -> dict[str, Any]:
        """Return a tokenizer.json's fields as a class with a tokenizer of its own changes them, with no added token."""
        old = fields.get("model")
        if not isinstance(old, dict) or not isinstance(old.get("vocab"), dict | list):
            raise TokenizerError(f"{self.path / TOKENIZER_JSON}: its model must be an object with a vocab")
        if "merges" not in old:
            raise self._refused(f"needs the merges of a BPE model; the file holds a {old.get('type')} model")
        if not isinstance(old["vocab"], dict):
            raise TokenizerError(f"{self.path / TOKENIZER_JSON}: its model's vocab must be an object of ids by token")
        model = {key: old[key] for key in ("vocab", "merges")}
        if made.has_unknown:
            model["unk_token"] = self._special.get("unk_token", {}).get("content")
            if not {model["unk_token"], "<0x00>"} & model["vocab"].keys():
                raise self._refused("needs its unk_token or <0x00> to <0xFF> in the vocabulary")
        model |= {"type": "BPE", "fuse_unk": made.pieces, "byte_fallback": made.pieces}
        new = dict(fields) | made.steps(self._config) | {"model": model, "added_tokens": []}
        return new if made.begins == "file" else new | {"post_processor": None}

    # -- the files ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def json_bytes(self) -> bytes:
        """The bytes of tokenizer.json; none if there is no file."""
        return file_bytes(self.path / TOKENIZER_JSON) if self._has_json else b""

    @functools.cached_property
    def tokenizer_json(self) -> dict[str, Any]:
        """The fields of tokenizer.json, which must exist."""
        return json_object(self.json_bytes, str(self.path / TOKENIZER_JSON))

    @functools.cached_property
    def _has_json(self) -> bool:
        return (self.path / TOKENIZER_JSON).is_file()

    @property
    def _config(self) -> dict[str, Any]:
        return self.fields_of(TOKENIZER_CONFIG_JSON)

    @property
    def _declaring(self) -> str:
        """The file that names the tokenizer's class."""
        return TOKENIZER_CONFIG_JSON if self._config.get("tokenizer_class") else CONFIG_JSON

    @property
    def _class_name(self) -> str:
        """The name of the tokenizer's class in transformers 5, where names with Fast mean the same; perhaps empty."""
        return str(self.fields_of(self._declaring).get("tokenizer_class") or "").removesuffix("Fast")

    def _refused(self, why: str) -> TokenizerError:
        """Return the error that says why the tokenizer's class does not go with its tokenizer.json."""
        return TokenizerError(
            f"{self.path / TOKENIZER_JSON}: its class {self._class_name} {why}; if the file is meant as it is, "
            f"remove tokenizer_class from {self._declaring}"
        )

    @functools.cached_property
    def _class(self) -> TokenizerClass | None:
        """The tokenizer's class, if it has a tokenizer of its own.

        transformers does not believe LlamaTokenizer of a byte-level vocabulary. Without a tokenizer.json there is a
        SentencePiece model, which other classes than those for pieces leave as it is.
        """
        found = CLASSES.get(self._class_name)
        if found is None or not self._has_json and not found.pieces:
            return None
        is_mistaken = self._class_name == "LlamaTokenizer" and not self._config.get("auto_map")
        return None if is_mistaken and BYTE_LEVEL in self.json_bytes else found

    @property
    def _lists_added(self) -> bool:
        return self._config.get("added_tokens_decoder") is not None

    @property
    def _map(self) -> dict[str, Any]:
        """The fields of special_tokens_map.json, where it counts."""
        return {} if self._lists_added else self.fields_of(SPECIAL_TOKENS_MAP_JSON)

    def _token(self, key: str, value: Any) -> Token:
        """Return the token that a field of special_tokens_map.json or tokenizer_config.json names."""
        return token_of(
            self.path / (SPECIAL_TOKENS_MAP_JSON if key in self._map else TOKENIZER_CONFIG_JSON), key, value
        )

    @functools.cached_property
    def _said_roles(self) -> set[str]:
        """The usual roles of special tokens that a file speaks of."""
        return {role for role in ROLES if role in self._config or role in self._map}

    @functools.cached_property
    def _special(self) -> dict[str, Token]:
        """The special tokens by their roles: the usual ones, the class's, and other fields that end in _token."""
        usual = {role: value for role, value in (self._usual | self._late).items() if value not in (None, "")}
        found = {role: self._token(role, value) for role, value in usual.items()}
        for more in (tokens for tokens in self._extra_fields if isinstance(tokens, dict)):
            found |= {role: self._token(role, value) for role, value in more.items()}
        return found

    @property
    def _special_and_extra(self) -> list[Token]:
        """All special tokens: those with a role, then the others."""
        return [*self._special.values(), *self._extra]

    @functools.cached_property
    def _usual(self) -> dict[str, Any]:
        """What the files or else the class say of roles, but for unusual ones that tokenizer_config.json names."""
        defaults = {} if self._class is None else self._class.special
        said = {key: value for key, value in self._config.items() if _counts_early(key, value)} | self._map
        others = filter(_is_unusual, said)
        return {role: said.get(role, defaults.get(role)) for role in dict.fromkeys([*ROLES, *defaults, *others])}

    @functools.cached_property
    def _extra(self) -> list[Token]:
        """The special tokens without a role; if no file names any, the class's with an unusual one."""
        lists = [tokens for tokens in self._extra_fields if not isinstance(tokens, dict)]
        if wrong := [tokens for tokens in lists if not isinstance(tokens, list)]:
            source = self.path / (SPECIAL_TOKENS_MAP_JSON if EXTRA in self._map else TOKENIZER_CONFIG_JSON)
            raise TokenizerError(f"{source}: {EXTRA} is {wrong[0]!r}: must be a list of tokens")
        names = [token for tokens in lists for token in tokens]
        if not lists and self._class is not None:
            names = [self._usual[role] for role in self._class.special if role not in ROLES and self._usual[role]]
        return [self._token(EXTRA, name) for name in names]

    @property
    def _extra_fields(self) -> list[Any]:
        """What the files say of special tokens besides: lists of tokens, and objects with tokens by name."""
        first = self._config.get(EXTRA) or self._config.get(ADDITIONAL, self._config.get(EXTRA))
        more = self._map.get(EXTRA)
        left = self._map.get(ADDITIONAL, self._config.get(ADDITIONAL) if self._config.get(EXTRA) else None)
        # Tokens by name in the map replace a list; an empty list is one too.
        lists = (
            [] if isinstance(more, dict) else [x for x in (first, more) if x is not None and not isinstance(x, dict)]
        )
        by_name = [tokens for tokens in (first, more) if isinstance(tokens, dict)]
        if not (self._late or isinstance(first, dict) and first):  # transformers puts these in SPECIFIC's place
            by_name.insert(0, self._specific)
        return list(filter(None, [*by_name, *(lists or [left])]))

    @property
    def _specific(self) -> dict[str, Any]:
        """The tokens by name that only some models have; empty if the files say nothing of them."""
        found = self._config.get(SPECIFIC) or {}
        if not isinstance(found, dict):
            source = self.path / TOKENIZER_CONFIG_JSON
            raise TokenizerError(f"{source}: {SPECIFIC} is {reprlib.repr(found)}: must be an object of tokens by name")
        return found

    @property
    def _late(self) -> dict[str, str]:
        """The unusual roles that tokenizer_config.json gives as text: they count over special_tokens_map.json."""
        return {key: value for key, value in self._config.items() if _is_unusual(key) and isinstance(value, str)}

    def _added(self, listed: Iterable[Token]) -> list[Token]:
        """Return the added tokens in the order of their ids; `listed`: those in tokenizer.json."""
        if self._lists_added:
            source, table = self.path / TOKENIZER_CONFIG_JSON, self._config["added_tokens_decoder"]
            if not isinstance(table, dict) or not all(isinstance(token, dict) for token in table.values()):
                raise TokenizerError(f"{source}: added_tokens_decoder is not an object of tokens by id")
            tokens = in_order(source, table.items())
            return [{"special": False} | token_of(source, "added_tokens_decoder", token) for token in tokens]
        source = self.path / ADDED_TOKENS_JSON
        names = {self._special[role]["content"] for role in self._said_roles & self._special.keys()}
        names |= {token["content"] for token in self._extra}
        pairs: list[tuple[Any, Token]] = [
            (id, {"content": name, "special": name in names, "normalized": name not in names})
            for name, id in self.fields_of(ADDED_TOKENS_JSON).items()
        ]
        return in_order(
            source, [*pairs, *((token["id"], {"content": token["content"]} | flags_of(token)) for token in listed)]
        )

    def _stops(self, name: str) -> tuple[int, ...]:
        """Return the ids at which a model stops, as one file says; empty if it does not say, or is missing."""
        found = self.fields_of(name).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(id) is int for id in ids):
            raise TokenizerError(
                f"{self.path / name}: eos_token_id is {reprlib.repr(found)}: must be a token's id or a list of them"
            )
        return tuple(id for id in ids if is_id(id))  # -1 and the like are no token's, so no text ends there


def file_bytes(path: Path) -> bytes:
    """Return the bytes of a tokenizer's file.

    Raises:
        TokenizerError: if it cannot be read, or is too large.
    """
    with reading(path, TokenizerError):
        n_bytes = path.stat().st_size
        if n_bytes > MAX_FILE_BYTES:
            raise TokenizerError(f"{path}: {n_bytes} bytes: too large for a tokenizer; is it a model?")
        return read_file(path)


def ids_alone(found: Tokenizer, fields: Mapping[str, Any] | None, name: str) -> SpecialIds:
    """Return the ids of a tokenizer whose file is all there is: the post-processor of a tokenizer.json is asked.

    Args:
        found: what the file holds.
        fields: the file's fields, if it is a tokenizer.json.
        name: its name, for messages.

    Raises:
        TokenizerError: if the post-processor is damaged.
    """
    found = found.with_ids(found.file_ids)
    if fields is None:
        return found.ids
    prefix = _prefix_in_json(fields, name)
    bos = prefix[0] if prefix else None
    stops = found.ids.stops if bos == found.ids.bos else found.ids.stops - {found.ids.bos} | {found.ids.eos}
    return SpecialIds(bos=bos, eos=found.ids.eos, prefix=prefix, stops=frozenset(id for id in stops if id is not None))


def _prefix_in_json(fields: Mapping[str, Any], name: Path | str) -> tuple[int, ...]:
    """Return what the post-processor of a tokenizer.json puts before every text."""
    with refusals(str(name)):
        return prefix_of(fields)


def _counts_early(key: str, value: Any) -> bool:
    """Return whether transformers reads a field of tokenizer_config.json before special_tokens_map.json.

    It keeps unusual roles that are given as text for later.
    """
    is_object = isinstance(value, dict) and value.get("__type") == "AddedToken"
    return not _is_unusual(key) or value is None or is_object


def _is_unusual(key: str) -> bool:
    """Return whether a field is named like a special token with a role that only some models have."""
    return key.endswith("_token") and key not in ROLES
