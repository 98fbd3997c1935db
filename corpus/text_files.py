"""Read .txt, .jsonl and .parquet files: the text of each document, in parts, with the line or row where it starts."""

import codecs
import itertools
import json
import operator
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llamalet.errors import DataError
from llamalet.files import open_file

PART_BYTES = 1 << 20  # lines longer than this are read in parts
MAX_LINE_CHARS = 64 << 20  # of a .jsonl file, whose lines must be parsed whole
BATCH_BYTES, BATCH_ROWS = 16 << 20, 1024  # of a .parquet file, in memory at a time
END_OF_TEXT = "<|endoftext|>"

DocumentRule = Literal["file", "blankline", "line"]


def read_texts(path: Path, document: DocumentRule, column: str) -> Iterator[tuple[int, str]]:
    """Yield the documents of a file, each as one or more (line, part of the text).

    Args:
        path: the file; its suffix says what it is.
        document: how a .txt file is divided: not at all (except at lines END_OF_TEXT), at blank lines, or at each line.
        column: key (.jsonl) or column (.parquet) of the text.

    Raises:
        DataError: naming file and line, if the content does not match the suffix.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path, column)
    return _jsonl(path, column) if kind == ".jsonl" else _plain(path, document)


def expected_chars(path: Path, column: str) -> int:
    """Estimate the characters of text in a file."""
    if path.suffix.lower() != ".parquet":
        return path.stat().st_size
    with _open_parquet(path, column) as file:
        return _column_bytes(file, column)


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
    with open_file(path) as file:
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


def _column_bytes(file: Any, column: str) -> int:
    """Return the uncompressed size of a column of a parquet file."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in columns if chunk.path_in_schema == column)


def _listed(names: Iterable[str]) -> str:
    """Return the first few names, quoted, for a message."""
    return ", ".join(map(repr, itertools.islice(names, 8))) or "nothing"
