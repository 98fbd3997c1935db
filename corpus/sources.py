"""Where text comes from: the user's own files, a source with a name, or a folder filled by a command.

A source is a .txt, .jsonl or .parquet file, a folder of them, a name in NAMED_SOURCES, or a folder below data/ that
`tinystories.py download` or `synthesize` completed and described in source.json. All become a Source: files for
training and, if there are any, for validation.
"""

import hashlib
import heapq
import os
import re
import shlex
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from corpus import tinyshakespeare
from corpus.record import RECORD_FILE, Record
from llamalet.errors import DataError
from llamalet.files import CONTROL, sha256_of

# To add a source: write a file like tinyshakespeare.py, whose function puts the text into data_dir/NAME and describes
# it in source.json unless that is done already, and enter it here under NAME.
NAMED_SOURCES: Mapping[str, Callable[[Path], Record]] = {
    "tinyshakespeare": tinyshakespeare.make_source,
}
DEFAULT_SOURCE = "roneneldan/TinyStories"
SYNTHETIC = "synthetic"
SUFFIXES = (".txt", ".jsonl", ".parquet")
VALIDATION_NAME = re.compile(r"(^|[^a-z])(val|valid|validation)([^a-z]|$)", re.IGNORECASE)
HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files to read documents from.

    Attributes:
        label: the user's name for it.
        folder: data_dir/NAME, where its vocabularies and prepared data go.
        files: the files of each split; without "val", validation documents are taken from the training files.
        record: its source.json, if it has one.
        notes: lines about what was left out.
    """

    label: str
    folder: Path
    files: Mapping[str, tuple[Path, ...]]
    record: Record | None = None
    notes: tuple[str, ...] = ()

    @property
    def entropy_nats(self) -> float | None:
        """Total -log probability of all validation documents, if known."""
        return self.record.entropy["nats"] if self.record and self.record.entropy else None

    def digest(self) -> str:
        """Return a sha256 over the names and contents of all files.

        Raises:
            DataError: if a file differs from what source.json says.
        """
        whole = hashlib.sha256()
        for split in sorted(self.files):
            recorded = self.record.files[split] if self.record else [None] * len(self.files[split])
            for path, entry in zip(self.files[split], recorded, strict=True):
                found = sha256_of(path)
                if entry is not None and found != entry.sha256:
                    raise DataError(
                        f"{path}: sha256 is {found}, must be {entry.sha256}; delete the {RECORD_FILE} next to it"
                        " and make the source again"
                    )
                whole.update(f"{split} {path.name} {found}\n".encode(errors="surrogateescape"))
        return whole.hexdigest()


def open_source(label: str | None, data_dir: Path) -> Source:
    """Find a source; one of NAMED_SOURCES is downloaded if necessary.

    Args:
        label: a file, a folder, a name in NAMED_SOURCES, the ID of a downloaded Hub dataset, or a folder of data_dir
            with a source.json. None is TinyStories, or the synthetic stories if only they exist.
        data_dir: the folder of downloaded, synthetic and prepared data.

    Raises:
        DataError: if there is no such source, or it is incomplete.
    """
    if label is None:
        tinystories, synthetic = folder_of(DEFAULT_SOURCE, data_dir), data_dir / SYNTHETIC
        only_synthetic = (synthetic / RECORD_FILE).is_file() and not (tinystories / RECORD_FILE).is_file()
        label = SYNTHETIC if only_synthetic else DEFAULT_SOURCE
    if not label:
        raise DataError("--source=: is empty; give a file, a folder or the ID of a Hub dataset")
    if label in NAMED_SOURCES:
        NAMED_SOURCES[label](data_dir)
    path = Path(label)
    for folder in (data_dir / label, path):
        if (record := Record.read(folder)) is not None:
            return _recorded(record, folder, data_dir / folder.resolve().name)
    if path.exists():
        return _local(path, data_dir)
    if path.suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(label):
        raise DataError(f"--source={label}: no such file or folder")
    folder = folder_of(label, data_dir)
    record = Record.read(folder)
    if record is None:
        option = "" if label == DEFAULT_SOURCE else f" --source={shlex.quote(label)}"
        raise DataError(
            f"{label}: not downloaded yet; type: python tinystories.py download{option}"
            "  (without a network: python tinystories.py synthesize)"
        )
    check_label(folder, record, label)
    return _recorded(record, folder, folder)


def check_label(folder: Path, record: Record, label: str) -> None:
    """Raise a DataError if `folder` holds another source of the same name."""
    if record.source != label:
        raise DataError(f"{folder}: holds {record.source}, not {label}; delete it or choose another --data-dir")


def folder_of(hub_id: str, data_dir: Path) -> Path:
    """Return the folder for a Hub dataset ID or ID:CONFIG: data_dir/NAME or data_dir/NAME-CONFIG."""
    return data_dir / hub_id.rpartition("/")[2].replace(":", "-")


def _recorded(record: Record, files_in: Path, folder: Path) -> Source:
    """Return the source described by the source.json in `files_in`."""
    files: dict[str, tuple[Path, ...]] = {}
    for split, entries in record.files.items():
        files[split] = tuple(files_in / entry.file for entry in entries)
        for path, entry in zip(files[split], entries, strict=True):
            size = path.stat().st_size if path.is_file() else "missing: 0"
            if size != entry.bytes:
                raise DataError(f"{path}: {size} bytes, must be {entry.bytes}; make or download the source again")
    return Source(label=record.source, folder=folder, files=files, record=record)


def _local(path: Path, data_dir: Path) -> Source:
    """Return the source of a file, or of all files with a known suffix in a folder and its subfolders."""
    if not path.is_dir():
        if not path.is_file():
            raise DataError(
                f"{path}: is a pipe or a device, and a source is read more than once; save its content to a file first"
            )
        if path.suffix.lower() not in SUFFIXES:
            array = f"; a JSON array becomes one with: jq -c '.[]' {shlex.quote(str(path))} > {path.stem}.jsonl"
            hint = array if path.suffix.lower() == ".json" else ""
            raise DataError(f"{path}: a source must be {', '.join(SUFFIXES)}, or a folder of such files{hint}")
        return Source(label=path.as_posix(), folder=data_dir / _folder_name(path.stem), files={"train": (path,)})
    files: dict[str, tuple[Path, ...]] = {"train": ()}
    found, notes = find_files(path)
    for file in found:
        split = "val" if VALIDATION_NAME.search(file.relative_to(path).as_posix()) else "train"
        files[split] = (*files.get(split, ()), file)
    if not files["train"]:
        raise DataError("; ".join([f"{path}: no {', '.join(SUFFIXES)} file to train on in this folder", *notes]))
    folder = data_dir / _folder_name(path.resolve().name)
    return Source(label=path.as_posix(), folder=folder, files=files, notes=tuple(notes))


def _folder_name(name: str) -> str:
    """Return the name of a source's folder in data_dir, which, unlike the source's, must be valid text in a line."""
    return CONTROL.sub("\ufffd", os.fsencode(name).decode(errors="replace")) or "root"


def find_files(root: Path) -> tuple[list[Path], list[str]]:
    """Return the text files below a folder, ordered by path, and notes on what was left out.

    What is hidden below the folder is left out: copies that editors keep, version control, caches. Links are followed
    after everything else, so one to what is there anyway adds nothing. Pipes, devices and broken links are left out.

    Raises:
        DataError: if a folder cannot be read.
    """
    found: list[Path] = []
    hidden: list[Path] = []
    repeated: list[Path] = []
    odd: list[Path] = []
    seen: set[tuple[int, int]] = set()
    waiting = [(False, root)]  # (whether a link led there, path): what no link leads to comes first
    while waiting:
        linked, path = heapq.heappop(waiting)
        try:
            status = path.stat()
            entries = [*os.scandir(path)] if stat.S_ISDIR(status.st_mode) else None
        except OSError as error:
            if not path.is_symlink():
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None
            odd.append(path)
            continue
        if entries is None and path.suffix.lower() not in SUFFIXES:
            continue
        identity = status.st_dev, status.st_ino
        if entries is None and not stat.S_ISREG(status.st_mode):
            odd.append(path)
        elif identity in seen and (linked or entries is not None):
            repeated.append(path)
        elif entries is None:
            found.append(path)
        else:
            for entry in entries:
                below = path / entry.name
                if not entry.name.startswith("."):
                    heapq.heappush(waiting, (linked or entry.is_symlink(), below))
                elif entry.is_dir() or below.suffix.lower() in SUFFIXES:
                    hidden.append(below)
        seen.add(identity)
    left_out = {"hidden": hidden, "linked to what is read anyway": repeated, "neither file nor folder": odd}
    return sorted(found), [
        f"left out: {len(paths)} {why}, the first: {in_one_line(min(paths))}"
        for why, paths in left_out.items()
        if paths
    ]


def in_one_line(path: object) -> str:
    """Return a path for a line of output; names may contain line ends."""
    return str(path) if str(path).isprintable() else repr(str(path))
