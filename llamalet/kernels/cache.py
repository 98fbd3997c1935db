"""The cache of compiled kernels on disk, so that only the first start on a machine has to compile.

Numba stores the machine code, but it checks only the file of the function that it stores: after an edit of simd.py it
would run the old kernels. So the folder's name identifies what the code was made from: a hash of the environment
(numba, llvmlite, the processor, the instructions used, bounds checks) and one of our sources. Numba runs the stored
code without checking it, so the folder must belong to the user and nobody else may be able to write to it.
"""

import contextlib
import functools
import gc
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from llamalet import kv_kinds
from llamalet.errors import note
from llamalet.files import home_folder
from llamalet.kernels import bfloat16, simd
from llamalet.model_file import quantize

# The files that machine code is made from: this folder, that of training, and the layouts of packed matrices and of KV
# caches.
FOLDERS = Path(__file__).parent, Path(__file__).parents[1] / "backward"
SOURCES = (
    *(source for folder in FOLDERS for source in sorted(folder.glob("*.py"))),
    Path(quantize.__file__),
    Path(kv_kinds.__file__),
)

PRIVATE = 0o700

# Several checkouts and settings may be in use, each with a folder; older ones are removed.
KEPT_FOLDERS = 8


def enable(kernel: Any) -> bool:
    """Let a kernel be stored and found on disk; without a usable folder it is compiled in every process.

    Returns:
        Whether there is a folder.
    """
    folder = _folder_in(tuple(roots()))
    if folder is not None:
        kernel._cache = KernelCache(kernel.py_func, folder)
    return folder is not None


def holds(kernel: Any) -> bool:
    """Return whether code of a kernel is stored, for arguments of whatever types."""
    return isinstance(kernel._cache, KernelCache) and kernel._cache.has_index()


@functools.cache
def _folder_in(candidates: tuple[Path, ...]) -> Path | None:
    """Return the folder of this process's kernels, the same for all of them; see open_folder."""
    return open_folder(candidates, folder_name(SOURCES))


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Compile without Python's collector of cycles, which would go through numba's many objects again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def roots() -> Iterator[Path]:
    """Yield the folders that may hold the cache, the best first: the user's, then a temporary one."""
    variable, below = "XDG_CACHE_HOME", ".cache"
    if sys.platform == "win32":
        variable, below = "LOCALAPPDATA", "AppData/Local"
    elif sys.platform == "darwin":
        variable, below = "", "Library/Caches"
    named, home = Path(os.environ.get(variable, "")), home_folder()
    if named.is_absolute():  # the others are to be ignored, say the rules for XDG_CACHE_HOME
        yield named / "llamalet"
    elif home is not None:
        yield home / below / "llamalet"
    with contextlib.suppress(FileNotFoundError):  # no temporary folder can be written to
        yield Path(tempfile.gettempdir()) / f"llamalet-{os.getuid() if hasattr(os, 'getuid') else 'kernels'}"


def folder_name(sources: Iterable[Path]) -> str:
    """Return ENVIRONMENT-SOURCES, hashes of everything that the machine code depends on."""
    config = numba.config
    features = llvmlite.binding.get_host_cpu_features().flatten()
    environment = (
        numba.__version__, llvmlite.__version__, config.CPU_NAME or llvmlite.binding.get_host_cpu_name(),
        config.CPU_FEATURES or features, simd.instruction_path(), bfloat16.instructions(), config.BOUNDSCHECK,
        config.OPT,
    )  # fmt: skip
    code = hashlib.sha256()
    for source in sources:
        code.update(hashlib.sha256(source.read_bytes()).digest())
    return f"{hashlib.sha256(repr(environment).encode()).hexdigest()[:16]}-{code.hexdigest()[:16]}"


def open_folder(candidates: Iterable[Path], name: str) -> Path | None:
    """Create the folder `name` in the first safe candidate, and remove all but the KEPT_FOLDERS last used there.

    Args:
        candidates: folders to hold it, the best first.
        name: from folder_name.

    Returns:
        The folder, or None if no candidate can be used; a line on stderr says why the best one is not.
    """
    reasons = []
    for root in candidates:
        folder = root / name
        try:
            for path in (root, folder):
                path.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
                check_private(path)
            os.utime(folder)
        except OSError as error:
            reasons.append(f"{error.filename or folder}: {error.strerror}")
            continue
        if reasons:
            _say(f"kernel cache: {'; '.join(reasons)}; taking {root}")
        with contextlib.suppress(OSError):  # another process may be removing them too
            used = sorted((path.stat().st_mtime, path) for path in root.iterdir() if path.is_dir())
            for _, old in used[:-KEPT_FOLDERS]:
                shutil.rmtree(old, ignore_errors=True)
        return folder
    why = "; ".join(reasons) or "neither a home directory nor one for temporary files"
    _say(f"kernel cache: {why}; the kernels are compiled at every start")
    return None


def check_private(folder: Path) -> None:
    """Check that nobody but this user can have written to a folder.

    Raises:
        PermissionError: if it is a link, another user's, or writable by others.
    """
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(0, "not a folder", str(folder))
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise PermissionError(0, f"belongs to another user ({status.st_uid})", str(folder))
    if os.name != "nt" and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(0, "others may write to it (chmod go-w)", str(folder))


class KernelCache(FunctionCache):
    """Numba's cache in our folder. It reports when kernels must be compiled, and a broken disk only costs time."""

    def __init__(self, py_func: Any, folder: Path) -> None:
        self._impl_class = functools.partial(_Impl, folder=folder)
        super().__init__(py_func)

    def has_index(self) -> bool:
        """Return whether anything has been stored."""
        return Path(self._cache_file._index_path).exists()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the stored code for a signature, or None."""
        found = None
        try:
            # Numba's own function first loads all that compiling needs, which takes longer than all else here.
            with self._guard_against_spurious_io_errors():
                found = self._load_overload(sig, target_context)
            # Numba writes its index before the code: two processes at once may have exchanged what they wrote.
            if found is not None and tuple(found.signature.args) != tuple(sig):
                found = None
                raise ValueError("code for other arguments")
        except Exception as error:  # a damaged file may fail in any way
            _say(f"kernel cache: {self.cache_path}: damaged ({error or type(error).__name__})")
            with contextlib.suppress(OSError):
                self.flush()
        if found is not None:  # a kernel that calls this one is to be loaded like it, see shared.py
            found.library._reload_init.update(found.reload_init)
        else:
            _say_once(
                "compiling the kernels for this processor (5 to 10 s, to train half a minute; "
                "later starts find them done)"
            )
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Store the code for a signature."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            why = f"{self.cache_path}: {error.strerror}"  # a full disk has no file's name
            _say_once(f"kernel cache: {why}; the kernels will be compiled again next time")


class _Impl(CompileResultCacheImpl):
    """Tells numba where the files are: in our folder, whose name is also their version."""

    def __init__(self, py_func: Any, folder: Path) -> None:
        self._folder = folder
        self._locator_classes = [self]
        super().__init__(py_func)

    def from_function(self, py_func: Any, py_file: str) -> Any:
        return self

    def ensure_cache_path(self) -> None:
        self._folder.mkdir(mode=PRIVATE, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return self._folder.name

    def get_disambiguator(self) -> str:
        return "kernels"


def _say(message: str) -> None:
    """Print a line on stderr."""
    note(f"llamalet: {message}")


_say_once = functools.cache(_say)
