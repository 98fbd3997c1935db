"""The prepared data that a run reads: which they are, and whether all who read them read the same."""

import hashlib
import shlex
from typing import TYPE_CHECKING

from llamalet import tokenizer
from llamalet.errors import ConfigError, DataError
from llamalet.shards import Shards, find_newest
from training.config import TrainConfig

if TYPE_CHECKING:
    from training.init_from import StartingPoint


def open_data(config: TrainConfig, start: "StartingPoint | None" = None) -> Shards:
    """Open the prepared data that the config names, or the newest.

    Args:
        config: where they are.
        start: the model to train further; of several data, the newest with its vocabulary are taken.

    Raises:
        DataError: if there are none.
        ConfigError: if their vocabulary is not the one asked for.
    """
    root = config.data or "data"
    folder = None
    if start and start.tokenizer_sha256:
        folder = find_newest(root, tokenizer_sha256=start.tokenizer_sha256)
    folder = folder or find_newest(root)
    if folder is None:
        vocab = f" --vocab={shlex.quote(start.tokenizer_path)}" if start and start.tokenizer_path else ""
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
    """Return what differs where the tokens of prepared data differ: 64 characters."""
    digests = [shard.sha256 for split in data.meta.splits.values() for shard in split.shards]
    return hashlib.sha256("".join([data.tokenizer_sha256, *digests]).encode()).hexdigest()


def read_tokenizer(data: Shards) -> bytes:
    """Return the file of the data's tokenizer, which goes into each checkpoint.

    Raises:
        DataError: if it is not the one that the data were made with.
        TokenizerError: if it is missing or damaged.
    """
    if tokenizer.load(data.tokenizer_path).sha256 != data.tokenizer_sha256:
        raise DataError(f"{data.tokenizer_path}: not the vocabulary that the data were made with; prepare them again")
    return data.tokenizer_path.read_bytes()
