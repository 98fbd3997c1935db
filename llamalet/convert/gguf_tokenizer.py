"""What a GGUF file says of its tokenizer: the table of tokens (gguf_table.py), and the ids that begin and end texts.

llama.cpp knows some tokens by their names, whatever the file says of them. Where that differs from what was meant, two
keys of our own, which it ignores, say so: OWN_IDS and OWN_KINDS.

Source: llama.cpp, src/llama-vocab.cpp (load).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llamalet.checks import checked, shown
from llamalet.convert import byte_level
from llamalet.convert.gguf_table import (
    BYTES,
    CONTROL,
    DEFAULT_WORDS,
    NORMAL,
    PIECES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    TokenTable,
    check_table,
    padded,
    table_of,
    vocabulary_of,
)
from llamalet.convert.probes import check_same
from llamalet.errors import ConfigError, TokenizerError
from llamalet.tokenizer import SpecialIds, Tokenizer, ids_file
from llamalet.tokenizer.llama2 import peculiarity

if TYPE_CHECKING:
    import gguf

WITHOUT = ("no_vocab", "none")  # types of a file that has no tokenizer on purpose
END_OF_TURN = "<|eot_id|>"
TABLE_KEY = "tokenizer.ggml."
OWN_IDS, OWN_KINDS = "llamalet.generation_config", "llamalet.token_type"
# Names of tokens at which llama.cpp stops, and of others that are special for it, whatever the file says of them.
STOP_NAMES = frozenset((
    END_OF_TURN, "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
))  # fmt: skip
SPECIAL_NAMES = STOP_NAMES | frozenset((
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>",
    "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>",
    "<\uff5cfim\u2581hole\uff5c>", "<SUF>", "\u2581<SUF>", "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>",
    "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>", "<|code_middle|>",
    "<|middle|>",
))  # fmt: skip
TEXT_NAMES = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))
# Keys that hold an id; llama.cpp stops at all but the first.
ID_KEYS = ("bos", "eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
PLACES = ("eot", "eom", "bos", "eos")  # those that are written, in this order


class TokenizerFields(NamedTuple):
    """What a file will say of a tokenizer, proved to give the same ids.

    table: the vocabulary, with a token for each row of the embeddings.
    ids: the ids under ID_KEYS.
    begins: whether BOS begins every text.
    own_ids: the ids that begin and end texts, if llama.cpp's keys say something else.
    own_kinds: the kinds, if llama.cpp takes some tokens for others.
    notes: what llama.cpp will do differently, a line each.
    """

    table: TokenTable
    ids: Mapping[str, int]
    begins: bool
    own_ids: SpecialIds | None
    own_kinds: list[int] | None
    notes: list[str]


# -- reading -----------------------------------------------------------------------------------------------------------


def read(get: Callable[[str], Any], name: str, n_rows: int) -> tuple[Tokenizer, bytes] | None:
    """Return the vocabulary of a file, and its bytes as a file of its own; None if the file has none on purpose.

    Args:
        get: returns a value of the file's metadata by its key, or None.
        name: the file's name, for messages.
        n_rows: number of rows of the embeddings.

    Raises:
        TokenizerError: if it is damaged, or of a kind that this project does not have.
        UsageError: if it needs a library that is not installed.
    """
    if get("tokenizer.ggml.model") in WITHOUT:
        return None
    table = _read_table(get, name)
    kinds, ids = _list(get, name, OWN_KINDS, int, "whole numbers"), _own_ids(get, name)
    if len(kinds) not in (0, len(table.tokens)):
        raise TokenizerError(f"{name}: {OWN_KINDS} has {len(kinds)} kinds for {len(table.tokens)} tokens")
    kinds = kinds or _kinds_for_llama_cpp(table)
    found, data = vocabulary_of(table._replace(kinds=kinds), name, n_rows)
    if ids is None:
        known = {key: id for key, id in _said_ids(get, name).items() if id < len(table.tokens)}
        ids = _ids_for_llama_cpp(table, known, _typed(get, name, "tokenizer.ggml.add_bos_token", bool))
    return found.with_ids(ids, name), data


def stops(get: Callable[[str], Any], name: str) -> frozenset[int]:
    """Return the ids at which a file without a tokenizer that can be read says that texts end; see read.

    Raises:
        TokenizerError: if our own key is damaged.
    """
    own = _own_ids(get, name)
    return own.stops if own is not None else frozenset(id for key, id in _said_ids(get, name).items() if key != "bos")


def _own_ids(get: Callable[[str], Any], name: str) -> SpecialIds | None:
    """Return the ids that begin and end texts, as our own key says; None if there is none."""
    found = _typed(get, name, OWN_IDS, str)
    return None if found is None else ids_file.parse_ids(found.encode(), f"{name}: {OWN_IDS}")


def _said_ids(get: Callable[[str], Any], name: str) -> dict[str, int]:
    """Return the ids under ID_KEYS; an id of -1 says that there is none."""
    found = {key: _typed(get, name, f"tokenizer.ggml.{key}_token_id", int) for key in ID_KEYS}
    return {key: id for key, id in found.items() if id is not None and id >= 0}


def _typed(get: Callable[[str], Any], name: str, key: str, kind: type) -> Any:
    """Return a value of one of checks.KINDS; None if there is none; raise a TokenizerError on another type."""
    try:
        return None if (value := get(key)) is None else checked(f"{name}: {key}", value, kind)
    except ConfigError as error:
        raise TokenizerError(str(error)) from None


def _read_table(get: Callable[[str], Any], name: str) -> TokenTable:
    """Return the table of a file.

    Raises:
        TokenizerError: if it is damaged, or llama.cpp would not take it.
    """
    type = _typed(get, name, "tokenizer.ggml.model", str)
    words = _typed(get, name, "tokenizer.ggml.pre", str) or DEFAULT_WORDS
    if type is None:
        raise TokenizerError(f"{name}: has no tokenizer inside")
    known = byte_level.ALIASES.get(words, words)
    if type not in (PIECES, BYTES) or type == BYTES and known not in byte_level.NAMES:
        raise TokenizerError(f"{name}: is of type {type!r} with {words!r}, which cannot be read")
    tokens = _list(get, name, TABLE_KEY + "tokens", str, "texts")
    kinds = _list(get, name, TABLE_KEY + "token_type", int, "whole numbers") or [NORMAL] * len(tokens)
    scores = _list(get, name, TABLE_KEY + "scores", float, "numbers") if type == PIECES else []
    if not tokens or len(kinds) != len(tokens) or type == PIECES and len(scores) != len(tokens):
        raise TokenizerError(f"{name}: has {len(tokens)} tokens, {len(scores)} scores, {len(kinds)} kinds")
    tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(tokens)]
    merges = [_pair(text) for text in _list(get, name, TABLE_KEY + "merges", str, "texts")] if type == BYTES else []
    adds_space = type == PIECES and _typed(get, name, "tokenizer.ggml.add_space_prefix", bool) is not False
    check_table(tokens, kinds, type, name)
    return TokenTable(type, words, tokens, kinds, scores, merges, adds_space)


def _list(get: Callable[[str], Any], name: str, key: str, kind: type, words: str) -> list[Any]:
    """Return a list of the metadata, whose values are `words`; an empty one if there is none."""
    found = get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, kind) and not isinstance(one, bool) for one in found):
        raise TokenizerError(f"{name}: {key} is {shown(found)}: must be a list of {words}")
    return found


def _pair(text: str) -> tuple[str, str]:
    """Return the two tokens of a pair, which a space separates; a token may begin with one."""
    at = text.find(" ", 1)
    return (text[:at], text[at + 1 :]) if at > 0 else (text, "")


def _kinds_for_llama_cpp(table: TokenTable) -> list[int]:
    """Return what llama.cpp takes each token for, which some names decide."""
    return [
        USER_DEFINED if token in TEXT_NAMES else CONTROL if token in SPECIAL_NAMES and kind != UNUSED else kind
        for token, kind in zip(table.tokens, table.kinds, strict=True)
    ]


def _ids_for_llama_cpp(table: TokenTable, ids: Mapping[str, int], begins: bool | None) -> SpecialIds:
    """Return the ids with which llama.cpp begins and ends texts.

    Args:
        table: the vocabulary.
        ids: the ids under ID_KEYS.
        begins: whether BOS begins every text, if the file says so.
    """
    if begins is None:
        begins = table.type == PIECES or table.words in byte_level.BEGIN_WITH_BOS
    defaults = {"bos": 1, "eos": 2} if table.type == PIECES else {"bos": 11} if begins else {}
    ids = {key: id for key, id in defaults.items() if id < len(table.tokens)} | dict(ids)
    bos = ids.get("bos")
    stops = {id for key, id in ids.items() if key != "bos"}
    stops |= {id for id, token in enumerate(table.tokens) if token in STOP_NAMES}
    prefix = (bos,) if begins and bos is not None else ()
    return SpecialIds(bos=bos, eos=ids.get("eos"), prefix=prefix, stops=frozenset(stops))


# -- writing -----------------------------------------------------------------------------------------------------------


def fields_of(vocabulary: Tokenizer, data: bytes, n_rows: int, name: str) -> TokenizerFields:
    """Return what a file will say of a tokenizer.

    Args:
        vocabulary: the tokenizer.
        data: its file.
        n_rows: number of rows of the embeddings; unused tokens make up for what the vocabulary lacks.
        name: the file, for messages.

    Raises:
        TokenizerError: if llama.cpp would encode texts differently, or cannot begin them as the model does.
    """
    ours = vocabulary.ids
    if (pair := _overlapping([*vocabulary.special, *vocabulary.added])) is not None:
        raise TokenizerError(f"{name}: where {pair[0]!r} and {pair[1]!r} overlap, llama.cpp finds the longer one")
    if len(ours.prefix) > 1:
        raise TokenizerError(f"{name}: its texts begin with {list(ours.prefix)}, and with llama.cpp with one token")
    try:
        table = padded(table_of(vocabulary, data), n_rows)
        check_table(table.tokens, table.kinds, table.type, name)
        copy, _ = vocabulary_of(table, name, n_rows)
        check_same(vocabulary, copy.with_ids(ours), name)
    except TokenizerError as error:
        reason = _reason(vocabulary, data)
        where = "" if str(error).startswith(name) else f"{name}: llama.cpp cannot have its tokenizer: "
        raise TokenizerError(f"{where}{error}{f' ({reason})' if reason else ''}") from None
    ids = _places(ours, table)
    theirs = _ids_for_llama_cpp(table, ids, bool(ours.prefix))
    kinds, notes = _kinds_for_llama_cpp(table), []
    if theirs.stops != ours.stops:
        notes.append(f"llama.cpp stops at {_named(theirs.stops, table)}, this model at {_named(ours.stops, table)}")
    if changed := [table.tokens[id] for id, kind in enumerate(kinds) if kind != table.kinds[id]]:
        notes.append(
            f"llama.cpp decides by their names which tokens are special, not by their kinds: {', '.join(changed[:8])}"
        )
    return TokenizerFields(
        table, ids, bool(ours.prefix), None if theirs == ours else ours, table.kinds if changed else None, notes
    )


def _overlapping(names: Sequence[str]) -> tuple[str, str] | None:
    """Return two names of which the shorter can end within the longer; None if there are none.

    The library finds the one that begins first, llama.cpp the longest. A run of one character is found alike.
    """
    longest: dict[str, str] = {}
    for name in names:
        for at in range(1, len(name)):
            longest[name[:at]] = max(longest.get(name[:at], ""), name, key=len)
    for name in names:
        for at in range(1, len(name)):
            other = longest.get(name[at:], "")
            if len(other) >= len(name) and other != name and len(set(name + other)) > 1:
                return name, other
    return None


def _reason(vocabulary: Tokenizer, data: bytes) -> str:
    """Return what llama.cpp does differently with a SentencePiece model, if that is known."""
    if vocabulary.suffix != "model":
        return ""
    if (special := peculiarity(data)) is not None:
        return f"it {special}"
    return "llama.cpp puts a space after each added token" if vocabulary.added and vocabulary.adds_space else ""


def _places(ids: SpecialIds, table: TokenTable) -> dict[str, int]:
    """Return the ids under ID_KEYS: llama.cpp stops at EOS, at the end of a turn (EOT) and of a message (EOM).

    It has its own idea of EOS if a file says none, so a stop takes its place, or a token that is no text.
    """
    known = {id for id, token in enumerate(table.tokens) if token in STOP_NAMES}
    bos = ids.prefix[0] if ids.prefix else ids.bos
    no_text = (id for id, kind in enumerate(table.kinds) if kind in (UNUSED, UNKNOWN, CONTROL))
    eos = ids.eos if ids.eos is not None else min(ids.stops, default=next(no_text, bos))
    turn = table.tokens.index(END_OF_TURN) if END_OF_TURN in table.tokens else None
    left = sorted(id for id in ids.stops - known - {eos} if id < len(table.tokens))
    if turn is not None:
        left.insert(0, turn)
    found = {"bos": bos, "eos": eos, **dict(zip(("eot", "eom"), left, strict=False))}
    return {key: id for key, id in found.items() if id is not None}


def _named(ids: frozenset[int], table: TokenTable) -> str:
    """Return ids and their tokens, for a message."""
    shown = [f"{id} ({table.tokens[id]!a})" for id in sorted(ids) if id < len(table.tokens)]
    return ", ".join(shown[:8]) or "no token"


def add(writer: "gguf.GGUFWriter", fields: TokenizerFields) -> None:
    """Put a tokenizer into the metadata."""
    table = fields.table
    writer.add_tokenizer_model(table.type)
    writer.add_tokenizer_pre(table.words)
    writer.add_token_list(table.tokens)
    if table.type == PIECES:
        writer.add_token_scores(table.scores)
        writer.add_token_types(table.kinds)
        if UNKNOWN in table.kinds:
            writer.add_unk_token_id(table.kinds.index(UNKNOWN))
        writer.add_add_space_prefix(table.adds_space)
        writer.add_remove_extra_whitespaces(False)
    else:
        writer.add_token_types(table.kinds)
        writer.add_token_merges([" ".join(pair) for pair in table.merges])
    for key, id in sorted(fields.ids.items(), key=lambda item: PLACES.index(item[0])):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", id)
    writer.add_add_bos_token(fields.begins)
    writer.add_add_eos_token(False)
    if fields.own_ids is not None:
        writer.add_string(OWN_IDS, ids_file.ids_json(fields.own_ids).decode())
    if fields.own_kinds is not None:
        writer.add_array(OWN_KINDS, fields.own_kinds)


def add_none(writer: "gguf.GGUFWriter", stops: Sequence[int]) -> None:
    """Say that a file has no tokenizer on purpose; llama.cpp makes up tokens for its vocab_size then.

    Args:
        writer: of the file.
        stops: the ids at which the model's texts end all the same.
    """
    writer.add_tokenizer_model(WITHOUT[1])
    if stops:
        ids = SpecialIds(bos=None, eos=None, prefix=(), stops=frozenset(stops))
        writer.add_string(OWN_IDS, ids_file.ids_json(ids).decode())
