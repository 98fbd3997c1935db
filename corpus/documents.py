"""Read files as one stream of documents, each in one or more pieces of text.

Long documents are cut into pieces so that memory stays flat and several workers can encode one document. A cut takes
out a single space, which encode.py puts back. No token continues past a letter with a space, so the ids of the
pieces, joined, are the ids of the whole document. Text without single spaces (Chinese, Japanese) is cut behind a line
end, or else between two characters; there, a token or two may differ from those of the whole document.
"""

import itertools
import operator
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from corpus import text_files
from corpus.text_files import DocumentRule, read_texts

PIECE_CHARS = 1 << 16
MAX_PIECE_CHARS = 250_000  # 1 MB of the longest characters
# U+2581 is what SentencePiece turns a space into.
SINGLE_SPACE = re.compile("(?<=[^ \u2581]) (?=[^ \u2581])")
# Without a space or line end for longer than this, a text is not made of words, or of paragraphs.
LONGEST_WORD, LONGEST_PARAGRAPH = 100, 1000
ZERO_WIDTH_JOINER = "\u200d"
LONGEST_CHARACTER = 32  # code points; an emoji may be a dozen


class Piece(NamedTuple):
    """Part of a document's text, and where the document was found."""

    text: str
    starts: bool
    """Whether the document starts here."""
    path: str
    line: int
    """Line, or row of a parquet file, at which the document starts, from 1."""
    gap: str = ""
    """The space that was cut out before this piece; empty where a document starts, or is cut between characters."""

    @property
    def where(self) -> str:
        """The document's location, for messages."""
        return f"{self.path}, {'row' if self.path.endswith('.parquet') else 'line'} {self.line}"


def pieces(
    files: Mapping[str, Sequence[Path]], split: str, *, document: DocumentRule, column: str, val_fraction: float
) -> Iterator[Piece]:
    """Yield the documents of a split, in pieces, in the same order every time.

    Without files for "val", every n-th document is a validation document, n = 1 / val_fraction. With fewer than n
    documents, such as one long text, the end of each document is.

    Args:
        files: the files of train and, optionally, val.
        split: train or val.
        document: how a .txt file is divided: not at all (except at lines END_OF_TEXT), at blank lines, or at each line.
        column: key (.jsonl) or column (.parquet) of the text.
        val_fraction: share of validation documents if they have no files of their own.

    Raises:
        DataError: naming file and line, if a file's content does not match its suffix.
    """
    if "val" in files:
        return _read(files[split], document, column)
    every = round(1 / val_fraction)
    lengths = _lengths(_read(files["train"], document, column), every)
    stream = _read(files["train"], document, column)
    if len(lengths) < every:
        return _heads_or_tails(stream, [int(length * (1 - val_fraction)) for length in lengths], split)
    return _every_nth(stream, every, split)


def check_readable(files: Mapping[str, Sequence[Path]], *, document: DocumentRule, column: str) -> None:
    """Read the beginning of every file, so that a file that cannot be read is known before any work is done.

    Raises:
        DataError: as pieces.
    """
    for path in itertools.chain.from_iterable(files.values()):
        next(_read([path], document, column), None)


def expected_chars(files: Mapping[str, Sequence[Path]], column: str) -> int:
    """Estimate the characters of text in some files, for progress bars and sampling."""
    return sum(text_files.expected_chars(path, column) for paths in files.values() for path in paths)


def with_text(stream: Iterable[Piece], empty: list[str]) -> Iterator[Piece]:
    """Yield the pieces that have text; append the locations of documents without any to `empty`."""
    for piece in stream:
        if piece.text:
            yield piece
        else:
            empty.append(piece.where)


def first_documents(stream: Iterable[Piece], n_documents: int) -> Iterator[Piece]:
    """Yield the pieces of the first documents."""
    number = 0
    for piece in stream:
        number += piece.starts
        if number > n_documents:
            return
        yield piece


def _read(paths: Iterable[Path], document: DocumentRule, column: str) -> Iterator[Piece]:
    """Yield all documents of some files in pieces; a document without text is one empty piece."""
    for path in paths:
        for line, parts in itertools.groupby(read_texts(path, document, column), key=operator.itemgetter(0)):
            yield from _cut((text for _, text in parts), str(path), line)


def _cut(parts: Iterable[str], path: str, line: int) -> Iterator[Piece]:
    """Join the parts of one document and cut it into pieces; the cuts do not depend on the parts."""
    text, scanned, starts, gap = "", 0, True, ""
    for part in parts:
        text += part
        begin = 0
        while (cut := _next_cut(text, begin, scanned)) is not None:
            end, following = cut
            yield Piece(text[begin:end], starts, path, line, gap)
            begin, starts, gap = following, False, text[end:following]
        text, scanned = text[begin:], max(len(text) - begin - 1, 0)
    if text or starts:
        yield Piece(text, starts, path, line, gap)


def _next_cut(text: str, begin: int, scanned: int) -> tuple[int, int] | None:
    """Return where the piece that begins at `begin` ends and the next begins; None if that needs more text.

    The cut is the first single space after PIECE_CHARS, or, if MAX_PIECE_CHARS have none, behind the first line end
    after PIECE_CHARS, or else between two characters.
    """
    earliest, latest = begin + PIECE_CHARS, begin + MAX_PIECE_CHARS
    if space := SINGLE_SPACE.search(text, max(earliest, scanned), latest + 1):
        return space.span()
    if len(text) <= latest:
        return None
    at = text.find("\n", earliest, latest) + 1 or _between_characters(text, latest)
    return at, at


def _between_characters(text: str, at: int) -> int:
    """Return the last position up to `at` that is not inside what a reader takes for one character.

    That may be a letter with its accents, an emoji joined from several, or a line end of two characters.
    """
    for position in range(at, max(at - LONGEST_CHARACTER, 0), -1):
        before, behind = text[position - 1], text[position : position + 1]
        inside = behind and (unicodedata.category(behind) in ("Mn", "Mc", "Me") or behind == ZERO_WIDTH_JOINER)
        if not inside and before != ZERO_WIDTH_JOINER and before + behind != "\r\n":
            return position
    return at


def _lengths(stream: Iterable[Piece], limit: int) -> list[int]:
    """Return the number of characters of each document, at most the first `limit`."""
    lengths: list[int] = []
    for piece in stream:
        if piece.starts:
            if len(lengths) == limit:
                break
            lengths.append(0)
        lengths[-1] += len(piece.text)
    return lengths


def _every_nth(stream: Iterable[Piece], every: int, split: str) -> Iterator[Piece]:
    """Yield every n-th document for val, the others for train."""
    number = 0
    for piece in stream:
        number += piece.starts
        if (number % every == 0) == (split == "val"):
            yield piece


def _heads_or_tails(stream: Iterable[Piece], heads: list[int], split: str) -> Iterator[Piece]:
    """Yield about heads[i] characters of document i for train, and the rest for val."""
    number, seen, in_tail = -1, 0, False
    for piece in stream:
        if piece.starts:
            number, seen, in_tail = number + 1, 0, False
        if in_tail:
            if split == "val":
                yield piece
            continue
        end, at = len(piece.text), heads[number] - seen
        seen += end
        if at < end and (cut := _end_of_head(piece.text, max(at, 0))) is not None:
            (end, begin), in_tail = cut, True
        if split == "train":
            yield piece._replace(text=piece.text[:end])
        elif in_tail:
            yield piece._replace(text=piece.text[begin:], starts=True, gap="")


def _end_of_head(text: str, at: int) -> tuple[int, int] | None:
    """Return where the head ends and the tail begins: around the next line end or else space after `at`.

    Where these are far away, both are `at`: text without spaces is divided between two characters. Returns None if `at`
    is in the last word.
    """
    following = [position for position in (text.find("\n", at), text.find(" ", at)) if position >= 0]
    last, nearest = max(text.rfind("\n", 0, at), text.rfind(" ", 0, at)), min(following, default=len(text))
    if nearest - last > LONGEST_WORD and (not following or nearest - at > LONGEST_PARAGRAPH):
        at = _between_characters(text, at)
        return at, at
    return (following[0], following[0] + 1) if following else None
