"""Shakespeare's plays in one megabyte, a common first text for small language models.

The text is a list of speeches. A document is a passage of consecutive speeches, at least PASSAGE_CHARS long, so that a
model learns how a conversation continues and where one may begin. The last tenth is for validation, as in nanoGPT.
"""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from corpus.record import RECORD_FILE, Record, RecordedFile
from llamalet.errors import DataError
from llamalet.files import check_writable, sha256_of, write_file

NAME = "tinyshakespeare"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TEXT_BYTES = 1_115_394
TEXT_FILE = "input.txt"
PASSAGE_CHARS = 1500
VAL_SHARE = 0.1
TIMEOUT_S = 60


def make_source(data_dir: Path) -> Record:
    """Fill data_dir/tinyshakespeare with train.jsonl, val.jsonl and source.json, unless that is done already.

    Raises:
        DataError: if the text cannot be downloaded or is not the expected one. A copy from elsewhere may be put there
            as input.txt.
        DiskError: if the folder cannot be written to.
    """
    folder = data_dir / NAME
    if (known := Record.read(folder)) is not None:
        return known
    path = folder / TEXT_FILE
    check_writable(folder)
    if not path.is_file():
        data = _download(path)
        write_file(path, data)
        print(f"{path}: {len(data) / 1e6:.1f} MB, downloaded, checked")
    if (found := sha256_of(path)) != SHA256:
        raise DataError(f"{path}: sha256 is {found}, must be {SHA256}; delete it to download it again")
    text = path.read_bytes().decode()
    (folder / RECORD_FILE).unlink(missing_ok=True)
    splits: dict[str, list[str]] = {"train": [], "val": []}
    begin = 0
    for passage in passages(text):
        splits["train" if begin < (1 - VAL_SHARE) * len(text) else "val"].append(passage)
        begin += len(passage) + 2
    files = {}
    for name, documents in splits.items():
        target = folder / f"{name}.jsonl"
        write_file(target, b"".join(json.dumps({"text": document}).encode() + b"\n" for document in documents))
        files[name] = (RecordedFile.of(target, folder),)
    return Record(source=NAME, files=files).write(folder)


def passages(text: str) -> Iterator[str]:
    """Yield passages of consecutive speeches, each at least PASSAGE_CHARS long; a blank line ends a speech."""
    speeches: list[str] = []
    n_chars = 0
    for speech in text.rstrip("\n").split("\n\n"):
        speeches.append(speech)
        n_chars += len(speech)
        if n_chars >= PASSAGE_CHARS:
            yield "\n\n".join(speeches)
            speeches, n_chars = [], 0
    if speeches:
        yield "\n\n".join(speeches)


def _download(path: Path) -> bytes:
    """Return the bytes of the text at URL; an error says that they may be put at `path` instead."""
    advice = f"; download it elsewhere and put it there as {path}"
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_S) as response:
            data: bytes = response.read(2 * TEXT_BYTES)
    except (OSError, urllib.error.URLError) as error:
        raise DataError(f"{URL}: cannot be downloaded ({error}){advice}") from None
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise DataError(f"{URL}: received {len(data)} bytes that are not the expected text of {TEXT_BYTES}{advice}")
    return data
