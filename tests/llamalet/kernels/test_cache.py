import errno
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from llamalet import kv_kinds
from llamalet.kernels import cache
from llamalet.model_file import quantize

posix = pytest.mark.skipif(os.name == "nt", reason="owners and modes are POSIX's")

# A stand-in for stages.work: compiled in moments, on a copy of the package, so that its sources can be edited.
SCRIPT = """
import sys
from pathlib import Path
import numba
from llamalet.kernels import cache, simd

@numba.njit
def power(x):
    return simd.exp(x)

cache.enable(power)
print(round(power(numba.float32(1)), 3), power.stats.cache_hits.total(), power._cache.cache_path)
"""


def run(package: Path, cache: Path, **environment: str) -> tuple[str, int, Path, str]:
    """Return the result, the number of cache hits, the folder and stderr of SCRIPT in a process of its own."""
    script = package / "script.py"
    script.write_text(SCRIPT)
    variables = os.environ | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(cache / "tmp")} | environment
    (cache / "tmp").mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, script], env=variables, capture_output=True, text=True, check=True)
    result, hits, folder = done.stdout.split()
    return result, int(hits), Path(folder), done.stderr


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of the runtime in it."""
    source = Path(cache.__file__).parents[1]
    shutil.copytree(source, tmp_path / "copy" / "llamalet", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


@pytest.mark.compiles
@posix
def test_compiles_once_and_again_after_an_edit_of_the_intrinsics(package, tmp_path):
    cache = tmp_path / "cache"
    result, hits, first, stderr = run(package, cache)
    assert (result, hits) == ("2.718", 0) and stderr.count("compiling the kernels") == 1
    assert first.is_relative_to(cache / "llamalet") and first.stat().st_mode & 0o777 == 0o700
    assert (cache / "llamalet").stat().st_mode & 0o777 == 0o700
    assert run(package, cache) == ("2.718", 1, first, "")

    simd = package / "llamalet" / "kernels" / "simd.py"
    edited = simd.read_text().replace("return exp_vector(builder, args[0])", "return builder.fadd(args[0], args[0])")
    assert edited != simd.read_text()
    simd.write_text(edited)
    result, hits, second, stderr = run(package, cache)
    assert (result, hits) == ("2.0", 0) and second != first and "compiling" in stderr

    # Another environment has its own folder next to it.
    *_, third, _ = run(package, cache, NUMBA_BOUNDSCHECK="1")
    *_, fourth, _ = run(package, cache, LLAMALET_SIMD="portable")
    assert len({second, third, fourth}) == 3 and second.exists() and third.exists()


def test_the_folders_that_were_used_longest_ago_are_removed(tmp_path):
    (tmp_path / "notes.txt").write_text("not ours to remove")
    names = [f"environment-{number}" for number in range(cache.KEPT_FOLDERS + 3)]
    for age, name in enumerate(names):
        folder = cache.open_folder([tmp_path], name)
        assert folder is not None
        os.utime(folder, (1e9 + age, 1e9 + age))
    cache.open_folder([tmp_path], names[4])  # in use, however old
    cache.open_folder([tmp_path], "environment-new")
    kept = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert kept == {"environment-new", names[4], *names[-(cache.KEPT_FOLDERS - 2) :]}
    assert (tmp_path / "notes.txt").exists()


def test_the_name_depends_on_every_file_of_the_kernels(package):
    """Each file is edited in turn; one that is added counts too."""
    kernels = package / "llamalet" / "kernels"
    (kernels / "added.py").write_text("")
    spec = importlib.util.spec_from_file_location("copied_cache", kernels / "cache.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    files = sorted(kernels.glob("*.py"))
    assert {"stages.py", "ops.py", "simd.py", "llvm.py", "layers.py", "added.py"} < {file.name for file in files}
    names = [copied.folder_name(copied.SOURCES)]
    for file in files:
        file.write_text(file.read_text() + "# edited\n")
        names.append(copied.folder_name(copied.SOURCES))
    assert len(set(names)) == 1 + len(files)
    assert {Path(quantize.__file__), Path(kv_kinds.__file__)} < set(cache.SOURCES)  # which define layouts


def test_the_name_depends_on_where_one_file_ends(tmp_path):
    sources = [tmp_path / name for name in ("a.py", "b.py")]
    names = set()
    for texts in (("xy", ""), ("x", "y"), ("", "xy")):
        for source, text in zip(sources, texts, strict=True):
            source.write_text(text)
        names.add(cache.folder_name(sources))
    assert len(names) == 3


@pytest.mark.compiles
@posix
@pytest.mark.parametrize("damage", ["index", "code"])
def test_a_damaged_file_is_compiled_again(package, tmp_path, damage):
    *_, folder, _ = run(package, tmp_path / "cache")
    for file in folder.glob("*.nbi" if damage == "index" else "*.nbc"):
        file.write_bytes(file.read_bytes()[:40])
    result, hits, _, stderr = run(package, tmp_path / "cache")
    assert (result, hits) == ("2.718", 0) and "compiling" in stderr
    result, hits, _, stderr = run(package, tmp_path / "cache")
    assert (result, hits, stderr) == ("2.718", 1, "")


@pytest.mark.compiles
@posix
def test_code_for_other_arguments_is_compiled_again(tmp_path, capsys):
    """Two processes that write at once may exchange their files of code."""

    def half(x):
        return x / 2

    def compiled():
        kernel = numba.njit(half)
        kernel._cache = cache.KernelCache(half, tmp_path)
        return kernel(np.float32(3)), kernel(np.int8(3))

    assert compiled() == (1.5, 1.5)
    first, second = sorted(tmp_path.glob("*.nbc"))
    shutil.copy(first, second)
    capsys.readouterr()
    assert compiled() == (1.5, 1.5)
    assert "code for other arguments" in capsys.readouterr().err


@posix
@pytest.mark.parametrize("mode", [0o770, 0o702])
@pytest.mark.parametrize("level", ["root", "folder"])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path, capsys, mode, level):
    root, other = tmp_path / "root", tmp_path / "other"
    folder = root / "environment-sources"
    folder.mkdir(parents=True)
    root.chmod(0o700)
    (root if level == "root" else folder).chmod(mode)
    assert cache.open_folder([root, other], folder.name) == other / folder.name
    assert "others may write" in capsys.readouterr().err


@posix
def test_a_link_is_refused(tmp_path, capsys):
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "root").symlink_to(tmp_path / "target")
    assert cache.open_folder([tmp_path / "root"], "environment-sources") is None
    assert "not a folder" in capsys.readouterr().err


@posix
def test_another_users_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(PermissionError, match="another user"):
        cache.check_private(tmp_path)


def test_without_a_usable_folder_kernels_are_compiled_all_the_same(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert cache.open_folder([file / "root"], "environment-sources") is None
    assert str(file) in capsys.readouterr().err
    assert cache.open_folder([], "environment-sources") is None


def test_a_full_disk_is_told_once_and_costs_only_time(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.FunctionCache, "save_overload", full)
    for _ in range(2):
        cache.KernelCache(full, tmp_path / "full").save_overload((), None)
    assert capsys.readouterr().err == (
        f"llamalet: kernel cache: {tmp_path / 'full'}: No space left on device; "
        "the kernels will be compiled again next time\n"
    )
