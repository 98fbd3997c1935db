import os

import pytest

from llamalet import Model, Tokenizer
from llamalet.errors import DataError, DiskError, FormatError, TokenizerError, UsageError
from llamalet.files import MAX_NEW_NAME, check_replaceable, check_writable, replacing


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with replacing(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    with pytest.raises(DataError), replacing(path) as file:
        file.write(b"half")
        raise DataError("the source is bad")
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]


def test_readers_keep_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        with replacing(path) as file:
            file.write(b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(DiskError, match=r"file: cannot be written: No space left on device; free some space"),
        replacing(tmp_path / "file") as file,
    ):
        file.write(b"x")
    assert not list(tmp_path.iterdir())


def test_an_unreadable_source_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"), replacing(tmp_path / "file"):
        open(tmp_path / "gone")


def test_what_cannot_be_written_names_the_file_and_the_reason(tmp_path):
    parent = tmp_path / "parent"
    parent.write_bytes(b"a file")
    for path in (parent / "file", parent / "deep" / "file"):
        with pytest.raises(DiskError, match=r"file: cannot be written: \w[\w ]+$"), replacing(path):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError, match="folder: cannot be written: Is a directory$"), replacing(tmp_path / "folder"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "parent"]


def test_whether_a_folder_can_be_written_to_is_known_without_a_trace(tmp_path):
    check_writable(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    for folder in ("file", "file/deeper"):
        with pytest.raises(DiskError, match=f"{folder}: cannot be written to: .*file: not a folder"):
            check_writable(tmp_path / folder)


@pytest.mark.parametrize("check", [check_writable, check_replaceable])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a\nb", r"a\\nb': has a control character in its name"),
        ("a\0b", r"a\\x00b': has a control character"),
        ("a\x1b[31m/b", r"a\\x1b\[31m/b': has a control character"),
        ("x" * (MAX_NEW_NAME + 1), "x{40}...: is a name of 221 bytes; the most is 220; choose a shorter name"),
        ("\u4e00" * 80 + "/b", "is a name of 240 bytes"),
    ],
)
def test_a_name_that_is_none_is_refused_before_work(tmp_path, check, name, words):
    with pytest.raises(UsageError, match=words):
        check(tmp_path / name)


def test_the_longest_name_has_room_beside_it(tmp_path):
    path = tmp_path / ("x" * (MAX_NEW_NAME - 4) + ".bin")
    check_replaceable(path)
    with replacing(path):
        pass
    with replacing(path.with_suffix(".generation_config.json")):
        pass


def test_what_is_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError, match="folder: is in the place of a file that is to be written; move it away"):
        check_replaceable(tmp_path / "folder")


def test_a_full_disk_is_found_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "wb", buffering=0))
    if os.path.exists("/dev/full"):
        with pytest.raises(DiskError, match="cannot be written to: .*: No space left on device"):
            check_writable(tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that cannot be read")
def test_a_file_that_the_system_does_not_read_is_refused():
    for load in (Model.load, Tokenizer.load):
        with pytest.raises((FormatError, TokenizerError), match="/proc/self/mem: cannot be read: Input/output error"):
            load("/proc/self/mem")
