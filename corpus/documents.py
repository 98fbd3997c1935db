"""Read files as one stream of documents, each in one or more pieces of text.

Long documents are cut into pieces so that memory stays flat and several workers can encode one document. A cut replaces
a single space. Llama 2's tokenizers put a space before every text (SentencePiece's dummy prefix); for others
pretokenize.py does. No token continues past a letter with a space, so the ids of the pieces, joined, are the ids of the
whole document.
"""

import itertools
import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llamalet.errors import DataError

MAX_LINE_BYTES = 64 << 20
PIECE_CHARS = 1 << 16
END_OF_TEXT = "<|endoftext|>"
# U+2581 is what SentencePiece turns a space into.
SINGLE_SPACE = re.compile("(?<=[^ \u2581]) (?=[^ \u2581])")

DocumentRule = Literal["file", "blankline", "line"]


class Piece(NamedTuple):
    """Part of a document's text, and where the document was found."""

    text: str
    starts: bool
    """Whether the document starts here; if not, a space was left out before this piece."""
    path: str
    line: int
    """Line, or row of a parquet file, at which the document starts, from 1."""

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
    """Join the parts of one document and cut it at the first single space after every PIECE_CHARS."""
    text, scanned, starts = "", 0, True
    for part in parts:
        text += part
        begin = 0
        while gap := SINGLE_SPACE.search(text, max(begin + PIECE_CHARS, scanned)):
            yield Piece(text[begin : gap.start()], starts, path, line)
            begin, starts = gap.end(), False
        text, scanned = text[begin:], max(len(text) - begin - 1, 0)
    if text or starts:
        yield Piece(text, starts, path, line)


def _plain(path: Path, document: DocumentRule) -> Iterator[tuple[int, str]]:
    """Yield each line of a text file after the number of the line at which its document starts.

    Blank lines around a document and the end of its last line do not belong to it.
    """
    found, begin = False, 0
    between = ""  # line ends and blank lines, which count only if more of the document follows
    for line, text in _lines(path):
        blank = not text.strip()
        if text == END_OF_TEXT or (blank and document != "file"):
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
    """Yield (line, text) for each JSON object of a .jsonl file."""
    for line, raw in _lines(path):
        if not raw.strip():
            continue
        where = f"{path}, line {line}"
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            found = f"an object with {_listed(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise DataError(
                f"{where}: no text under the key {column!r}: it is {found}; --text-column=KEY names another"
            )
        text = row[column]
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: the text holds half of a surrogate pair, which is no character") from None
        yield line, text if text.strip() else ""


def _parquet(path: Path, column: str) -> Iterator[tuple[int, str]]:
    """Yield (row, text) for each row of a .parquet file."""
    import pyarrow

    row = 0
    with _open_parquet(path, column) as file:
        try:
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield row, text if text and text.strip() else ""
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}, row {row + 1}: damaged: {error}") from None


def _open_parquet(path: Path, column: str) -> Any:
    """Open a parquet file that has text in `column`."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a valid parquet file: {error}") from None
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    if kinds.get(column) not in ("string", "large_string", "string_view"):
        file.close()
        raise DataError(f"{path}: no text in a column {column!r}: it has {_listed(kinds)}; --text-column=NAME chooses")
    return file


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its end) of a UTF-8 file, with any kind of line end."""
    with path.open("rb") as file:
        for line in itertools.count(1):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(
                    f"{path}, line {line}: longer than {MAX_LINE_BYTES >> 20} MiB; is it one object per line?"
                )
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                raise DataError(
                    f"{path}, line {line}: byte {error.start + 1} (0x{byte:02x}) is not valid UTF-8; convert the file"
                ) from None
            yield line, text.removesuffix("\n").removesuffix("\r")


def _expected_chars(path: Path, column: str) -> int:
    """Estimate the characters of text in a file."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size
    with _open_parquet(path, column) as file:
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
    """Yield heads[i] characters of document i for train, up to the next line end or space, and the rest for val."""
    number, seen, in_tail = -1, 0, False
    for piece in stream:
        if piece.starts:
            number, seen, in_tail = number + 1, 0, False
        if in_tail:
            if split == "val":
                yield piece
            continue
        gap = -1
        if seen + len(piece.text) > heads[number]:
            at = heads[number] - seen
            gap = piece.text.find("\n", at)
            gap = piece.text.find(" ", at) if gap < 0 else gap
        seen += len(piece.text)
        head, tail = (piece.text[:gap], piece.text[gap + 1 :]) if gap >= 0 else (piece.text, "")
        in_tail = gap >= 0
        if split == "train":
            yield piece._replace(text=head)
        elif in_tail:
            yield piece._replace(text=tail, starts=True)


def _listed(names: Iterable[str]) -> str:
    """Return the first few names, quoted, for a message."""
    return ", ".join(map(repr, itertools.islice(names, 8))) or "nothing"
