"""The prepared data that a run reads: find them, and check that every process reads the same."""

import hashlib
import shlex

from llamalet import tokenizer
from llamalet.errors import ConfigError, DataError
from llamalet.shards import Shards, find_newest
from llamalet.tokenizer import ids_file
from training.config import TrainConfig


def open_data(config: TrainConfig, tokenizer_sha256: str | None = None, tokenizer_path: str | None = None) -> Shards:
    """Open the prepared data that the config names, or the newest below data/.

    Args:
        config: `data` and `vocab_size` are used.
        tokenizer_sha256: the vocabulary of a model to train further; the newest data with it are preferred.
        tokenizer_path: its file, for the command in the error if there are no data.

    Raises:
        DataError: if there are no data.
        ConfigError: if their vocabulary is not the one asked for.
    """
    root = config.data or "data"
    folder = find_newest(root, tokenizer_sha256=tokenizer_sha256) if tokenizer_sha256 else None
    folder = folder or find_newest(root)
    if folder is None:
        vocab = f" --vocab={shlex.quote(tokenizer_path)}" if tokenizer_path else ""
        raise DataError(
            f"{root}: no prepared data; make some with `python tinystories.py download` (offline: `synthesize`), then "
            f"`python tinystories.py pretokenize{vocab}`"
        )
    data = Shards.open(folder)
    if config.vocab_size not in (None, data.vocab_size):
        raise ConfigError(
            f"vocab_size={config.vocab_size}: the data in {folder} have {data.vocab_size}; leave the option out, or "
            f"prepare data with `python tinystories.py pretokenize --vocab-size={config.vocab_size}`"
        )
    return data


def fingerprint(data: Shards) -> str:
    """Return a sha256 in hex (64 characters) over the digests of the vocabulary and all shards."""
    digests = [shard.sha256 for split in data.meta.splits.values() for shard in split.shards]
    return hashlib.sha256("".join([data.tokenizer_sha256, *digests]).encode()).hexdigest()


def read_tokenizer(data: Shards) -> tuple[bytes, bytes | None]:
    """Return the contents of the data's tokenizer file and of the file that says what begins and ends texts, if any.

    Copies of both go into each checkpoint.

    Raises:
        DataError: if it is not the tokenizer that the data were made with.
        TokenizerError: if it is missing or damaged.
    """
    if tokenizer.load(data.tokenizer_path).sha256 != data.tokenizer_sha256:
        raise DataError(f"{data.tokenizer_path}: not the vocabulary that the data were made with; prepare them again")
    ids = ids_file.ids_path(data.tokenizer_path)
    return data.tokenizer_path.read_bytes(), ids.read_bytes() if ids.is_file() else None
