"""Pieces of documents to token ids, so that the pieces of a document give the ids of the whole."""

import contextlib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus.documents import Piece
from llamalet import shards
from llamalet.errors import DataError, TokenizerError
from llamalet.shards import TokenBlock
from llamalet.tokenizer import Tokenizer
from llamalet.tokenizer import load as load_tokenizer

# A character that no vocabulary joins to others, so that the tokens of a text after it are those of the text alone.
SEAM = "\ue000"
# A character in no vocabulary: its ids show what a tokenizer does with unknown ones.
UNKNOWN_CHARACTER = "\U0010fffd"

_worker_tokenizer = functools.cache(load_tokenizer)  # each worker loads the vocabulary once


class EncodeTask(NamedTuple):
    """The text that a worker encodes in one call, and the file of its vocabulary."""

    tokenizer: Path
    pieces: tuple[Piece, ...]


def check_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """Check that a vocabulary can encode documents, in pieces.

    Raises:
        TokenizerError: if no token can stand before each document, or a piece would spell something else, or nothing,
            behind the piece before it.
    """
    try:
        tokenizer.separator_id  # noqa: B018
    except TokenizerError as error:
        raise TokenizerError(f"{name}: {error}") from None
    for gap in (" ", ""):
        with contextlib.suppress(TokenizerError):
            piece = encode_piece(Piece("b", False, name, 1, gap), tokenizer)
            parts = _spelled([*tokenizer.encode("a"), *piece], tokenizer)
            if piece and parts == _spelled(tokenizer.encode(f"a{gap}b"), tokenizer):
                continue
        raise TokenizerError(
            f"{name}: cannot be used: long documents are encoded in pieces, and the pieces of 'a{gap}b' spell "
            "something else in this vocabulary; choose another one"
        )


def encode_pieces(task: EncodeTask) -> TokenBlock:
    """Encode pieces of documents; runs in the workers.

    Raises:
        DataError: if a piece cannot be encoded, with its file and line.
    """
    tokenizer = _worker_tokenizer(task.tokenizer)
    ids: list[int] = []
    n_unknown = 0
    for piece in task.pieces:
        try:
            found = tokenizer.encode_document(piece.text) if piece.starts else encode_piece(piece, tokenizer)
        except Exception as error:
            raise DataError(f"{piece.where}: cannot be encoded: {type(error).__name__}: {error}") from None
        ids += found
        n_unknown += found[piece.starts :].count(_unknown_id(tokenizer))  # a document's first id is no text
    return TokenBlock(
        np.array(ids, dtype=shards.id_dtype(tokenizer.vocab_size)),
        documents=sum(piece.starts for piece in task.pieces),
        text_bytes=sum(len(piece.text.encode()) + len(piece.gap) for piece in task.pieces),
        unknown_tokens=n_unknown,
    )


def encode_piece(piece: Piece, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a piece, without what begins its document, as they are behind the piece before it.

    Raises:
        TokenizerError: if the vocabulary joins SEAM to other characters.
    """
    if piece.starts:
        return tokenizer.encode(piece.text)
    if piece.gap and _words_are_apart(tokenizer):
        return tokenizer.encode(_with_its_space(piece.text, tokenizer))
    text = piece.gap + piece.text
    if _keeps_beginnings(tokenizer):
        return tokenizer.encode(text)
    # The tokenizer adds or drops a space at the beginning of a text: it gets another beginning, which is taken off.
    seam, ids = tokenizer.encode(SEAM), tokenizer.encode(SEAM + text)
    if ids[: len(seam)] != seam:
        raise TokenizerError(f"the vocabulary joins U+{ord(SEAM):04X} to the characters behind it")
    return ids[len(seam) :]


@functools.cache
def _words_are_apart(tokenizer: Tokenizer) -> bool:
    """Return whether a word with the space before it has the same tokens anywhere in a text."""
    return tokenizer.encode("a b") == tokenizer.encode("a") + tokenizer.encode(_with_its_space("b", tokenizer))


@functools.cache
def _keeps_beginnings(tokenizer: Tokenizer) -> bool:
    """Return whether a text is encoded as it is: no space is added before it, none is dropped."""
    return all(_spelled(tokenizer.encode(text), tokenizer) == text.encode() for text in ("b", " b"))


def _with_its_space(text: str, tokenizer: Tokenizer) -> str:
    """Return a text with the space before it, unless the tokenizer itself puts one before every text."""
    return text if tokenizer.adds_space else " " + text


@functools.cache
def _unknown_id(tokenizer: Tokenizer) -> int:
    """Return the id of characters outside the vocabulary; -1 if it spells them in bytes, or leaves them out."""
    ids = tokenizer.encode(UNKNOWN_CHARACTER)
    return -1 if not ids or UNKNOWN_CHARACTER.encode() in _spelled(ids, tokenizer) else ids[-1]


def _spelled(ids: Iterable[int], tokenizer: Tokenizer) -> bytes:
    """Return the bytes that ids spell."""
    return b"".join(map(tokenizer.token_bytes, ids))
