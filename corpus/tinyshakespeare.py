"""Shakespeare's plays in one megabyte, the text that small language models are tried on.

It is one file of speeches. A document is a passage: speeches in a row, until they are PASSAGE_CHARS long, so that a
model learns how a conversation goes on, and where one may begin. The last tenth of the text is for validation, as with
nanoGPT.
"""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from corpus.sources import RECORD_FILE, Record, RecordedFile, sha256_of
from llamalet.errors import DataError
from llamalet.files import replacing

TINYSHAKESPEARE = "tinyshakespeare"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
N_BYTES = 1_115_394
TEXT_FILE = "input.txt"
PASSAGE_CHARS = 1500
VAL_FRACTION = 0.1
TIMEOUT_S = 60


def prepare(data_dir: Path, report: Callable[[str], None]) -> Record:
    """Bring the text into data_dir/tinyshakespeare, as far as it is not there: train.jsonl, val.jsonl and source.json.

    Args:
        data_dir: where sources lie.
        report: called with a line about the download.

    Raises:
        DataError: if the text cannot be downloaded, or is another one; who has it may put it there as input.txt.
    """
    folder = data_dir / TINYSHAKESPEARE
    if (known := Record.read(folder)) is not None:
        return known
    path = folder / TEXT_FILE
    if not path.is_file():
        data = _download(path)
        with replacing(path) as file:
            file.write(data)
        report(f"{path}: {len(data) / 1e6:.1f} MB, downloaded, checked")
    if (found := sha256_of(path)) != SHA256:
        raise DataError(f"{path}: sha256 is {found}, must be {SHA256}; delete it, and it is downloaded again")
    text = path.read_bytes().decode()
    (folder / RECORD_FILE).unlink(missing_ok=True)
    splits: dict[str, list[str]] = {"train": [], "val": []}
    begin = 0
    for passage in passages(text):
        splits["train" if begin < (1 - VAL_FRACTION) * len(text) else "val"].append(passage)
        begin += len(passage) + 2
    files = {}
    for name, documents in splits.items():
        target = folder / f"{name}.jsonl"
        with replacing(target) as file:
            file.writelines(json.dumps({"text": document}).encode() + b"\n" for document in documents)
        files[name] = (RecordedFile(target.name, target.stat().st_size, sha256_of(target)),)
    record = Record(source=TINYSHAKESPEARE, files=files)
    record.write(folder)
    return record


def passages(text: str) -> Iterator[str]:
    """Yield speeches in a row, joined, until they are PASSAGE_CHARS long; a blank line ends a speech."""
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
    """Return the text from the net."""
    advice = f"; download it elsewhere and put it there as {path}"
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read(2 * N_BYTES)
    except (OSError, urllib.error.URLError) as error:
        raise DataError(f"{URL}: cannot be downloaded ({error}){advice}") from None
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise DataError(f"{URL}: {len(data)} bytes came, which are not the text of {N_BYTES}{advice}")
    return data
