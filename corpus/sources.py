"""Where text comes from: files of the user's, or a folder below data/ that one of this project's commands filled.

A source is a .txt, .jsonl or .parquet file, a folder of them, or a folder that `tinystories.py download` or
`synthesize` declared complete in its source.json. From here on they are all the same: files for training and, perhaps,
for validation.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from llamalet.errors import DataError
from llamalet.files import replacing

DEFAULT_SOURCE = "roneneldan/TinyStories"
SYNTHETIC = "synthetic"
RECORD_FILE = "source.json"
RECORD_FORMAT = "llamalet source"
RECORD_VERSION = 1
SUFFIXES = (".txt", ".jsonl", ".parquet")
VALIDATION_NAME = re.compile(r"(^|[^a-z])(val|valid|validation)([^a-z]|$)", re.IGNORECASE)
HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


class RecordedFile(NamedTuple):
    """A file as source.json lists it."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """The contents of source.json: the source is complete, and these are its files."""

    source: str
    revision: str | None = None
    files: Mapping[str, tuple[RecordedFile, ...]]
    """Files per split, relative to the folder of source.json."""
    entropy: Mapping[str, Any] | None = None
    """For the synthetic source, of the validation stories: how many there are, and their -log probability in nats."""

    def write(self, folder: Path) -> None:
        """Declare the source in `folder` complete."""
        files = {split: [entry._asdict() for entry in entries] for split, entries in self.files.items()}
        table = {"format": RECORD_FORMAT, "version": RECORD_VERSION, **dataclasses.asdict(self), "files": files}
        with replacing(folder / RECORD_FILE) as file:
            file.write((json.dumps(table, indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the record in `folder`, None where there is none.

        Raises:
            DataError: if it cannot be understood.
        """
        path = folder / RECORD_FILE
        try:
            table = json.loads(path.read_bytes())
            files = {name: tuple(RecordedFile(**entry) for entry in table["files"][name]) for name in table["files"]}
            if table["format"] != RECORD_FORMAT or table["version"] != RECORD_VERSION or not files["train"]:
                raise ValueError("another format or version, or no training files")
            return cls(source=table["source"], revision=table["revision"], files=files, entropy=table["entropy"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not readable ({error}); delete it and make the source again") from None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files to read documents from.

    Attributes:
        label: what the user calls it.
        folder: data_dir/NAME, where its vocabularies and prepared data go.
        files: the files per split; without "val", validation documents are taken from the training files.
        record: what source.json says, for a source that has one.
    """

    label: str
    folder: Path
    files: Mapping[str, tuple[Path, ...]]
    record: Record | None = None

    @property
    def has_val(self) -> bool:
        """Whether the source has validation files of its own."""
        return "val" in self.files

    @property
    def entropy_nats(self) -> float | None:
        """The -log probability of all validation documents, where it is known."""
        return self.record.entropy["nats"] if self.record and self.record.entropy else None

    def digest(self) -> str:
        """Return a sha256 over the names and contents of all files.

        Raises:
            DataError: if a file is not the one that source.json tells of.
        """
        whole = hashlib.sha256()
        for split in sorted(self.files):
            recorded = self.record.files[split] if self.record else [None] * len(self.files[split])
            for path, entry in zip(self.files[split], recorded, strict=True):
                found = sha256_of(path)
                if entry is not None and found != entry.sha256:
                    raise DataError(
                        f"{path}: sha256 is {found}, must be {entry.sha256}; delete {RECORD_FILE} beside it"
                        " and make the source again"
                    )
                whole.update(f"{split} {path.name} {found}\n".encode())
        return whole.hexdigest()


def open_source(label: str | None, data_dir: Path) -> Source:
    """Find a source.

    Args:
        label: a file, a folder, a Hub ID that was downloaded, or the name of a folder of data_dir with a source.json;
            None takes TinyStories, or the synthetic stories where only these are there.
        data_dir: where downloaded, synthetic and prepared data lie.

    Raises:
        DataError: if there is no such source, or it is not complete.
    """
    if label is None:
        tinystories, synthetic = folder_of(DEFAULT_SOURCE, data_dir), data_dir / SYNTHETIC
        only_synthetic = (synthetic / RECORD_FILE).is_file() and not (tinystories / RECORD_FILE).is_file()
        label = SYNTHETIC if only_synthetic else DEFAULT_SOURCE
    if not label:
        raise DataError("--source=: names nothing; give a file, a folder or the ID of a Hub dataset")
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
        option = "" if label == DEFAULT_SOURCE else f" --source={label}"
        raise DataError(
            f"{label}: not downloaded yet; type: python tinystories.py download{option}"
            "  (without a network: python tinystories.py synthesize)"
        )
    if record.source != label:
        raise DataError(f"{folder}: holds {record.source}, not {label}; delete it or choose another --data-dir")
    return _recorded(record, folder, folder)


def folder_of(hub_id: str, data_dir: Path) -> Path:
    """Return the folder for a Hub dataset ID or ID:CONFIG: data_dir/NAME or data_dir/NAME-CONFIG."""
    return data_dir / hub_id.rpartition("/")[2].replace(":", "-")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded(record: Record, files_in: Path, folder: Path) -> Source:
    """Return the source whose source.json lies in `files_in`."""
    files: dict[str, tuple[Path, ...]] = {}
    for split, entries in record.files.items():
        files[split] = tuple(files_in / entry.file for entry in entries)
        for path, entry in zip(files[split], entries, strict=True):
            size = path.stat().st_size if path.is_file() else "missing: 0"
            if size != entry.bytes:
                raise DataError(f"{path}: {size} bytes, must be {entry.bytes}; make or download the source again")
    return Source(label=record.source, folder=folder, files=files, record=record)


def _local(path: Path, data_dir: Path) -> Source:
    """Return the source of a file, or of all files of the known kinds in a folder and its subfolders."""
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: a source must be {', '.join(SUFFIXES)}, or a folder of such files")
        return Source(label=path.as_posix(), folder=data_dir / path.stem, files={"train": (path,)})
    files: dict[str, tuple[Path, ...]] = {"train": ()}
    for found in sorted(path.rglob("*")):
        if found.suffix.lower() in SUFFIXES and found.is_file():
            split = "val" if VALIDATION_NAME.search(found.relative_to(path).as_posix()) else "train"
            files[split] = (*files.get(split, ()), found)
    if not files["train"]:
        raise DataError(f"{path}: no {', '.join(SUFFIXES)} file to train on in this folder")
    return Source(label=path.as_posix(), folder=data_dir / path.resolve().name, files=files)
