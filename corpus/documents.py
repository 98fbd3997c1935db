"""Read files as one stream of documents, each in one or more pieces of text.

Long documents are cut into pieces so that memory stays flat and several workers can encode one document. A cut takes
out a single space, which encode.py puts back. No token continues past a letter with a space, so the ids of the
pieces, joined, are the ids of the whole document. Text without single spaces (Chinese, Japanese) is cut behind a line
end, or else between two characters; there, a token or two may differ from those of the whole document.
"""

import codecs
import itertools
import json
import operator
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llamalet.errors import DataError

PIECE_CHARS = 1 << 16
MAX_PIECE_CHARS = 250_000  # 1 MB of the longest characters
PART_BYTES = 1 << 20  # lines longer than this are read in parts
MAX_LINE_CHARS = 64 << 20  # of a .jsonl file, whose lines must be parsed whole
BATCH_BYTES, BATCH_ROWS = 16 << 20, 1024  # of a .parquet file, in memory at a time
END_OF_TEXT = "<|endoftext|>"
# U+2581 is what SentencePiece turns a space into.
SINGLE_SPACE = re.compile("(?<=[^ \u2581]) (?=[^ \u2581])")
# Without a space or line end for longer than this, a text is not made of words, or of paragraphs.
LONGEST_WORD, LONGEST_PARAGRAPH = 100, 1000
ZERO_WIDTH_JOINER = "\u200d"
LONGEST_CHARACTER = 32  # code points; an emoji may be a dozen

DocumentRule = Literal["file", "blankline", "line"]


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


def check(files: Mapping[str, Sequence[Path]], *, document: DocumentRule, column: str) -> None:
    """Read the beginning of every file, so that a file that cannot be read is known before any work is done.

    Raises:
        DataError: as pieces.
    """
    for path in itertools.chain.from_iterable(files.values()):
        next(_read([path], document, column), None)


def expected_chars(files: Mapping[str, Sequence[Path]], column: str) -> int:
    """Estimate the characters of text in some files, for progress bars and sampling."""
    return sum(_expected_chars(path, column) for paths in files.values() for path in paths)


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
        kind = path.suffix.lower()
        rows = _parquet(path, column) if kind == ".parquet" else _jsonl(path, column) if kind == ".jsonl" else None
        for line, parts in itertools.groupby(rows or _plain(path, document), key=operator.itemgetter(0)):
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


def _plain(path: Path, document: DocumentRule) -> Iterator[tuple[int, str]]:
    """Yield each line of a text file, a long one in parts, after the number of the line at which its document starts.

    Blank lines around a document and the end of its last line do not belong to it.
    """
    found, begin = False, 0
    between = ""  # line ends and blank lines, which count only if more of the document follows
    for line, text, starts, ends in _line_parts(path):
        blank = starts and ends and not text.strip()
        if not starts:
            yield begin, text
        elif text == END_OF_TEXT or (blank and document != "file"):
            begin = 0
        elif blank:
            between += text + "\n"
        else:
            if not begin or document == "line":
                begin, between = line, ""
            yield begin, between + text
            found, between = True, "\n"
    if not found:
        yield 1, ""


def _jsonl(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) for each JSON object of a .jsonl file; a null is a document without text."""
    first = True
    for line, raw in _lines(path):
        if not raw.strip():
            continue
        if first and raw.lstrip().startswith("["):
            raise DataError(
                f"{path}, line {line}: begins a JSON array, and each line must be one object; convert it: "
                f"jq -c '.[]' {shlex.quote(str(path))} > NEW.jsonl"
            )
        first = False
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: not valid JSON: {error}; each line must be one object") from None
        try:
            text = _text_of(row, column)
        except DataError as error:
            raise DataError(f"{path}, line {line}: {error}") from None
        yield line, text if text.strip() else ""


def _text_of(row: Any, column: str) -> str:
    """Return the text of a row of a .jsonl file; a null is an empty text.

    Raises:
        DataError: if it has none; the message does not name the row.
    """
    if not isinstance(row, dict) or column not in row:
        found = f"an object with {_listed(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"no text under the key {column!r}: it is {found}; --text-column=KEY names another")
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        raise DataError(
            f"the value of {column!r} is a {type(text).__name__}, not a text; the keys are {_listed(row)}; "
            "--text-column=KEY names another"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("the text holds half of a surrogate pair, which is no character") from None
    return text


def _parquet(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """Yield (row, text) for each row of a .parquet file; a null is a document without text."""
    import pyarrow

    row = 0
    with _open_parquet(path, column) as file:
        rows = max(file.metadata.num_rows, 1)
        batch_size = BATCH_BYTES // (_column_bytes(file, column) // rows + 1)
        try:
            for batch in file.iter_batches(batch_size=min(max(batch_size, 1), BATCH_ROWS), columns=[column]):
                values = batch.column(0)
                if isinstance(values, pyarrow.ExtensionArray):
                    values = values.storage
                for value in values.cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    text = (value or b"").decode()
                    yield row, text if text.strip() else ""
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(
                f"{path}, row {row}: byte {error.start + 1} (0x{byte:02x}) of {column!r} is not valid UTF-8; "
                "--text-column=NAME chooses another column"
            ) from None
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}, row {row + 1}: damaged: {error}") from None


def _open_parquet(path: Path, column: str) -> Any:
    """Open a parquet file that has text in `column`."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=PART_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a valid parquet file: {error}") from None
    kinds = {field.name: field.type for field in file.schema_arrow}
    if column not in kinds or not _holds_text(kinds[column]):
        file.close()
        problem = f"the column {column!r} is {kinds[column]}, not text" if column in kinds else f"no column {column!r}"
        raise DataError(f"{path}: {problem}; the columns are {_listed(kinds)}; --text-column=NAME chooses")
    return file


def _holds_text(kind: Any) -> bool:
    """Return whether an Arrow type is text, bytes (which may be text), a category of them, or only nulls."""
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary,
        types.is_binary_view, types.is_fixed_size_binary, types.is_null,
    )  # fmt: skip
    return any(test(kind) for test in tests)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its end) of a UTF-8 file, with any kind of line end."""
    for line, parts in itertools.groupby(_line_parts(path), key=operator.itemgetter(0)):
        text = ""
        for part in parts:
            text += part.text
            if len(text) > MAX_LINE_CHARS:
                raise DataError(
                    f"{path}, line {line}: longer than {MAX_LINE_CHARS} characters; is it one object per line?"
                )
        yield line, text


class _LinePart(NamedTuple):
    """A line of a file, or part of a long one."""

    line: int
    text: str
    """Without the line's end."""
    starts: bool
    """Whether the line starts here."""
    ends: bool
    """Whether the line is known to end here."""


def _line_parts(path: Path) -> Iterator[_LinePart]:
    """Yield the lines of a UTF-8 file, with any kind of line end, in parts of about PART_BYTES."""
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        line, starts = 1, True
        rest, offset = b"", 0  # the first half of what was cut in two, and where in the line it is
        while raw := file.readline(PART_BYTES):
            ends = raw.endswith(b"\n") or len(raw) < PART_BYTES
            if line == 1 and starts:
                _check_not_utf16(path, raw)
            data = rest + raw
            half = not ends and data.endswith(b"\r")  # perhaps of a line end
            try:
                text, used = codecs.utf_8_decode(data[: len(data) - half], "strict", ends)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, line, offset + error.start + 1, data[error.start]) from None
            yield _LinePart(line, text.removesuffix("\n").removesuffix("\r") if ends else text, starts, ends)
            line, starts = line + ends, ends
            rest, offset = (b"", 0) if ends else (data[used:], offset + used)
        if rest not in (b"", b"\r"):
            raise _not_utf8(path, line, offset + 1, rest[0])


def _not_utf8(path: Path, line: int, number: int, byte: int) -> DataError:
    """Return the error for a byte that is not UTF-8."""
    return DataError(
        f"{path}, line {line}: byte {number} (0x{byte:02x}) is not valid UTF-8; convert the file, if it is Latin-1 "
        f"with: iconv -f LATIN1 -t UTF-8 {shlex.quote(str(path))} > NEW{path.suffix}"
    )


def _check_not_utf16(path: Path, head: bytes) -> None:
    """Raise a DataError if a file begins as UTF-16 or UTF-32 does, in which Latin letters have zero bytes."""
    head = head[:4096]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 4 * head.count(0) > len(head):
        raise DataError(
            f"{path}: is UTF-16 or not text, must be UTF-8; convert it: iconv -f UTF-16 -t UTF-8 "
            f"{shlex.quote(str(path))} > NEW{path.suffix}"
        )


def _expected_chars(path: Path, column: str) -> int:
    """Estimate the characters of text in a file."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size
    with _open_parquet(path, column) as file:
        return _column_bytes(file, column)


def _column_bytes(file: Any, column: str) -> int:
    """Return the uncompressed size of a column of a parquet file."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in columns if chunk.path_in_schema == column)


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


def _listed(names: Iterable[str]) -> str:
    """Return the first few names, quoted, for a message."""
    return ", ".join(map(repr, itertools.islice(names, 8))) or "nothing"
