"""The folder where torch.compile keeps its results. Uses only the standard library, because it comes before torch."""

import atexit
import contextlib
import getpass
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llamalet.errors import note

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
KINDS = (".so", ".cpp", ".py")
"""The ends of the names of what torch keeps there: libraries, and the code that they are made and called from."""

ELF_64_BITS_LITTLE_ENDIAN, ELF_HEADER_BYTES = b"\x7fELF\x02\x01", 64


def ensure_folder() -> None:
    """Take a temporary folder if torch's own cannot be written to, and remove the unfinished files of a killed run."""
    folder = current()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "not writable", str(folder))
    except OSError as error:
        os.environ[VARIABLE] = temporary = tempfile.mkdtemp(prefix="llamalet-compiler-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        note(f"torch's compiler cache: {error.filename}: {error.strerror}; taking a temporary folder")
    else:
        remove_unfinished(folder)


def current() -> Path:
    """Return the folder. Source of torch's choice: torch/_inductor/runtime/cache_dir_utils.py."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return Path(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def remove_unfinished(folder: Path) -> None:
    """Remove torch's files that end too early: a killed linker or a power cut leaves them, and torch loads them.

    An empty library fails every later run; half of one ends the process without a word. torch compiles again what is
    missing. A library that another process writes now is left: torch locks it (torch/_inductor/codecache.py).
    """
    for path in folder.glob("??/*"):
        # A name is a key and an end, and the folder has the key's second and third letter. Others' files stay.
        if path.suffix not in KINDS or path.name[1:3] != path.parent.name:
            continue
        with contextlib.suppress(OSError), _lock(folder / "locks" / (path.name.split(".")[0] + ".lock")):
            if path.stat().st_size < _whole_size(path):
                path.unlink()


def _whole_size(path: Path) -> int:
    """Return how many bytes a file has at least: 1, and of a library of Linux as many as its header says.

    The table of sections is the last part of a library. Source of the layout: elf.h, Elf64_Ehdr.
    """
    with path.open("rb") as file:
        header = file.read(ELF_HEADER_BYTES)
    if not header.startswith(ELF_64_BITS_LITTLE_ENDIAN):
        return 1
    if len(header) < ELF_HEADER_BYTES:
        return ELF_HEADER_BYTES
    (offset,), (entry_bytes, count) = struct.unpack_from("<Q", header, 0x28), struct.unpack_from("<HH", header, 0x3A)
    return int(offset + entry_bytes * count)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold torch's lock of a result, if it has one.

    Raises:
        OSError: if another process holds it.
    """
    if fcntl is None or not path.exists():
        yield
        return
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
