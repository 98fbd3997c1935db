"""source.json: written last into a source's folder, it says that the source is complete and lists its files."""

import dataclasses
import itertools
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from llamalet import strict
from llamalet.errors import DataError
from llamalet.files import sha256_of, write_file

RECORD_FILE = "source.json"
RECORD_FORMAT = "llamalet source"
RECORD_VERSION = 1


class RecordedFile(NamedTuple):
    """A file as source.json lists it."""

    file: str
    """Its path, relative to the folder of source.json."""
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, folder: Path) -> Self:
        """Describe the file `path`, which is inside `folder`."""
        return cls(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_of(path))


@dataclass(frozen=True, kw_only=True)
class Record:
    """The contents of source.json."""

    source: str
    revision: str | None = None
    files: Mapping[str, tuple[RecordedFile, ...]]
    """The files of each split."""
    entropy: Mapping[str, float] | None = None
    """Synthetic source only: the number of validation stories and their total -log probability in nats."""

    def __post_init__(self) -> None:
        """Refuse a record without training files, with a file outside its folder, or without the whole entropy."""
        if not self.files.get("train"):
            raise DataError("files has no training files")
        for entry in itertools.chain(*self.files.values()):
            if not (parts := Path(entry.file).parts) or not all(map(strict.is_file_name, parts)):
                raise DataError(f"file={reprlib.repr(entry.file)}: must be inside the folder")
        if self.entropy is not None and "nats" not in self.entropy:
            raise DataError("entropy.nats is missing")

    def write(self, folder: Path) -> Self:
        """Declare the source in `folder` complete, and return the record."""
        files = {split: [entry._asdict() for entry in entries] for split, entries in self.files.items()}
        table = {"format": RECORD_FORMAT, "version": RECORD_VERSION, **dataclasses.asdict(self), "files": files}
        write_file(folder / RECORD_FILE, (json.dumps(table, indent=2) + "\n").encode())
        return self

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the record in `folder`, or None if there is none.

        Raises:
            DataError: if it is damaged or of another version.
        """
        path = folder / RECORD_FILE
        if not path.exists():
            return None
        try:
            table = strict.read_json(path, DataError)
            if (table.get("format"), table.get("version")) != (RECORD_FORMAT, RECORD_VERSION):
                raise DataError(f"{path}: of another format or version")
            return strict.build(cls, table, str(path), DataError, ignore_unknown=True)
        except DataError as error:
            raise DataError(f"{error}; delete it and make the source again") from None
