"""What a run needs before its first step: data and settings. Trainer.__init__ calls it. Needs no torch."""

import dataclasses

from llamalet.config import ModelConfig
from llamalet.errors import DataError
from llamalet.shards import Shards
from training import resume_check
from training.batches import Windows
from training.config import TrainConfig
from training.data import fingerprint, open_data, read_tokenizer
from training.init_from import StartingPoint
from training.machine.group import Group
from training.run.checkpoint import Checkpoint


def open_same_data(
    config: TrainConfig, group: Group, start: StartingPoint | None
) -> tuple[Shards, tuple[bytes, bytes | None]]:
    """Open the prepared data; return them and the files of their tokenizer (`read_tokenizer`).

    Raises:
        DataError: if there are none, their tokenizer is not the one they were made with, or the processes find
            different data.
        ConfigError: if the vocabulary is not the one asked for.
    """
    data = open_data(config, start.tokenizer_sha256 if start else None, start.tokenizer_path if start else None)
    files = read_tokenizer(data)
    if len(set(group.all_gather(fingerprint(data)))) > 1:
        raise DataError(f"{data.folder}: the processes found different data; name the folder with --data")
    return data, files


def settle(
    config: TrainConfig, group: Group, data: Shards, resumed: Checkpoint | None, start: StartingPoint | None
) -> tuple[TrainConfig, ModelConfig]:
    """Return the settings, with the data folder and the tokens of a step filled in, and the shape of the model.

    What is filled in is saved in checkpoints, so a resumed run has the same data and steps.

    Raises:
        ConfigError: if a setting does not fit the data, the processes, or the model to start from.
    """
    earlier = resumed.model_config if resumed else start.config if start else None
    # A model may have more rows than its tokenizer has tokens; whether it is this tokenizer is checked below.
    vocab_size = max(data.vocab_size, earlier.vocab_size if earlier else 0)
    model_config = config.model_config(vocab_size, earlier.rope_scaling if earlier else None)
    tokens_per_step = config.accumulation(group.count) * group.count * config.batch_size * config.max_seq_len
    config = dataclasses.replace(config, total_batch_tokens=tokens_per_step, data=str(data.folder))
    if resumed:
        resume_check.check(resumed, config, model_config, data)
    if start:
        start.check(model_config, data)
    return config, model_config


def open_windows(data: Shards, split: str, config: TrainConfig) -> Windows:
    """Cut a split into sequences."""
    starts = data.document_starts(split) if config.align_documents else None
    return Windows(data.split(split), config.max_seq_len, starts, config.random_starts)
