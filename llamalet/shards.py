"""Token shards: the prepared data that training and evaluation read.

A folder of prepared data holds raw little-endian token files (train_00000.bin, ..., val_00000.bin), the tokenizer that
made them, and meta.json, which describes them. Each document starts with BOS; ids are uint16, or uint32 if the
vocabulary has more than 65536 tokens. A folder without meta.json is unfinished.
"""

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from llamalet import strict
from llamalet.checks import file_path
from llamalet.config import CAPS
from llamalet.errors import DataError
from llamalet.files import replacing, sha256_of

DATA_ROOT = "data"
META_FILE = "meta.json"
META_FORMAT = "llamalet shards"
META_VERSION = 1
META_FIELDS = ("bos_id", "eos_id", "vocab_size", "tokenizer", "tokenizer_sha256")
SPLITS = ("train", "val")

Ids = NDArray[np.integer[Any]]


class TokenBlock(NamedTuple):
    """Encoded documents, to be written into a shard."""

    ids: Ids
    """Token ids, with a BOS at the start of each document: (n,)."""
    documents: int
    """Number of documents that start here."""
    text_bytes: int
    """Bytes of their texts in UTF-8."""
    unknown_tokens: int = 0
    """Number of tokens that stand for text outside the vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One token file, as meta.json lists it."""

    file: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str
    unknown_tokens: int = 0
    """Number of tokens that stand for text outside the vocabulary; not listed if there are none."""

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of meta.json."""
        entry = dataclasses.asdict(self)
        if not self.unknown_tokens:
            del entry["unknown_tokens"]
        return entry


@dataclass(frozen=True, slots=True)
class Split:
    """The shards of the training or the validation documents, in reading order."""

    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens, every BOS included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of the documents' texts in UTF-8: the divisor of bits per byte."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def unknown_tokens(self) -> int:
        """Number of tokens that stand for text outside the vocabulary, which no model can learn from them."""
        return sum(shard.unknown_tokens for shard in self.shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entropy:
    """The loss on the validation documents of a model that knows their true distribution: no model can do better.

    A document's tokens are counted as a model predicts them: without its own BOS, with the BOS that follows it.
    """

    stories: int
    nats_per_token: float
    bits_per_byte: float
    bits_per_story: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """The contents of meta.json."""

    source: str
    """The user's name for where the documents came from."""
    recipe: Mapping[str, Any]
    """What else determines the shards' bytes: digest of the source, document rule, validation fraction, ..."""
    bos_id: int
    eos_id: int
    vocab_size: int
    tokenizer: str
    """File name of the tokenizer in the same folder."""
    tokenizer_sha256: str
    """Digest of the vocabulary (Tokenizer.sha256), which model files and checkpoints record too."""
    splits: Mapping[str, Split]
    entropy: Entropy | None = None

    def __post_init__(self) -> None:
        """Refuse ids outside the vocabulary, a missing split, and a tokenizer outside the folder."""
        problems = [f"splits.{name} is missing" for name in SPLITS if name not in self.splits]
        if not 1 <= self.vocab_size <= CAPS["vocab_size"]:
            problems.append(f"vocab_size={self.vocab_size}: must be in 1..{CAPS['vocab_size']}")
        for name in ("bos_id", "eos_id"):
            if not 0 <= (id := getattr(self, name)) < self.vocab_size:
                problems.append(f"{name}={id}: must be below vocab_size={self.vocab_size}")
        if not strict.is_file_name(self.tokenizer):
            problems.append(f"tokenizer={reprlib.repr(self.tokenizer)}: must be the name of a file in the same folder")
        if problems:
            raise DataError("; ".join(problems))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids in the shards."""
        return id_dtype(self.vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of meta.json."""
        splits = {
            name: {
                "tokens": split.tokens,
                "documents": split.documents,
                "text_bytes": split.text_bytes,
                "shards": [shard.to_dict() for shard in split.shards],
            }
            for name, split in self.splits.items()
        }
        entropy = dataclasses.asdict(self.entropy) if self.entropy else None
        first = {"format": META_FORMAT, "version": META_VERSION, "source": self.source, "recipe": dict(self.recipe)}
        rest = {name: getattr(self, name) for name in META_FIELDS}
        return first | {"dtype": self.dtype.name} | rest | {"splits": splits, "entropy": entropy}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], name: str) -> Self:
        """Invert `to_dict`.

        Args:
            table: the JSON object.
            name: where it is from, for messages.

        Raises:
            DataError: if a field is missing, of the wrong type, or contradicts another.
        """
        if table.get("format") != META_FORMAT or table.get("version") != META_VERSION:
            raise DataError(
                f"{name}: format {reprlib.repr(table.get('format'))} version {reprlib.repr(table.get('version'))}: "
                f"must be {META_FORMAT!r} version {META_VERSION}; prepare the data again"
            )
        fields = dict(table)
        if isinstance(splits := table.get("splits"), dict):  # their sums follow from the shards, and are compared below
            fields["splits"] = {
                name: {key: value for key, value in split.items() if key == "shards"}
                if isinstance(split, dict)
                else split
                for name, split in splits.items()
            }
        meta = strict.build(cls, fields, name, DataError, ignore_unknown=True)
        for key, value in meta.to_dict().items():
            if key not in table:
                raise DataError(f"{name}: {key} is missing")
            if table[key] != value:
                raise DataError(f"{name}: {key}={reprlib.repr(table[key])}: the other fields make it {value!r}")
        return meta


class TokenArray:
    """The tokens of one split as one long array, memory-mapped across its shards.

    `len(tokens)` counts them; `tokens[a:b]` copies a range, across shards, into an int64 array (b - a,); an id outside
    the vocabulary is a DataError.
    """

    def __init__(self, paths: Iterable[Path], vocab_size: int) -> None:
        self._vocab_size, self._paths = vocab_size, list(paths)
        dtype = id_dtype(vocab_size).newbyteorder("<")
        self._maps = [np.memmap(path, dtype=dtype, mode="r") for path in self._paths]
        self._ends = np.cumsum([0] + [len(tokens) for tokens in self._maps])  # shard i begins at _ends[i]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, where: slice) -> NDArray[np.int64]:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise IndexError(f"step {step}: tokens are read in order, without steps")
        out = np.empty(max(stop - start, 0), dtype=np.int64)
        done = 0
        shard = int(np.searchsorted(self._ends, start, side="right")) - 1
        while done < len(out):
            skip = start + done - int(self._ends[shard])
            part = self._maps[shard][skip : skip + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        if len(out) and out.max() >= self._vocab_size:
            raise DataError(
                f"{self._paths[0].parent}: token {out.max()} of {start}..{stop} is outside the vocabulary of "
                f"{self._vocab_size}: a shard is damaged; prepare the data again"
            )
        return out

    def document_starts(self, bos_id: int) -> NDArray[np.int64]:
        """Return the position of every BOS, where a document starts: int64 (documents,)."""
        starts = [
            np.flatnonzero(tokens == bos_id) + begin for tokens, begin in zip(self._maps, self._ends, strict=False)
        ]
        return np.concatenate(starts).astype(np.int64)


class Shards:
    """A folder of prepared data, checked and open for reading.

    Attributes:
        folder: its path.
        meta: the contents of its meta.json.
    """

    def __init__(self, folder: Path, meta: Meta) -> None:
        self.folder = folder
        self.meta = meta

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Self:
        """Open prepared data.

        Args:
            folder: the folder that holds meta.json.
            verify: whether to read every shard and compare its sha256; sizes are always compared.

        Raises:
            DataError: if something is missing, damaged or contradicts meta.json.
        """
        folder = file_path("folder", folder)
        meta = read_meta(folder / META_FILE)
        for name in SPLITS:
            for shard in meta.splits[name].shards:
                check_shard(folder, shard, meta.dtype, verify=verify)
        return cls(folder, meta)

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary; every id is below it."""
        return self.meta.vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        """Digest of the vocabulary."""
        return self.meta.tokenizer_sha256

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.folder / self.meta.tokenizer

    def split(self, name: str) -> TokenArray:
        """Map the tokens of the split `name`: train or val.

        Raises:
            DataError: if there is no such split, or it is empty.
        """
        if name not in self.meta.splits or not self.meta.splits[name].shards:
            raise DataError(f"{self.folder}: no tokens for split {name!r}; prepare the data again")
        return TokenArray((self.folder / shard.file for shard in self.meta.splits[name].shards), self.vocab_size)

    def document_starts(self, name: str) -> NDArray[np.int64]:
        """Return where the documents of the split `name` start in its tokens: int64 (documents,)."""
        return self.split(name).document_starts(self.meta.bos_id)


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that shards use for ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def find_newest(root: str | Path = DATA_ROOT, *, tokenizer_sha256: str | None = None) -> Path | None:
    """Return the most recently prepared folder of data below `root`, or None if there is none.

    Args:
        root: the folder, or one above it.
        tokenizer_sha256: only consider data of this vocabulary.
    """
    metas = sorted(file_path("root", root).glob(f"**/{META_FILE}"), key=lambda path: (path.stat().st_mtime_ns, path))
    if tokenizer_sha256 is not None:
        metas = [path for path in metas if _vocabulary_of(path) == tokenizer_sha256]
    return metas[-1].parent if metas else None


def _vocabulary_of(path: Path) -> str | None:
    """Return the digest of the vocabulary in meta.json, or None if the file is not valid."""
    try:
        return read_meta(path).tokenizer_sha256
    except DataError:
        return None


def read_meta(path: Path) -> Meta:
    """Read meta.json.

    Raises:
        DataError: if it is missing or not valid.
    """
    missing = "not found; `python tinystories.py --help` explains how to prepare data"
    return Meta.from_dict(strict.read_json(path, DataError, missing), str(path))


def write_meta(path: Path, meta: Meta) -> None:
    """Write meta.json, which declares the shards in its folder finished."""
    with replacing(path) as file:
        file.write((json.dumps(meta.to_dict(), indent=2) + "\n").encode())


def check_shard(folder: Path, shard: Shard, dtype: np.dtype[Any], *, verify: bool) -> None:
    """Compare a shard's file with its entry in meta.json.

    Raises:
        DataError: if the file is missing, has another size or (with `verify`) another sha256.
    """
    path = folder / shard.file
    if not strict.is_file_name(shard.file) or not path.is_file():
        raise DataError(f"{path}: shard not found; prepare the data again")
    size, expected = path.stat().st_size, shard.tokens * dtype.itemsize
    if size != expected or not size:
        raise DataError(f"{path}: {size} bytes, must be {expected} and not 0; prepare the data again")
    if verify and (found := sha256_of(path)) != shard.sha256:
        raise DataError(f"{path}: sha256 is {found}, must be {shard.sha256}; prepare the data again")


def write_shard(path: Path, blocks: Iterable[TokenBlock], vocab_size: int) -> Shard:
    """Write one token file atomically, block by block.

    Args:
        path: the file to write.
        blocks: encoded documents; only one block is held at a time.
        vocab_size: every id must be below it.

    Returns:
        The file's entry for meta.json.

    Raises:
        DataError: if there are no tokens, or an id is outside the vocabulary.
        DiskError: if the disk is full or fails.
    """
    dtype = id_dtype(vocab_size).newbyteorder("<")
    digest = hashlib.sha256()
    tokens = documents = text_bytes = unknown_tokens = 0
    with replacing(path) as file:
        for block in blocks:
            if len(block.ids) and not 0 <= int(block.ids.min()) <= int(block.ids.max()) < vocab_size:
                raise DataError(f"{path}: token id {block.ids.max()} (or below 0) outside the {vocab_size} tokens")
            data = block.ids.astype(dtype).tobytes()
            digest.update(data)
            file.write(data)
            tokens += len(block.ids)
            documents += block.documents
            text_bytes += block.text_bytes
            unknown_tokens += block.unknown_tokens
        if not tokens:
            raise DataError(f"{path}: there are no tokens to write")
    return Shard(
        file=path.name, tokens=tokens, documents=documents, text_bytes=text_bytes, sha256=digest.hexdigest(),
        unknown_tokens=unknown_tokens,
    )  # fmt: skip
