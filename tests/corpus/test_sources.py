"""Folders as people have them: links, hidden copies, pipes, odd names."""

import os
import socket
from pathlib import Path

import pytest

import tinystories
from corpus import prepare, sources
from corpus.sources import find_files, in_one_line, open_source
from corpus.synthetic import SynthesizeConfig, synthesize
from llamalet.errors import DataError, DiskError, UsageError
from llamalet.shards import Shards, find_newest


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"the text of {name}\n")


def names_in(folder: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_files(Path(folder))[0]]


def notes_on(folder: str) -> list[str]:
    return find_files(Path(folder))[1]


def test_linked_folders_are_followed_once_and_loops_end():
    write("text/a.txt", "text/deep/b.txt", "away/c.txt", "away/deeper/d.txt")
    os.symlink("../away", "text/link")
    os.symlink("../../away", "text/deep/again")
    os.symlink("deep", "text/before")  # before "deep" in the order of paths
    os.symlink("..", "text/deep/up")
    os.symlink("../text", "away/back")
    os.symlink("itself", "text/itself")
    assert names_in("text") == ["a.txt", "deep/again/c.txt", "deep/again/deeper/d.txt", "deep/b.txt"]
    twice, broken = notes_on("text")
    assert twice == "left out: 4 linked to what is read anyway, the first: text/before"
    assert broken == "left out: 1 neither file nor folder, the first: text/itself"


def test_a_link_to_a_file_counts_unless_the_file_is_there_anyway():
    """As in the Hub's cache, whose snapshots are links to blobs."""
    write("hub/blobs/one", "text/a.txt")
    for revision in ("new", "old"):
        Path(f"hub/snapshots/{revision}").mkdir(parents=True)
        os.symlink("../../blobs/one", f"hub/snapshots/{revision}/one.txt")
    assert names_in("hub") == ["snapshots/new/one.txt"]
    os.symlink("a.txt", "text/0.txt")
    os.symlink("gone.txt", "text/broken.txt")
    os.link("text/a.txt", "text/b.txt")  # another name of its own right, as for rsync
    assert names_in("text") == ["a.txt", "b.txt"]
    assert [note.rpartition(": ")[2] for note in notes_on("text")] == ["text/0.txt", "text/broken.txt"]


def test_what_is_hidden_below_the_folder_is_left_out():
    write(
        "home/.cache/x/a.txt", "home/.cache/x/.ipynb_checkpoints/a-checkpoint.txt", "home/.cache/x/deep/.git/b.txt",
        "home/.cache/x/deep/c.txt", "home/.cache/x/._a.txt", "home/.cache/x/.DS_Store", "home/.cache/x/.note.txt",
    )  # fmt: skip
    os.symlink("deep", "home/.cache/x/.link")
    assert names_in("home/.cache/x") == ["a.txt", "deep/c.txt"]
    assert notes_on("home/.cache/x") == ["left out: 5 hidden, the first: home/.cache/x/._a.txt"]
    os.chdir("home/.cache/x")
    assert names_in(".") == ["a.txt", "deep/c.txt"]
    assert open_source(".note.txt", Path("data")).files == {"train": (Path(".note.txt"),)}
    os.chdir(".ipynb_checkpoints")
    assert names_in(".") == ["a-checkpoint.txt"]


def test_pipes_and_sockets_are_left_out_of_a_folder_and_refused_by_name():
    write("text/a.txt")
    os.mkfifo("text/pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("text/socket.jsonl")
        assert names_in("text") == ["a.txt"]
        assert notes_on("text") == ["left out: 2 neither file nor folder, the first: text/pipe.txt"]
        for name in ("text/pipe.txt", "text/socket.jsonl", "/dev/null"):
            with pytest.raises(DataError, match=f"{name}: is a pipe or a device"):
                open_source(name, Path("data"))


def test_the_order_is_that_of_the_paths_whatever_the_file_system_says(monkeypatch):
    write("text/b.txt", "text/a/z.txt", "text/a.txt", "text/a/val/y.txt", "text/B.TXT", "text/no.png")
    scandir = os.scandir
    expected = ["B.TXT", "a/val/y.txt", "a/z.txt", "a.txt", "b.txt"]
    for reverse in (False, True):
        monkeypatch.setattr(
            sources.os,
            "scandir",
            lambda path, reverse=reverse: sorted(scandir(path), key=lambda entry: entry.name, reverse=reverse),
        )
        assert names_in("text") == expected
        files = open_source("text", Path("data")).files
        assert files["val"] == (Path("text/a/val/y.txt"),) and len(files["train"]) == 4


def test_a_folder_that_may_not_be_read_is_told(monkeypatch):
    write("text/a.txt", "text/closed/b.txt")
    scandir = os.scandir

    def refusing(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(sources.os, "scandir", refusing)
    with pytest.raises(DataError, match="text/closed: cannot be read: Permission denied"):
        open_source("text", Path("data"))


def test_only_left_out_files_are_not_an_empty_folder_without_a_word():
    write("text/.hidden/a.txt")
    with pytest.raises(
        DataError, match=r"text: no \.txt.* in this folder; left out: 1 hidden, the first: text/\.hidden"
    ):
        open_source("text", Path("data"))


@pytest.mark.parametrize("name", [b"two\nlines", b"caf\xe9", b"a b'c"])
def test_names_with_line_ends_and_without_encoding(name, capsys):
    odd = os.fsdecode(name)
    os.mkdir(odd)
    os.chdir(odd)
    for number in range(3):
        Path(f"{number}{odd}.txt").write_text("a story about a dog\n" * 30)
    Path(f".{odd}.txt").write_text("hidden")
    assert tinystories.main(["pretokenize", "--source=.", "--document=line", "--vocab-size=280"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("left out: 1 hidden, the first: ")
    folder = find_newest("data")
    assert sum(split.documents for split in Shards.open(folder).meta.splits.values()) == 90
    assert str(folder).encode()  # the folder's name is valid text, whatever the source's is


def test_a_path_fits_into_a_line():
    assert in_one_line(Path("a b\u00e9.txt")) == "a b\u00e9.txt"
    assert "\n" not in in_one_line("a\nb") and in_one_line("a\nb") == r"'a\nb'"


@pytest.mark.parametrize("name", ["a\nb", "x" * 300, "file", "file/x"])
def test_a_place_that_cannot_be_written_is_refused_before_work(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "story.txt").write_text("a text")
    with pytest.raises((DiskError, UsageError), match="control character|a name of 300 bytes|file: not a folder"):
        prepare.find_source(prepare.TextConfig(source=str(tmp_path / "story.txt"), data_dir=tmp_path / name))
    with pytest.raises((DiskError, UsageError)):
        synthesize(SynthesizeConfig(stories=1, data_dir=tmp_path / name), None, lambda n: None)
