"""Documents to token shards: this process reads and writes them in order, worker processes encode.

The text alone decides which shard a document goes into, so the bytes do not depend on the number of workers. Only a few
tasks are in flight at a time, so memory stays flat. Each finished shard is listed in unfinished.json, a preliminary
meta.json: an interrupted command continues from there.
"""

import dataclasses
import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from corpus import documents
from corpus.documents import Piece
from corpus.encode import EncodeTask, encode_pieces
from corpus.workers import Workers
from llamalet import shards
from llamalet.errors import DataError
from llamalet.files import write_file
from llamalet.shards import META_FILE, SPLITS, Entropy, Meta, Shard, Split, TokenBlock
from llamalet.tokenizer import Tokenizer, ids_file

UNFINISHED_FILE = "unfinished.json"
SHARD_CHARS = 32_000_000
TASK_CHARS = 200_000


def pretokenize(
    streams: Mapping[str, Iterable[Piece]],
    folder: Path,
    *,
    source: str,
    recipe: Mapping[str, Any],
    tokenizer: Tokenizer,
    tokenizer_data: bytes,
    entropy_nats: float | None,
    workers: Workers,
    advance: Callable[[int], object],
) -> tuple[Meta, int]:
    """Write a folder of prepared data.

    Args:
        streams: the documents of train and val, in pieces.
        folder: the folder; valid shards in it of the same source, recipe and vocabulary are kept.
        source: the source's name in meta.json.
        recipe: everything else that determines the documents and where they are cut into shards.
        tokenizer: the vocabulary, checked (encode.check_tokenizer).
        tokenizer_data: the bytes of its file, copied into the folder.
        entropy_nats: total -log probability of all validation documents, if known.
        workers: the processes that encode.
        advance: called with the number of characters done.

    Returns:
        The new meta.json, and the number of shards that were kept.

    Raises:
        DataError: if the documents or a worker fail (the message names the shard), or a split is empty.
    """
    meta = _without_shards(source, recipe, tokenizer)
    finished = valid_shards(folder, meta)
    kept = set(finished)
    _write_unfinished(folder, meta, finished)
    (folder / META_FILE).unlink(missing_ok=True)
    copy = folder / meta.tokenizer
    _write_tokenizer(copy, tokenizer, tokenizer_data)
    for split in reversed(SPLITS):  # the small one first: it shows what is wrong sooner
        done: list[Shard] = []
        for number, pieces in enumerate(_groups(streams[split], SHARD_CHARS)):
            path = folder / f"{split}_{number:05}.bin"
            if path.name in kept:
                advance(sum(len(piece.text) for piece in pieces))
            else:
                blocks = _encoded(path, pieces, copy, workers, advance)
                finished[path.name] = shards.write_shard(path, blocks, meta.vocab_size)
                _write_unfinished(folder, meta, finished)
            done.append(finished[path.name])
        if not done:
            raise DataError(f"{source}: there is no text for the {split} split")
        meta = dataclasses.replace(meta, splits={**meta.splits, split: Split(tuple(done))})
    if entropy_nats is not None:
        meta = dataclasses.replace(meta, entropy=_entropy(entropy_nats, meta.splits["val"]))
    shards.write_meta(folder / META_FILE, meta)
    _remove_leftovers(folder, meta)
    return meta, len(kept)


def check_source(folder: Path, source: str) -> None:
    """Refuse to mix the vocabularies and prepared data of two sources whose files have the same name.

    Args:
        folder: the folder for this source's vocabularies and prepared data.
        source: the source's name in meta.json.

    Raises:
        DataError: if the folder holds data of another source.
    """
    for record in [*folder.glob(f"*/{META_FILE}"), *folder.glob(f"*/{UNFINISHED_FILE}")]:
        try:
            other = shards.read_meta(record).source
        except DataError:
            continue  # unusable: it will be replaced
        if not same_source(other, source):
            raise DataError(
                f"{record.parent}: holds data of {other}, not {source}; delete {folder} or choose another --data-dir"
            )


def same_source(one: str, other: str) -> bool:
    """Return whether two names of sources mean the same, or the same file or folder, as a link to it does."""
    both = os.path.exists(one) and os.path.exists(other)
    return one == other or both and os.path.samefile(one, other)


def valid_shards(folder: Path, meta: Meta) -> dict[str, Shard]:
    """Return, by file name, the undamaged shards in `folder` that were made with the settings of `meta`."""
    valid = {}
    for record in (folder / META_FILE, folder / UNFINISHED_FILE):
        try:
            old = shards.read_meta(record)
        except DataError:
            continue  # missing or unusable: nothing to keep
        facts = ("recipe", "tokenizer_sha256", "bos_id")
        if not same_source(old.source, meta.source) or any(getattr(old, name) != getattr(meta, name) for name in facts):
            continue
        for shard in itertools.chain.from_iterable(split.shards for split in old.splits.values()):
            try:
                shards.check_shard(folder, shard, old.dtype, verify=True)
            except DataError:
                continue  # missing or damaged: it is written again
            valid[shard.file] = shard
    return valid


def _without_shards(source: str, recipe: Mapping[str, Any], tokenizer: Tokenizer) -> Meta:
    """Return a meta.json that lists no shards yet."""
    return Meta(
        source=source,
        recipe={**recipe, "shard_chars": SHARD_CHARS, "max_piece_chars": documents.MAX_PIECE_CHARS},
        bos_id=tokenizer.separator_id,
        eos_id=tokenizer.separator_id if tokenizer.eos_id is None else tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        tokenizer=f"tokenizer.{tokenizer.suffix}",
        tokenizer_sha256=tokenizer.sha256,
        splits={name: Split(()) for name in SPLITS},
    )


def _write_tokenizer(path: Path, tokenizer: Tokenizer, data: bytes) -> None:
    """Write the tokenizer's file and, if it does not say what begins and ends texts, a file that does."""
    if not path.is_file() or path.read_bytes() != data:
        write_file(path, data)
    if tokenizer.ids == tokenizer.file_ids:
        ids_file.ids_path(path).unlink(missing_ok=True)
    else:
        write_file(ids_file.ids_path(path), ids_file.ids_json(tokenizer.ids))


def _encoded(
    path: Path, pieces: Iterable[Piece], tokenizer: Path, workers: Workers, advance: Callable[[int], object]
) -> Iterator[TokenBlock]:
    """Yield the encoded pieces of the shard `path`."""
    tasks = (EncodeTask(tokenizer, tuple(group)) for group in _groups(pieces, TASK_CHARS))
    try:
        for block in workers.map(encode_pieces, tasks):
            advance(block.text_bytes)
            yield block
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _groups(stream: Iterable[Piece], n_chars: int) -> Iterator[Iterator[Piece]]:
    """Divide a stream into groups, each ending with the piece that brings it to `n_chars`; use one before the next."""

    def numbered() -> Iterator[tuple[int, Piece]]:
        number = chars = 0
        for piece in stream:
            if chars >= n_chars:
                number, chars = number + 1, 0
            chars += len(piece.text)
            yield number, piece

    for _, group in itertools.groupby(numbered(), key=operator.itemgetter(0)):
        yield (piece for _, piece in group)


def _entropy(nats: float, val: Split) -> Entropy:
    """Return the entropy of the validation documents in the units of meta.json."""
    bits = nats / math.log(2)
    return Entropy(
        stories=val.documents,
        # A document has as many tokens with its BOS as it has with the next one's instead.
        nats_per_token=nats / val.tokens,
        bits_per_byte=bits / val.text_bytes,
        bits_per_story=bits / val.documents,
    )


def _write_unfinished(folder: Path, meta: Meta, finished: Mapping[str, Shard]) -> None:
    """Record in unfinished.json which shards need not be made again."""
    splits = {name: Split(tuple(s for s in finished.values() if s.file.startswith(name))) for name in SPLITS}
    shards.write_meta(folder / UNFINISHED_FILE, dataclasses.replace(meta, splits=splits))


def _remove_leftovers(folder: Path, meta: Meta) -> None:
    """Delete the files of an earlier run with other settings or of a killed one."""
    named = {shard.file for split in meta.splits.values() for shard in split.shards} | {meta.tokenizer}
    patterns = ["train_*.bin", "val_*.bin", "tokenizer.*", ".*.tmp-*", UNFINISHED_FILE]
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.name not in named:
            path.unlink()
