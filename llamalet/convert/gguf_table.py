"""A vocabulary as GGUF stores it, a table of tokens with their kinds, made of any of our vocabularies and back.

llama.cpp's vocabularies of Llama models are of two types:

    llama   SentencePiece's BPE with byte fallback; pieces are merged in the order of their scores
    gpt2    byte-level BPE; pairs are merged in the order of a list, within the words that byte_level.py describes

The table has one token for each row of the embeddings. Kinds say which tokens are special (control), which any text
may contain by name (user-defined), and which are none (unused: they fill up a padded vocabulary).

Source: llama.cpp, src/llama-vocab.cpp (tokenize); conversion/base.py.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llamalet import tokenizer
from llamalet.convert import byte_level, tokenizer_json
from llamalet.convert.probes import TEXTS
from llamalet.convert.tokenizer_json import CONTROLS, FIRST_TEXT_ID
from llamalet.errors import TokenizerError
from llamalet.tokenizer import SPACE_MARK, JsonTokenizer, Llama3Tokenizer, Tokenizer
from llamalet.tokenizer.bpe import merge
from llamalet.tokenizer.byte_alphabet import byte_level_bytes, pairs_in
from llamalet.tokenizer.huggingface import BYTE_TOKEN, parts_of, rank_rows
from llamalet.tokenizer.llama2 import BOS_ROW, EOS_ROW
from llamalet.tokenizer.rows import TokenizerRow

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PIECES, BYTES = "llama", "gpt2"
DEFAULT_WORDS = "default"
PAD_SCORE = -1000.0
MAX_CONTESTED = 4096


class TokenTable(NamedTuple):
    """A vocabulary as GGUF stores it.

    type: PIECES or BYTES.
    words: the name of the way in which texts are split into words; only BYTES has several.
    tokens: the token of each id: a piece with SPACE_MARK for a space, one character per byte, or a name.
    kinds: the kind of each token.
    scores: the score of each piece; none with BYTES.
    merges: the pairs to merge; none with PIECES.
    adds_space: whether a space is put before each text and after each special token.
    """

    type: str
    words: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    adds_space: bool


def check_table(tokens: Sequence[str], kinds: Sequence[int], type: str, name: str) -> None:
    """Raise a TokenizerError if two tokens are the same, or a text may have bytes without a token."""
    first_at: dict[str, int] = {}
    for id, token in enumerate(tokens):
        if first_at.setdefault(token, id) != id:
            raise TokenizerError(f"{name}: tokens {first_at[token]} and {id} are both {token!r}")
    if type == PIECES:
        needed = {f"<0x{byte:02X}>": byte for byte in range(256)}
        lost = [token for token in needed if token not in first_at or kinds[first_at[token]] != BYTE]
    else:  # these bytes are in no valid UTF-8
        lost = [token for token, byte in byte_level_bytes().items() if token not in first_at and _in_utf8(byte)]
    if lost:
        raise TokenizerError(f"{name}: has no token for {len(lost)} of the 256 bytes, without which llama.cpp fails")


def _in_utf8(byte: int) -> bool:
    """Return whether a byte can be in a text."""
    return byte not in (0xC0, 0xC1) and byte < 0xF5


# -- to a vocabulary ---------------------------------------------------------------------------------------------------


def vocabulary_of(table: TokenTable, name: str, n_rows: int) -> tuple[Tokenizer, bytes]:
    """Return the vocabulary that a table describes, without the unused tokens at its end, and its file's bytes.

    Llama 2's and Llama 3's kinds become the rows of a tokenizer.bin, any other a tokenizer.json.

    Raises:
        TokenizerError: if it cannot be represented.
        UsageError: if it needs a library that is not installed.
    """
    n = max((id + 1 for id, kind in enumerate(table.kinds) if kind != UNUSED), default=0)
    table = table._replace(tokens=table.tokens[:n], kinds=table.kinds[:n], scores=table.scores[:n])
    rows = _rows(table)
    if rows is not None:
        data = tokenizer.pack(rows)
        return tokenizer.parse(data, name, n_rows), data
    fields = _json_fields(table)
    if table.type == BYTES and (rows := rank_rows(fields)) is not None:
        data = tokenizer.pack(rows)
    else:
        data = json.dumps(fields, ensure_ascii=False).encode()
    found = tokenizer.parse(data, name, n_rows)
    if table.type == PIECES:
        _check_merging(table, found, name)
    return found, data


def _rows(table: TokenTable) -> list[TokenizerRow] | None:
    """Return the rows of the tokenizer.bin with the same vocabulary as a table of pieces; None if there is none."""
    usual = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * (FIRST_TEXT_ID - len(CONTROLS))
    usual += [NORMAL] * (len(table.tokens) - FIRST_TEXT_ID)
    names = *CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256))
    if table.kinds != usual or tuple(table.tokens[: len(names)]) != names or not table.adds_space:
        return None
    if SPACE_MARK not in table.tokens or any("\0" in token for token in table.tokens):
        return None
    rows = [
        (token.replace(SPACE_MARK, " ").encode(), float(np.float32(score)))
        for token, score in zip(table.tokens, table.scores, strict=True)
    ]
    for id, row in ((1, BOS_ROW), (2, EOS_ROW)):
        rows[id] = (row, rows[id][1])
    return rows


def _json_fields(table: TokenTable) -> dict[str, Any]:
    """Return the contents of a tokenizer.json with a table's vocabulary."""
    named = {
        "special": {table.tokens[id]: id for id, kind in enumerate(table.kinds) if kind in (CONTROL, UNKNOWN)},
        "added": {table.tokens[id]: id for id, kind in enumerate(table.kinds) if kind == USER_DEFINED},
    }
    # llama.cpp does not look at the kind when it merges, so an unused token that merging gives is one like others.
    unused = {token for token, kind in zip(table.tokens, table.kinds, strict=True) if kind == UNUSED}
    if unused:
        pairs = table.merges if table.type == BYTES else pairs_in(set(table.tokens))
        unused -= {part for left, right in pairs for part in (left, right, left + right)}
    tokens = [None if token in unused else token for token in table.tokens]
    if table.type == PIECES:
        return tokenizer_json.sentencepiece_fields(tokens, table.scores, adds_space=table.adds_space, **named)
    words = byte_level.NAMES[byte_level.ALIASES.get(table.words, table.words)]
    return tokenizer_json.byte_level_fields(tokens, table.merges, words=words, **named)


def _check_merging(table: TokenTable, found: Tokenizer, name: str) -> None:
    """Raise a TokenizerError if a tokenizer.json merges the pieces of a table in another order than llama.cpp.

    They differ where pieces have the same score: llama.cpp merges the leftmost first, the library one kind of pair
    after another.
    """
    bytes_at = [table.tokens.index(f"<0x{byte:02X}>") for byte in range(256)]
    pieces = {token: id for id, token in enumerate(table.tokens) if table.kinds[id] == NORMAL}
    scores = {piece: table.scores[id] for piece, id in pieces.items()}
    order = {score: rank for rank, score in enumerate(sorted(set(scores.values()), reverse=True))}
    ranks = {piece: order[score] for piece, score in scores.items()}
    names = [*found.special, *found.added]
    for text in (*TEXTS, *itertools.islice(_contested(scores), MAX_CONTESTED)):
        if not text or any(name in text for name in names):
            continue
        expected: list[int] = []
        for piece in merge((" " * table.adds_space + text).replace(" ", SPACE_MARK), ranks):
            id = pieces.get(piece)
            expected += [id] if id is not None else (bytes_at[byte] for byte in piece.encode())
        if found.encode(text) != expected:
            raise TokenizerError(
                f"{name}: has pieces of the same score, which the tokenizers library merges in another order than "
                f"llama.cpp, as in {text[:40]!r}"
            )


def _contested(scores: Mapping[str, float]) -> Iterator[str]:
    """Yield texts in which two pieces of the same score overlap, so that only one of them can be merged."""
    made = dict.fromkeys(left + right for left, right in pairs_in(scores))
    beginning: dict[tuple[float, str], list[str]] = {}
    counts = Counter(scores[piece] for piece in made)
    tied = [piece for piece in made if counts[scores[piece]] > 1]
    for piece in tied:
        for at in range(1, len(piece)):
            beginning.setdefault((scores[piece], piece[:at]), []).append(piece)
    for piece in tied:
        for at in range(1, len(piece)):
            for other in beginning.get((scores[piece], piece[at:]), ()):
                text = (piece[:at] + other).replace(SPACE_MARK, " ")
                yield from (text, f"\n{text}")


# -- from a vocabulary -------------------------------------------------------------------------------------------------


def table_of(vocabulary: Tokenizer, data: bytes) -> TokenTable:
    """Return a vocabulary as a table.

    Raises:
        TokenizerError: if it is a tokenizer.json of a kind that llama.cpp does not have.
    """
    if isinstance(vocabulary, JsonTokenizer):
        return _table_of_json(vocabulary, json.loads(data))
    if isinstance(vocabulary, Llama3Tokenizer):
        tokens, merges = byte_level.table(vocabulary)
        return TokenTable(BYTES, "llama-bpe", tokens, _kinds(tokens, vocabulary), [], merges, False)
    names: list[str | None] = [piece.decode().replace(" ", SPACE_MARK) for piece, _ in vocabulary.pieces()]
    scores = [score for _, score in vocabulary.pieces()]
    return _pieces(names, scores, vocabulary)


def _table_of_json(vocabulary: JsonTokenizer, fields: Mapping[str, Any]) -> TokenTable:
    """Return the table of a tokenizer.json.

    Raises:
        TokenizerError: if it does something that llama.cpp cannot.
    """
    model, listed = fields["model"], fields["added_tokens"]
    kind = model.get("type") or ("BPE" if "merges" in model else "foreign")
    if kind != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        affixes = " with marked parts of words" if kind == "BPE" else ""
        raise TokenizerError(f"it is a {kind} model{affixes}, and llama.cpp has only plain BPE for Llama models")
    for token in listed:
        if flags := [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]:
            raise TokenizerError(f"its token {token['content']!r} has {', '.join(flags)}, which GGUF cannot say")
    # The library numbers added tokens itself where their list leaves a gap.
    ids: dict[str, int] = model["vocab"] | vocabulary.special | vocabulary.added
    tokens: list[str | None] = [None] * vocabulary.vocab_size
    for token, id in ids.items():
        tokens[id] = token
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [(left, right) for left, right in pairs]
    normalizers = parts_of(fields.get("normalizer"), "normalizers")
    steps = parts_of(fields.get("pre_tokenizer"), "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in steps):
        if normalizers:
            how = ", ".join(step["type"] for step in normalizers)
            raise TokenizerError(f"it normalizes texts ({how}), which llama.cpp does not")
        words = byte_level.name_of(steps, ignore_merges=bool(model.get("ignore_merges")))
        return TokenTable(BYTES, words, _with_pads(tokens, vocabulary), _kinds(tokens, vocabulary), [], merges, False)
    kinds = [step["type"] for step in [*normalizers, *steps]]
    if kinds not in (["Prepend", "Replace"], ["Replace"], ["Metaspace"]):
        raise TokenizerError(f"it changes texts by {', '.join(kinds) or 'nothing'}, and llama.cpp does not")
    if kinds == ["Metaspace"] and vocabulary.adds_space:
        raise TokenizerError("it puts a space before a text that does not begin with one, and llama.cpp before every")
    return _pieces(tokens, _scores(tokens, merges, vocabulary), vocabulary)


def _scores(tokens: Sequence[str | None], merges: Sequence[tuple[str, str]], vocabulary: JsonTokenizer) -> list[float]:
    """Return scores by which pieces are merged in the order of a list of pairs.

    Raises:
        TokenizerError: if there are none: all pairs that give a piece must be in the list, one after another.
    """
    apart = {*vocabulary.special, *vocabulary.added}
    mergeable = {token for token in tokens if token and token not in apart and not BYTE_TOKEN.fullmatch(token)}
    order = [piece for piece, _ in itertools.groupby(left + right for left, right in merges)]
    ranks = {piece: rank for rank, piece in enumerate(order)}
    if len(ranks) != len(order) or set(merges) != set(pairs_in(mergeable)):
        raise TokenizerError("its pairs are not merged in the order of their pieces, as SentencePiece's are")
    rest = itertools.count(len(order))
    return [-float(ranks[token] if token in ranks else next(rest)) for token in tokens]


def _pieces(names: Sequence[str | None], scores: list[float], vocabulary: Tokenizer) -> TokenTable:
    """Return a table of pieces.

    Args:
        names: the piece of each id, whose own name counts where it is special or added.
        scores: the score of each id.
        vocabulary: knows the rest.
    """
    tokens = list(names)
    for named in (vocabulary.special, vocabulary.added):
        for token, id in named.items():
            tokens[id] = token
    kinds = _kinds(tokens, vocabulary)
    apart = {*vocabulary.special.values(), *vocabulary.added.values(), *vocabulary.unused}
    for id, name in enumerate(tokens):
        if id not in apart and name is not None and BYTE_TOKEN.fullmatch(name):
            kinds[id] = BYTE
    unknown = vocabulary.special.get(tokenizer_json.UNK)
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    return TokenTable(PIECES, DEFAULT_WORDS, _with_pads(tokens, vocabulary), kinds, scores, [], vocabulary.adds_space)


def _kinds(tokens: Sequence[str | None], vocabulary: Tokenizer) -> list[int]:
    """Return the kind of each token: normal, control, user-defined or unused."""
    kinds = [NORMAL] * len(tokens)
    for ids, kind in (
        (vocabulary.special.values(), CONTROL),
        (vocabulary.added.values(), USER_DEFINED),
        (vocabulary.unused, UNUSED),
    ):
        for id in ids:
            kinds[id] = kind
    return kinds


def _with_pads(tokens: Sequence[str | None], vocabulary: Tokenizer) -> list[str]:
    """Return tokens with a name for each unused id."""
    taken = {token for token in tokens if token is not None}
    return [_pad(id, taken) if token is None or id in vocabulary.unused else token for id, token in enumerate(tokens)]


def padded(table: TokenTable, n_rows: int) -> TokenTable:
    """Return a table with an unused token for each further row of the embeddings."""
    taken, tokens = set(table.tokens), list(table.tokens)
    for id in range(len(tokens), n_rows):
        tokens.append(_pad(id, taken))
    n = n_rows - len(table.tokens)
    scores = table.scores + [PAD_SCORE] * n if table.type == PIECES else []
    return table._replace(tokens=tokens, kinds=table.kinds + [UNUSED] * n, scores=scores)


def _pad(id: int, taken: set[str]) -> str:
    """Return the name of an unused token, which llama.cpp wants to be unlike all others."""
    name = f"[PAD{id}]"
    while name in taken:
        name = f"[{name}]"
    return name
