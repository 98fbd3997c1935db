"""From text to token shards, in six steps. Start here to read this folder.

sources.py      which files the text is in, of the user's or downloaded
text_files.py   files -> texts
documents.py    texts -> documents in pieces, for training and for validation
vocabulary.py   documents -> a vocabulary, unless there is one already
encode.py       documents -> token ids, with a vocabulary
pretokenize.py  token ids -> shards and meta.json
"""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from corpus import documents, vocabulary
from corpus.documents import Piece, expected_chars
from corpus.encode import check_tokenizer
from corpus.pretokenize import check_source, pretokenize
from corpus.sources import Source, in_one_line, open_source
from corpus.text_files import DocumentRule
from corpus.workers import Workers
from llamalet.checks import not_positive
from llamalet.convert import formats
from llamalet.errors import ConfigError, DataError
from llamalet.files import check_name, check_replaceable, check_writable, write_file
from llamalet.shards import DATA_ROOT, SPLITS, Meta, Shards

DATA_DIR = Path(DATA_ROOT)
SMALLEST_VOCABULARY = 260  # 3 control tokens, 256 bytes, and the space


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which documents to read."""

    source: str | None = None
    """A .txt, .jsonl or .parquet file, a folder of them, the ID of a downloaded dataset, tinyshakespeare (downloaded
    if needed: 1 MB), or synthetic. By default TinyStories if downloaded, else the synthetic stories."""
    document: DocumentRule = "file"
    """How a .txt file is divided into documents: not at all (except at lines <|endoftext|>), at blank lines, or at each
    line."""
    text_column: str = "text"
    """Key (.jsonl) or column (.parquet) of the text."""
    val_fraction: float = 0.05
    """Share of the documents used for validation, or of each text if there are only few; ignored if the source has
    validation files of its own (a name with val, valid or validation)."""
    data_dir: Path = DATA_DIR
    """Folder of sources and prepared data."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 < self.val_fraction <= 0.5:
            raise ConfigError(f"val_fraction={self.val_fraction}: must be above 0 and at most 0.5")


@dataclass(frozen=True, kw_only=True)
class PretokenizeConfig(TextConfig):
    """What to tokenize, with which vocabulary."""

    vocab: Path | None = None
    """Vocabulary to use: a SentencePiece .model (such as Llama 2's), a tokenizer.bin, Llama 3's tiktoken file, a
    tokenizer.json, or the vocabulary of a model, to train that model further. By default the one last trained on this
    source by train-vocab, else a new one."""
    vocab_size: int | None = None
    """Use the vocabulary of this size that train-vocab trained on this source, or train it now."""
    max_documents: int | None = None
    """Take only the first N training documents."""
    workers: int | None = None
    """Processes that tokenize; one per core by default. The shards do not depend on it."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        ConfigError.raise_for(not_positive(self, "max_documents", "workers"))
        if self.vocab_size is not None:
            check_vocab_size(self.vocab_size)


def prepare_shards(config: PretokenizeConfig) -> Path:
    """Write the token shards of a source, keeping valid ones that exist, and return their folder."""
    source = find_source(config)
    vocab = _find_vocabulary(config, source)
    tokenizer, tokenizer_data = formats.read_tokenizer(vocab)
    check_tokenizer(tokenizer, str(vocab))
    print(f"vocabulary: {vocab}, {tokenizer.vocab_size} tokens", flush=True)
    n_chars = expected_chars(source.files, config.text_column)
    recipe = {
        "source_sha256": source.digest(),
        "document": config.document,
        "text_column": config.text_column,
        "val_fraction": None if "val" in source.files else config.val_fraction,
        "max_documents": config.max_documents,
    }
    empty: dict[str, list[str]] = {split: [] for split in SPLITS}
    streams = {split: documents.with_text(_documents(config, source, split), empty[split]) for split in SPLITS}
    if config.max_documents is not None:
        streams["train"] = documents.first_documents(streams["train"], config.max_documents)
    # A vocabulary from elsewhere gets a folder of its own, named after its digest.
    suffix = "" if vocab.resolve().parent == source.folder.resolve() else f"-{tokenizer.sha256[:8]}"
    folder = source.folder / f"tok{tokenizer.vocab_size}{suffix}"
    with Workers(config.workers) as workers, progress_bar("tokenize", n_chars) as bar:
        meta, n_kept = pretokenize(
            streams,
            folder,
            source=source.label,
            recipe=recipe,
            tokenizer=tokenizer,
            tokenizer_data=tokenizer_data,
            entropy_nats=source.entropy_nats,
            workers=workers,
            advance=bar.update,
        )
    _describe(folder, meta, n_kept, [*empty["train"], *empty["val"]])
    return folder


def find_source(config: TextConfig) -> Source:
    """Find the source, and say what the user did not: which one it is, what is left out of it.

    What would stop the work later is found now: a folder that cannot be written to, a file that cannot be read.

    Raises:
        DataError: if there is no such source, or the beginning of a file cannot be read.
        DiskError: if the source's folder cannot be written to.
    """
    check_name(config.data_dir)
    source = open_source(config.source, config.data_dir)
    check_source(source.folder, source.label)
    check_writable(source.folder)
    documents.check_readable(source.files, document=config.document, column=config.text_column)
    if config.source is None:
        print(f"source: {source.label}")
    for note in source.notes:
        print(note)
    return source


def _documents(config: TextConfig, source: Source, split: str) -> Iterator[Piece]:
    """Read the documents of a split."""
    return documents.pieces(
        source.files, split, document=config.document, column=config.text_column, val_fraction=config.val_fraction
    )


def _find_vocabulary(config: PretokenizeConfig, source: Source) -> Path:
    """Return the vocabulary that the options ask for; train it if it does not exist."""
    if config.vocab is not None:
        return config.vocab
    if config.vocab_size is not None:
        trained = [source.folder / f"tok{config.vocab_size}.model"]
    else:
        trained = sorted(source.folder.glob("tok*.model"), key=lambda path: path.stat().st_mtime_ns)
    if trained and trained[-1].is_file():
        return trained[-1]
    size = config.vocab_size or vocabulary.DEFAULT_SIZE
    print("no vocabulary yet", flush=True)
    return train_vocabulary(config, source, size, at_most=config.vocab_size is None)


def train_vocabulary(config: TextConfig, source: Source, vocab_size: int, *, at_most: bool) -> Path:
    """Train a vocabulary on the training documents, write it to the source's folder and return its path."""
    # A smaller size, and so another name, is known only after the training.
    for path in (source.folder / f"tok{vocab_size}.model", *(source.folder.glob("tok*.model") if at_most else ())):
        check_replaceable(path)
    every = math.ceil(expected_chars(source.files, config.text_column) / vocabulary.SAMPLE_CHARS)
    lines = list(vocabulary.sample_lines(_documents(config, source, "train"), max(every, 1)))
    if not lines:
        raise DataError(f"{source.label}: there is no text to train a vocabulary on")
    print(f"training a vocabulary of {vocab_size} tokens", flush=True)
    model, n_tokens = vocabulary.train(lines, vocab_size, at_most=at_most)
    path = source.folder / f"tok{n_tokens}.model"
    write_file(path, model)
    return path


def _describe(folder: Path, meta: Meta, n_kept: int, empty: list[str]) -> None:
    """Print what was written."""
    if empty:
        print(f"left out: {len(empty)} document(s) without text (empty or null), the first: {in_one_line(empty[0])}")
    if n_kept:
        print(f"kept: {n_kept} shard(s) that were there already, checked")
    for name, split in meta.splits.items():
        print(
            f"{name:<5}  {split.tokens:,} tokens in {len(split.shards)} shard(s), {split.documents:,} document(s), "
            f"{split.text_bytes / 1e6:.2f} MB of text: {split.text_bytes / split.tokens:.2f} bytes per token"
        )
        if split.unknown_tokens:
            print(
                f"{'':<5}  {split.unknown_tokens:,} of {split.tokens:,} tokens are <unk>: text that is not in the "
                "vocabulary, and that the model cannot learn"
            )
    if entropy := meta.entropy:
        print(
            f"entropy of the {entropy.stories} validation stories: {entropy.nats_per_token:.4f} nats per token, "
            f"{entropy.bits_per_byte:.4f} bits per byte, {entropy.bits_per_story:.1f} bits per story"
        )
    print(f"wrote {folder}")


def pretokenize_command(config: TextConfig) -> str:
    """Return the shell command that prepares shards with these options."""
    values = {field: getattr(config, field.name) for field in fields(config)}
    options = [f"--{f.name.replace('_', '-')}={value}" for f, value in values.items() if value != f.default]
    return shlex.join(["python", "tinystories.py", "pretokenize", *options])


def command_for(data: Shards, vocab: str) -> str:
    """Return the shell command that prepares the documents of `data` again with the vocabulary, or model, `vocab`."""
    recipe = {name: data.meta.recipe.get(name) for name in ("document", "text_column", "val_fraction", "max_documents")}
    given = {name: value for name, value in recipe.items() if value is not None}
    root = data.folder.parent.parent
    return pretokenize_command(PretokenizeConfig(source=data.meta.source, data_dir=root, vocab=Path(vocab), **given))


def progress_bar(what: str, total: int | None) -> "tqdm[Any]":
    """Return a progress bar over bytes of text, hidden unless stderr is a terminal."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None)


def check_vocab_size(vocab_size: int) -> None:
    """Raise a ConfigError on a size that leaves no room for text."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size={vocab_size}: must be at least {SMALLEST_VOCABULARY}; llama2.c's 0 is --vocab=PATH here"
        )
