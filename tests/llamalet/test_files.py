import os

import pytest

from llamalet.errors import DataError, DiskError
from llamalet.files import check_writable, replacing


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
        with pytest.raises(DiskError, match=f"{folder}: cannot be written to: .*file: Not a directory"):
            check_writable(tmp_path / folder)
