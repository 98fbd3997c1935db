"""From text to token shards: get stories, train a vocabulary on them, tokenize them.

  python tinystories.py download       the real TinyStories, or any dataset with a text column on the Hugging Face Hub
  python tinystories.py synthesize     stories from this project's grammar: no network, and their entropy is known
  python tinystories.py train-vocab    a SentencePiece vocabulary of any size
  python tinystories.py pretokenize    token shards for train.py; trains a vocabulary where there is none

COMMAND --help lists the options of each. Some ways to go:

  python tinystories.py download && python tinystories.py pretokenize
  python tinystories.py synthesize && python tinystories.py pretokenize
  python tinystories.py pretokenize my_novel.txt
  python tinystories.py pretokenize tinyshakespeare --vocab-size=1024
  python tinystories.py pretokenize my_folder --document=blankline --vocab=llama2/tokenizer.model
"""

import dataclasses
import difflib
import inspect
import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from configurator import parse
from corpus import documents, vocabulary
from corpus.documents import DEFAULT_COLUMN, DEFAULT_DOCUMENT, VAL_FRACTION, DocumentRule, Piece, expected_chars
from corpus.download import download
from corpus.pretokenize import check_source, check_tokenizer, pretokenize
from corpus.sources import DEFAULT_SOURCE, Source, open_source
from corpus.synthetic import synthesize
from corpus.tinyshakespeare import TINYSHAKESPEARE, prepare
from corpus.workers import Workers
from llamalet import errors
from llamalet.convert import formats
from llamalet.errors import ConfigError, DataError, UsageError
from llamalet.files import replacing
from llamalet.shards import DATA_ROOT, SPLITS, Meta

Config = TypeVar("Config")

DATA_DIR = Path(DATA_ROOT)
BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([kMG]?)B?", re.IGNORECASE)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
SMALLEST_VOCABULARY = 260  # 3 control tokens, 256 bytes, and the space


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What to download."""

    source: str = DEFAULT_SOURCE
    """ID of a dataset on the Hub with a text column, or ID:CONFIG where it has several configurations; or
    tinyshakespeare."""
    max_files: int | None = None
    """Take only the first so many training files (TinyStories has 4 of about 250 MB)."""
    data_dir: Path = DATA_DIR
    """Where sources and prepared data lie."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _check(max_files=self.max_files)


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """How many stories to write."""

    size: str | None = None
    """Size of the training stories, as 500kB, 10MB or 1GB; 20MB where neither size nor stories is given."""
    stories: int | None = None
    """Number of training stories, instead of a size."""
    val_stories: int = 1000
    """Number of validation stories."""
    seed: int = 0
    """Another seed, other stories; the same seed, the same bytes."""
    workers: int | None = None
    """Processes that write; one per core by default. The files do not depend on it."""
    data_dir: Path = DATA_DIR
    """Where sources and prepared data lie."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _check(stories=self.stories, val_stories=self.val_stories, workers=self.workers)
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")
        if self.size is not None and (self.stories is not None or not self.size_bytes):
            raise ConfigError(f"size={self.size}: must be like 500kB, 10MB or 1GB, and without stories=")

    @property
    def size_bytes(self) -> int | None:
        """The size as a number; None where the number of stories is given instead."""
        if self.stories is not None:
            return None
        match = BYTES.fullmatch(self.size or "20MB")
        return int(float(match[1]) * UNITS[match[2].upper()]) if match else 0


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which documents to read."""

    source: str | None = None
    """A .txt, .jsonl or .parquet file, a folder of them, the ID of a downloaded dataset, tinyshakespeare (downloaded
    when needed: 1 MB), or synthetic. By default TinyStories if downloaded, else the synthetic stories."""
    document: DocumentRule = DEFAULT_DOCUMENT
    """What a document is in a .txt file: the whole file (or what stands between lines <|endoftext|>), what stands
    between blank lines, or each line."""
    text_column: str = DEFAULT_COLUMN
    """Key (.jsonl) or column (.parquet) of the text."""
    val_fraction: float = VAL_FRACTION
    """Share of the documents that goes to validation, or of each text where there are only few; not used where the
    source has validation files of its own (a name with val, valid or validation)."""
    data_dir: Path = DATA_DIR
    """Where sources and prepared data lie."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 < self.val_fraction <= 0.5:
            raise ConfigError(f"val_fraction={self.val_fraction}: must be above 0 and at most 0.5")


@dataclass(frozen=True, kw_only=True)
class TrainVocabConfig(TextConfig):
    """Which vocabulary to train, on what."""

    vocab_size: int = vocabulary.DEFAULT_SIZE
    """Number of tokens."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        _check_vocab_size(self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class PretokenizeConfig(TextConfig):
    """What to tokenize, with which vocabulary."""

    vocab: Path | None = None
    """Vocabulary to use: a SentencePiece .model (the Llama 2 one, too), a tokenizer.bin, Llama 3's tiktoken file, a
    tokenizer.json, or a model to train further, for its own. By default the one that train-vocab trained last on this
    source, else a new one."""
    vocab_size: int | None = None
    """Use the vocabulary of this size that train-vocab trained on this source, or train it now."""
    max_documents: int | None = None
    """Take only the first so many training documents."""
    workers: int | None = None
    """Processes that tokenize; one per core by default. The shards do not depend on it."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        _check(max_documents=self.max_documents, workers=self.workers)
        if self.vocab_size is not None:
            _check_vocab_size(self.vocab_size)


def run_download(argv: Sequence[str]) -> int:
    """Get a dataset of the Hugging Face Hub, complete and checked.

    An interrupted download goes on where it stopped, files that are there already are checked and kept.

      python tinystories.py download
      python tinystories.py download --max-files=1
      python tinystories.py download --source=Salesforce/wikitext:wikitext-2-raw-v1
    """
    config = _parse(DownloadConfig, argv, run_download, positional=("source",))
    if config.source == TINYSHAKESPEARE:
        prepare(config.data_dir, print)
    elif Path(config.source).exists():
        print(f"{config.source} is already here: nothing to download")
    else:
        download(config.source, config.data_dir, max_files=config.max_files, report=print)
    _print_pretokenize(
        TextConfig(source=None if config.source == DEFAULT_SOURCE else config.source, data_dir=config.data_dir)
    )
    return 0


def run_synthesize(argv: Sequence[str]) -> int:
    """Write stories drawn from a small grammar: a corpus without a network, whose entropy is known.

    They go to data/synthetic. The validation stories come with their log-probabilities, so that training can print how
    far the model is from the best possible loss.

      python tinystories.py synthesize
      python tinystories.py synthesize --size=100MB --seed=7
      python tinystories.py synthesize --stories=5000
    """
    config = _parse(SynthesizeConfig, argv, run_synthesize)
    with Workers(config.workers) as workers, _bar("stories", config.size_bytes) as bar:
        record = synthesize(
            config.data_dir,
            seed=config.seed,
            train_bytes=config.size_bytes,
            train_stories=config.stories,
            val_stories=config.val_stories,
            workers=workers,
            advance=bar.update,
        )
    for split, files in record.files.items():
        for file in files:
            print(f"{split:<5}  {config.data_dir / record.source / file.file}  {file.bytes / 1e6:.1f} MB")
    _print_pretokenize(TextConfig(source=record.source, data_dir=config.data_dir))
    return 0


def run_train_vocab(argv: Sequence[str]) -> int:
    """Train a SentencePiece vocabulary: byte pairs with byte fallback, every space kept, so that no text is altered.

    It goes to data/NAME/tokN.model, where pretokenize finds it.

      python tinystories.py train-vocab --vocab-size=4096
      python tinystories.py train-vocab my_novel.txt --vocab-size=1024
    """
    config = _parse(TrainVocabConfig, argv, run_train_vocab, positional=("source",))
    source = _open(config)
    path = _train_vocabulary(config, source, config.vocab_size, at_most=False)
    print(f"wrote {path}")
    _print_pretokenize(config)
    return 0


def run_pretokenize(argv: Sequence[str]) -> int:
    """Write a source as token shards for train.py, into data/NAME/tokN.

    Without a vocabulary, one of 4096 tokens is trained first. Shards that are there already, and sound, are kept:
    an interrupted command goes on where it stopped.

      python tinystories.py pretokenize
      python tinystories.py pretokenize my_novel.txt --vocab-size=1024
      python tinystories.py pretokenize poems.txt --document=blankline --val-fraction=0.1
      python tinystories.py pretokenize --vocab=llama2/tokenizer.model
      python tinystories.py pretokenize tinyshakespeare --vocab=stories15M.bin
    """
    config = _parse(PretokenizeConfig, argv, run_pretokenize, positional=("source",))
    folder = prepare_shards(config)
    print("next: " + shlex.join(["python", "train.py", *([] if config.data_dir == DATA_DIR else [f"--data={folder}"])]))
    return 0


def prepare_shards(config: PretokenizeConfig) -> Path:
    """Write a source as token shards, but for those that are there, and return their folder."""
    source = _open(config)
    vocab = _find_vocabulary(config, source)
    tokenizer, tokenizer_data = formats.read_tokenizer(vocab)
    check_tokenizer(tokenizer, str(vocab))
    print(f"vocabulary: {vocab}, {tokenizer.vocab_size} tokens", flush=True)
    # A vocabulary from elsewhere gets a folder of its own, named after its digest.
    suffix = "" if vocab.resolve().parent == source.folder.resolve() else f"-{tokenizer.sha256[:8]}"
    recipe = {
        "source_sha256": source.digest(),
        "document": config.document,
        "text_column": config.text_column,
        "val_fraction": None if source.has_val else config.val_fraction,
        "max_documents": config.max_documents,
    }
    empty: list[str] = []
    streams = {split: documents.with_text(_pieces(config, source, split), empty) for split in SPLITS}
    if config.max_documents is not None:
        streams["train"] = documents.first_documents(streams["train"], config.max_documents)
    folder = source.folder / f"tok{tokenizer.vocab_size}{suffix}"
    with Workers(config.workers) as workers, _bar("tokenize", expected_chars(source.files, config.text_column)) as bar:
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
    _describe(folder, meta, n_kept, empty)
    return folder


def _open(config: TextConfig) -> Source:
    """Find the source, and say which one it is where the user did not."""
    if config.source == TINYSHAKESPEARE:
        prepare(config.data_dir, print)
    source = open_source(config.source, config.data_dir)
    check_source(source.folder, source.label)
    if config.source is None:
        print(f"source: {source.label}")
    return source


def _pieces(config: TextConfig, source: Source, split: str) -> Iterator[Piece]:
    """Read the documents of a split."""
    return documents.pieces(
        source.files, split, document=config.document, column=config.text_column, val_fraction=config.val_fraction
    )


def _find_vocabulary(config: PretokenizeConfig, source: Source) -> Path:
    """Return the vocabulary that the options mean; where there is none yet, train it."""
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
    return _train_vocabulary(config, source, size, at_most=config.vocab_size is None)


def _train_vocabulary(config: TextConfig, source: Source, vocab_size: int, *, at_most: bool) -> Path:
    """Train a vocabulary on the training documents and write it to the source's folder."""
    every = math.ceil(expected_chars(source.files, config.text_column) / vocabulary.SAMPLE_CHARS)
    lines = list(vocabulary.sample_lines(_pieces(config, source, "train"), max(every, 1)))
    if not lines:
        raise DataError(f"{source.label}: there is no text to train a vocabulary on")
    print(f"training a vocabulary of {vocab_size} tokens", flush=True)
    model, n_tokens = vocabulary.train(lines, vocab_size, at_most=at_most)
    path = source.folder / f"tok{n_tokens}.model"
    with replacing(path) as file:
        file.write(model)
    return path


def _describe(folder: Path, meta: Meta, n_kept: int, empty: list[str]) -> None:
    """Print what pretokenize has made."""
    if empty:
        print(f"left out: {len(empty)} document(s) without text, the first: {empty[0]}")
    if n_kept:
        print(f"kept: {n_kept} shard(s) that were there already, checked")
    for name, split in meta.splits.items():
        print(
            f"{name:<5}  {split.tokens:,} tokens in {len(split.shards)} shard(s), {split.documents:,} document(s), "
            f"{split.text_bytes / 1e6:.2f} MB of text: {split.text_bytes / split.tokens:.2f} bytes a token"
        )
    if entropy := meta.entropy:
        print(
            f"entropy of the {entropy.stories} validation stories: {entropy.nats_per_token:.4f} nats a token, "
            f"{entropy.bits_per_byte:.4f} bits a byte, {entropy.bits_per_story:.1f} bits a story"
        )
    print(f"wrote {folder}")


def _print_pretokenize(config: TextConfig) -> None:
    """Print the command to type next, for the same text."""
    values = {field: getattr(config, field.name) for field in dataclasses.fields(TextConfig)}
    options = [f"--{f.name.replace('_', '-')}={value}" for f, value in values.items() if value != f.default]
    print("next: " + shlex.join(["python", "tinystories.py", "pretokenize", *options]))


def _parse(
    config_class: type[Config], argv: Sequence[str], command: Callable[..., int], positional: Sequence[str] = ()
) -> Config:
    """Parse the options of a command, whose docstring is the help."""
    name = command.__name__.removeprefix("run_").replace("_", "-")
    description = inspect.getdoc(command) or ""
    return parse(config_class, argv, program=f"tinystories.py {name}", description=description, positional=positional)


def _bar(what: str, total: int | None) -> "tqdm[Any]":
    """Return a progress bar over bytes of text, hidden where the error output is no terminal."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None)


def _check(**numbers: int | None) -> None:
    """Raise one ConfigError that names every number below 1."""
    problems = [f"{name}={n}: must be positive" for name, n in numbers.items() if n is not None and n < 1]
    if problems:
        raise ConfigError.from_problems(problems)


def _check_vocab_size(vocab_size: int) -> None:
    """Raise a ConfigError on a size that leaves no room for text."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size={vocab_size}: must be at least {SMALLEST_VOCABULARY}; llama2.c's 0 is --vocab=PATH here"
        )


COMMANDS = {
    "download": run_download,
    "synthesize": run_synthesize,
    "train-vocab": run_train_vocab,
    "pretokenize": run_pretokenize,
}


def main(argv: Sequence[str]) -> int:
    """Run one of the commands; see the top of the file."""
    if not argv:
        raise UsageError(f"no command; it must be {', '.join(COMMANDS)}; see --help")
    if argv[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    command = COMMANDS.get(argv[0].replace("_", "-"))
    if command is None:
        near = difflib.get_close_matches(argv[0].replace("_", "-"), COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"it must be {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command '{argv[0]}'; {hint}")
    return command(argv[1:])


if __name__ == "__main__":
    errors.run(main)
