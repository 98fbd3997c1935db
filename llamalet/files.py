"""Files that appear whole or not at all."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llamalet.errors import DISK_FULL, DiskError, LlamaletError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when the block ends, durably and in one step.

    The bytes go to a file beside it, are synced to disk, and then renamed; readers that have the old file open or
    mapped keep it. If the block raises, `path` is as it was and nothing is left behind.

    Args:
        path: the file to create or replace; its folder is made where missing.

    Yields:
        A binary file open for writing and reading.

    Raises:
        DiskError: if the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        # An error that knows another file's name comes from reading that one and says enough.
        if isinstance(error, LlamaletError) or not isinstance(error, OSError):
            raise
        if error.filename is not None and Path(error.filename) not in (aside, *path.parents):
            raise
        advice = "; free some space and try again" if error.errno in DISK_FULL else ""
        raise DiskError(f"{path}: cannot be written: {error.strerror}{advice}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
