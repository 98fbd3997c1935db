"""Files: replaced atomically, read only where they are regular, hashed."""

import contextlib
import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from llamalet.errors import DISK_FULL, DiskError, LlamaletError, UsageError

BLOCK = 4096  # bytes; a full disk may have room for less
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""A control character, such as a line end."""
MAX_NAME = 255  # bytes; a system's most
MAX_NEW_NAME = 220  # bytes; what is written beside a file has a longer name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path`, atomically and durably, when the block ends.

    The bytes go to a temporary file in the same folder, which is synced to disk and then renamed; readers that have the
    old file open or mapped keep it. If the block raises, `path` is unchanged and nothing is left behind.

    Args:
        path: the file to create or replace; a missing folder is created.

    Yields:
        A binary file open for writing and reading.

    Raises:
        DiskError: if the file cannot be written.
    """
    tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            tmp.unlink()
        # An error with another file's name comes from reading that file and needs no more explanation.
        if isinstance(error, LlamaletError) or not isinstance(error, OSError):
            raise
        if error.filename is not None and Path(error.filename) not in (tmp, *path.parents):
            raise
        advice = "; free some space and try again" if error.errno in DISK_FULL else ""
        raise DiskError(f"{path}: cannot be written: {error.strerror}{advice}") from error


def write_file(path: Path, content: bytes) -> None:
    """Write or replace a whole file, as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def check_writable(folder: Path) -> None:
    """Check that files can be created in a folder, or in the one where it would be made; nothing is left behind.

    Raises:
        DiskError: if they cannot.
        UsageError: if the name is not allowed (check_name).
    """
    check_name(folder)
    existing = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    try:
        if os.path.lexists(existing) and not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(BLOCK))
    except OSError as error:
        raise DiskError(f"{folder}: cannot be written to: {existing}: {error.strerror}") from None


def check_replaceable(path: Path) -> None:
    """Check that nothing but a file is in the place of a file that will be written.

    Raises:
        DiskError: if something is.
        UsageError: if the name is not allowed (check_name).
    """
    check_name(path)
    if path.exists() and not path.is_file():
        raise DiskError(f"{path}: is in the place of a file that is to be written; move it away")


def check_name(path: Path) -> None:
    """Check that a path can be the name of a new file or folder, and of the temporary files beside it.

    Raises:
        UsageError: if a name in it is too long, or has a line end or another control character: programs that list
            files would show something else.
    """
    if CONTROL.search(str(path)):
        raise UsageError(f"{str(path)!r}: has a control character in its name; choose another name")
    for name in path.parts:
        if (size := len(os.fsencode(name))) > MAX_NEW_NAME:
            raise UsageError(
                f"{name[:40]}...: is a name of {size} bytes; the most is {MAX_NEW_NAME}; choose a shorter name"
            )


def sync_folder(folder: Path) -> None:
    """Sync the file names in `folder` to disk; does nothing on Windows, which cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def home_folder() -> Path | None:
    """Return the user's home; None if HOME is not set and the system does not know the user, as in many containers."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if os.environ.get("HOME") != "" else None


def stamp(path: Path) -> object:
    """Return what shows that a file, or a file directly in a folder, has changed: names, sizes and times."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def read_file(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: if it cannot be read, or is a pipe, which would be waited for, or a device, which may have no end.
    """
    with open_file(path) as file:
        return file.read()


@contextlib.contextmanager
def reading(path: Path, error: type[LlamaletError]) -> Iterator[None]:
    """Raise `error` for what the system refuses in the block, such as a file without permission or a broken disk."""
    try:
        yield
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from None


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: see read_file.
    """
    check_regular(path)
    return open(path, "rb")


def refuse_odd(paths: Iterable[Path], error: type[LlamaletError]) -> None:
    """Raise `error` if anything but a regular file is at one of these paths; is_file() would call it missing.

    Raises:
        error: if one is a pipe, a device, a folder, or a link to nothing, as an incomplete download leaves it.
    """
    for path in paths:
        if os.path.lexists(path) and not path.is_file():
            what = "a link to nothing" if not path.exists() else "a folder" if path.is_dir() else "a pipe or a device"
            raise error(f"{path}: is {what}, not a file; move it away, or put the file there")


def check_regular(path: Path) -> None:
    """Check that opening a path does not wait for another program, as a pipe does; a folder fails by itself.

    Raises:
        OSError: see read_file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
