"""From text to token shards: get stories, train a vocabulary on them, tokenize them.

  python tinystories.py download       the real TinyStories, or any dataset with a text column on the Hugging Face Hub
  python tinystories.py synthesize     stories from this project's grammar: no network, and their entropy is known
  python tinystories.py train-vocab    a SentencePiece vocabulary of any size
  python tinystories.py pretokenize    token shards for train.py; trains a vocabulary if there is none

COMMAND --help lists the options of each. Examples:

  python tinystories.py download && python tinystories.py pretokenize
  python tinystories.py synthesize && python tinystories.py pretokenize
  python tinystories.py pretokenize my_novel.txt
  python tinystories.py pretokenize tinyshakespeare --vocab-size=1024
  python tinystories.py pretokenize my_folder --document=blankline --vocab=llama2/tokenizer.model
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import dataclasses
import difflib
import inspect
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configurator import parse
from corpus import prepare, vocabulary
from corpus.download import download
from corpus.prepare import DATA_DIR, PretokenizeConfig, TextConfig
from corpus.sources import DEFAULT_SOURCE, NAMED_SOURCES
from corpus.synthetic import SynthesizeConfig, synthesize
from corpus.workers import Workers
from llamalet.checks import not_positive
from llamalet.command import run
from llamalet.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What to download."""

    source: str = DEFAULT_SOURCE
    """ID of a dataset on the Hub with a text column, or ID:CONFIG if it has several configurations; or
    tinyshakespeare."""
    max_files: int | None = None
    """Take only the first N training files (TinyStories has 4 of about 250 MB)."""
    data_dir: Path = DATA_DIR
    """Folder of sources and prepared data."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        ConfigError.raise_for(not_positive(self, "max_files"))


@dataclass(frozen=True, kw_only=True)
class TrainVocabConfig(TextConfig):
    """Which vocabulary to train, on what."""

    vocab_size: int = vocabulary.DEFAULT_SIZE
    """Number of tokens."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        prepare.check_vocab_size(self.vocab_size)


def run_download(config: DownloadConfig) -> None:
    """Get a dataset of the Hugging Face Hub, complete and checked.

    An interrupted download continues where it stopped; files already there are checked and kept.

      python tinystories.py download
      python tinystories.py download --max-files=1
      python tinystories.py download --source=Salesforce/wikitext:wikitext-2-raw-v1
    """
    if config.source in NAMED_SOURCES:
        NAMED_SOURCES[config.source](config.data_dir)
    elif Path(config.source).exists():
        print(f"{config.source} is already here: nothing to download")
    else:
        download(config.source, config.data_dir, max_files=config.max_files)
    source = None if config.source == DEFAULT_SOURCE else config.source
    _print_next(TextConfig(source=source, data_dir=config.data_dir))


def run_synthesize(config: SynthesizeConfig) -> None:
    """Write stories drawn from a small grammar: a corpus that needs no network and whose entropy is known.

    They go to data/synthetic. Each validation story is written with its log-probability, so that training can print
    how far the model is from the best possible loss.

      python tinystories.py synthesize
      python tinystories.py synthesize --size=100MB --seed=7
      python tinystories.py synthesize --stories=5000
    """
    with Workers(config.workers) as workers, prepare.progress_bar("stories", config.size_bytes) as bar:
        record = synthesize(config, workers, bar.update)
    for split, files in record.files.items():
        for file in files:
            print(f"{split:<5}  {config.data_dir / record.source / file.file}  {file.bytes / 1e6:.1f} MB")
    _print_next(TextConfig(source=record.source, data_dir=config.data_dir))


def run_train_vocab(config: TrainVocabConfig) -> None:
    """Train a SentencePiece vocabulary: byte pairs with byte fallback and every space kept, so no text is altered.

    It goes to data/NAME/tokN.model, where pretokenize finds it.

      python tinystories.py train-vocab --vocab-size=4096
      python tinystories.py train-vocab my_novel.txt --vocab-size=1024
    """
    path = prepare.train_vocabulary(config, prepare.find_source(config), config.vocab_size, at_most=False)
    print(f"wrote {path}")
    _print_next(config)


def run_pretokenize(config: PretokenizeConfig) -> None:
    """Write a source as token shards for train.py, into data/NAME/tokN.

    If there is no vocabulary, one of 4096 tokens is trained first. Valid shards that exist are kept, so an interrupted
    command continues where it stopped.

      python tinystories.py pretokenize
      python tinystories.py pretokenize my_novel.txt --vocab-size=1024
      python tinystories.py pretokenize poems.txt --document=blankline --val-fraction=0.1
      python tinystories.py pretokenize --vocab=llama2/tokenizer.model
      python tinystories.py pretokenize tinyshakespeare --vocab=stories15M.bin
    """
    folder = prepare.prepare_shards(config)
    print("next: " + shlex.join(["python", "train.py", *([] if config.data_dir == DATA_DIR else [f"--data={folder}"])]))


def _print_next(config: TextConfig) -> None:
    """Print the command to type next, for the same text."""
    text = {field.name: getattr(config, field.name) for field in dataclasses.fields(TextConfig)}
    print("next: " + prepare.pretokenize_command(TextConfig(**text)))


# Each command's options, the ones that may be given as bare words, and its function, whose docstring is the help text.
COMMANDS: dict[str, tuple[type, tuple[str, ...], Callable[[Any], None]]] = {
    "download": (DownloadConfig, ("source",), run_download),
    "synthesize": (SynthesizeConfig, (), run_synthesize),
    "train-vocab": (TrainVocabConfig, ("source",), run_train_vocab),
    "pretokenize": (PretokenizeConfig, ("source",), run_pretokenize),
}


def main(argv: Sequence[str]) -> int:
    """Run one of the commands; see the top of the file."""
    if not argv:
        raise UsageError(f"no command; it must be {', '.join(COMMANDS)}; see --help")
    if argv[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    name = argv[0].replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"it must be {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command '{argv[0]}'; {hint}")
    config_class, positional, command = COMMANDS[name]
    program, text = f"tinystories.py {name}", inspect.getdoc(command)
    command(parse(config_class, argv[1:], program=program, description=text, positional=positional))
    return 0


if __name__ == "__main__":
    run(main)
