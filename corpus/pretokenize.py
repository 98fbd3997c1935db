"""Documents become token shards: read and written in order by this process, encoded by workers.

What goes into which shard depends on the text alone, so the bytes are the same whatever the number of workers. Only a
few batches are under way at a time, so memory stays flat. Every finished shard is noted in unfinished.json, which is a
meta.json in the making: an interrupted command goes on where it stopped.
"""

import dataclasses
import functools
import itertools
import math
import operator
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corpus.documents import DEFAULT_COLUMN, DEFAULT_DOCUMENT, VAL_FRACTION, Piece
from corpus.workers import Workers
from llamalet import shards
from llamalet.errors import DataError, TokenizerError
from llamalet.files import replacing
from llamalet.shards import META_FILE, SPLITS, Block, Entropy, Meta, Shard, Shards, Split
from llamalet.tokenizer import Tokenizer
from llamalet.tokenizer import load as load_tokenizer

UNFINISHED_FILE = "unfinished.json"
SHARD_CHARS = 32_000_000
BATCH_CHARS = 200_000


class Batch(NamedTuple):
    """What a worker encodes at a time."""

    tokenizer: Path
    pieces: tuple[Piece, ...]


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
    """Make a folder of prepared data.

    Args:
        streams: the documents of train and val, in pieces.
        folder: where to; shards of the same source, recipe and vocabulary that lie there, and are sound, are kept.
        source: what meta.json calls the source.
        recipe: what else determines the documents and their cut into shards.
        tokenizer: the vocabulary, checked (check_tokenizer).
        tokenizer_data: its file, which goes into the folder as it is.
        entropy_nats: -log probability of all validation documents, where it is known.
        workers: who encodes.
        advance: called with the number of characters done.

    Returns:
        The new meta.json, and how many of its shards were kept.

    Raises:
        DataError: if the documents or a worker fail (the message names the shard), or a split comes out empty.
    """
    meta = Meta(
        source=source,
        recipe={**recipe, "shard_chars": SHARD_CHARS},
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        tokenizer=f"tokenizer.{tokenizer.suffix}",
        tokenizer_sha256=tokenizer.sha256,
        splits={name: Split(()) for name in SPLITS},
    )
    sound = sound_shards(folder, meta)
    kept = set(sound)
    _note(folder, meta, sound)
    (folder / META_FILE).unlink(missing_ok=True)
    copy = folder / meta.tokenizer
    _keep(tokenizer_data, copy)
    for split in SPLITS:
        done: list[Shard] = []
        for number, group in itertools.groupby(_numbered(streams[split]), key=operator.itemgetter(0)):
            pieces = (piece for _, piece in group)
            path = folder / f"{split}_{number:05}.bin"
            if path.name in kept:
                advance(sum(len(piece.text) for piece in pieces))
            else:
                blocks = _encoded(path, pieces, copy, workers, advance)
                sound[path.name] = shards.write_shard(path, blocks, meta.vocab_size)
                _note(folder, meta, sound)
            done.append(sound[path.name])
        if not done:
            raise DataError(f"{source}: there is no text for the {split} split")
        meta = dataclasses.replace(meta, splits={**meta.splits, split: Split(tuple(done))})
    if entropy_nats is not None:
        meta = dataclasses.replace(meta, entropy=_entropy(entropy_nats, meta.splits["val"]))
    shards.write_meta(folder / META_FILE, meta)
    _remove_leftovers(folder, meta)
    return meta, len(kept)


def check_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """Refuse a vocabulary that cannot encode a document in pieces.

    Raises:
        TokenizerError: if its tokens depend on what stands before a space.
    """
    if tokenizer.encode("a b") != tokenizer.encode("a") + tokenizer.encode(_with_its_space("b", tokenizer)):
        raise TokenizerError(f"{name}: the vocabulary must have spaces only where a token begins")


def command(data: Shards, vocab: str) -> str:
    """Return what to type to prepare the same documents with another vocabulary.

    Args:
        data: the prepared data.
        vocab: the vocabulary's file, or a model with it.
    """
    usual = {"document": DEFAULT_DOCUMENT, "text_column": DEFAULT_COLUMN, "val_fraction": VAL_FRACTION}
    options = {"source": data.meta.source}
    for name in (*usual, "max_documents"):
        if (value := data.meta.recipe.get(name)) not in (None, usual.get(name)):
            options[name] = value
    if (root := data.folder.parent.parent) != Path(shards.DATA_ROOT):
        options["data_dir"] = str(root)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (options | {"vocab": vocab}).items()]
    return shlex.join(["python", "tinystories.py", "pretokenize", *words])


def check_source(folder: Path, source: str) -> None:
    """Refuse to mix the vocabularies and prepared data of two sources whose files have the same name.

    Args:
        folder: where those of the source go.
        source: what meta.json calls it.

    Raises:
        DataError: if data of another source lie there.
    """
    for record in [*folder.glob(f"*/{META_FILE}"), *folder.glob(f"*/{UNFINISHED_FILE}")]:
        try:
            other = shards.read_meta(record).source
        except DataError:
            continue  # unusable: it will be replaced
        if other != source:
            raise DataError(
                f"{record.parent}: holds data of {other}, not {source}; delete {folder} or choose another --data-dir"
            )


def sound_shards(folder: Path, meta: Meta) -> dict[str, Shard]:
    """Return, by file name, the shards in `folder` that were made as `meta` says and are undamaged."""
    sound = {}
    for record in (folder / META_FILE, folder / UNFINISHED_FILE):
        try:
            old = shards.read_meta(record)
        except DataError:
            continue  # missing, or unusable: then there is nothing to keep
        if (old.source, old.recipe, old.tokenizer_sha256) != (meta.source, meta.recipe, meta.tokenizer_sha256):
            continue
        for shard in itertools.chain.from_iterable(split.shards for split in old.splits.values()):
            try:
                shards.check_shard(folder, shard, old.dtype, verify=True)
            except DataError:
                continue  # missing or damaged: it is written again
            sound[shard.file] = shard
    return sound


def encode(batch: Batch) -> Block:
    """Encode pieces of documents; this is what the workers run.

    Raises:
        DataError: if a piece cannot be encoded, with its file and line.
    """
    tokenizer = _worker_tokenizer(batch.tokenizer)
    ids: list[int] = []
    for piece in batch.pieces:
        try:
            text = piece.text if piece.starts else _with_its_space(piece.text, tokenizer)
            ids += tokenizer.encode(text, bos=piece.starts)
        except Exception as error:
            raise DataError(f"{piece.where}: cannot be encoded: {type(error).__name__}: {error}") from None
    return Block(
        np.array(ids, dtype=shards.id_dtype(tokenizer.vocab_size)),
        documents=sum(piece.starts for piece in batch.pieces),
        # A piece that starts no document had a space before it.
        text_bytes=sum(len(piece.text.encode()) + (not piece.starts) for piece in batch.pieces),
    )


def _with_its_space(text: str, tokenizer: Tokenizer) -> str:
    """Return a text that had a space before it as the tokenizer needs it: some put one before every text."""
    return text if tokenizer.adds_space else " " + text


@functools.cache
def _worker_tokenizer(path: Path) -> Tokenizer:
    """Load the vocabulary once per worker."""
    return load_tokenizer(path)


def _encoded(
    path: Path, pieces: Iterable[Piece], tokenizer: Path, workers: Workers, advance: Callable[[int], object]
) -> Iterator[Block]:
    """Yield the encoded pieces of the shard `path`."""
    try:
        for block in workers.map(encode, _batches(pieces, tokenizer)):
            advance(block.text_bytes)
            yield block
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _batches(pieces: Iterable[Piece], tokenizer: Path) -> Iterator[Batch]:
    """Gather pieces into batches of about BATCH_CHARS."""
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield Batch(tokenizer, tuple(batch))
            batch, chars = [], 0
    if batch:
        yield Batch(tokenizer, tuple(batch))


def _numbered(stream: Iterable[Piece]) -> Iterator[tuple[int, Piece]]:
    """Yield each piece with the number of its shard."""
    number = chars = 0
    for piece in stream:
        if chars >= SHARD_CHARS:
            number, chars = number + 1, 0
        chars += len(piece.text)
        yield number, piece


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


def _note(folder: Path, meta: Meta, sound: Mapping[str, Shard]) -> None:
    """Write down which shards need not be made again."""
    splits = {name: Split(tuple(s for s in sound.values() if s.file.startswith(name))) for name in SPLITS}
    shards.write_meta(folder / UNFINISHED_FILE, dataclasses.replace(meta, splits=splits))


def _keep(data: bytes, target: Path) -> None:
    """Let a small file hold these bytes, all or none of them."""
    if not target.is_file() or target.read_bytes() != data:
        with replacing(target) as file:
            file.write(data)


def _remove_leftovers(folder: Path, meta: Meta) -> None:
    """Delete what an earlier run with other settings, or one that was killed, left behind."""
    named = {shard.file for split in meta.splits.values() for shard in split.shards} | {meta.tokenizer}
    patterns = ["train_*.bin", "val_*.bin", "tokenizer.*", ".*.tmp-*", UNFINISHED_FILE]
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.name not in named:
            path.unlink()
