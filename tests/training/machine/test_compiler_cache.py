"""torch.compile's cache: a folder that cannot be used, and what a killed run left in it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llamalet.errors import ConfigError
from training.machine import compiler_cache, hardware


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The bytes of a library as the machine's own linker writes it."""
    compiler, folder = shutil.which("cc"), tmp_path_factory.mktemp("library")
    if compiler is None or os.uname().sysname != "Linux":
        pytest.skip("needs Linux and a C compiler")
    (folder / "a.c").write_text("int f(int x) { return x + 1; }")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "a.so", "a.c"], cwd=folder, check=True)
    return (folder / "a.so").read_bytes()


def test_torch_s_compiler_gets_a_temporary_folder_if_its_own_cannot_be_made(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(compiler_cache.VARIABLE, str(tmp_path / "file" / "cache"))
    compiler_cache.ensure_folder()
    assert Path(os.environ[compiler_cache.VARIABLE]).is_dir()
    assert "Not a directory; taking a temporary folder" in capsys.readouterr().err
    monkeypatch.setenv(compiler_cache.VARIABLE, str(tmp_path / "cache"))
    compiler_cache.ensure_folder()
    assert os.environ[compiler_cache.VARIABLE] == str(tmp_path / "cache") and not capsys.readouterr().err


def test_only_what_ends_too_early_is_removed(library, tmp_path):
    results, others = tmp_path / "ab", tmp_path / "python"
    for folder in (results, others, tmp_path / "locks"):
        folder.mkdir()
    for name, end in {"whole": len(library), "short": -1, "half": len(library) // 2, "header": 20, "empty": 0}.items():
        (results / f"cab{name}.main.so").write_bytes(library[:end])
    (results / "cab.main.cpp").write_text("int x;")
    (results / "cab.py").touch()
    # torch's locks are empty, and so are the beginning of a file and what others keep there.
    kept = {"cab.lock", ".1.2.tmp", "__init__.py", "notes.py"}
    for name, folder in zip(sorted(kept), (results, others, tmp_path / "locks", results), strict=True):
        (folder / name).touch()
    compiler_cache.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.glob("*/*")} == {*kept, "cab.main.cpp", "cabwhole.main.so"}


def test_what_another_process_writes_is_left(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "locks").mkdir()
    (tmp_path / "ey").mkdir()
    written = tmp_path / "ey" / "key.main.so"
    written.touch()
    with (tmp_path / "locks" / "key.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compiler_cache.remove_unfinished(tmp_path)
        assert written.exists()
    compiler_cache.remove_unfinished(tmp_path)
    assert not written.exists()


def test_a_compiler_that_fails_is_said_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv(compiler_cache.VARIABLE, str(tmp_path))

    def fail(*_):
        raise ImportError("half.so: file too short")

    with pytest.raises(ConfigError, match="file too short; remove .*--compile=False") as raised:
        with hardware.compiler_errors():
            torch.compile(lambda x: x + 1, backend=fail)(torch.zeros(1))
    assert str(tmp_path) in str(raised.value)
