"""A corpus of stories from the grammar: it needs no network, and its entropy is known."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus import story_grammar
from corpus.record import RECORD_FILE, Record, RecordedFile
from corpus.sources import SYNTHETIC
from corpus.workers import Workers
from llamalet.files import replacing
from llamalet.shards import SPLITS

STORIES_PER_TASK = 200


class StoryTask(NamedTuple):
    """STORIES_PER_TASK consecutive stories; these three numbers alone seed them."""

    seed: int
    split: int
    number: int


def draw_stories(task: StoryTask) -> list[tuple[bytes, float]]:
    """Draw STORIES_PER_TASK stories; runs in the workers.

    Returns:
        The .jsonl line of each story and its log-probability in nats.
    """
    rng = np.random.default_rng(task)
    stories = []
    for text, log_prob in (story_grammar.draw_scored(rng) for _ in range(STORIES_PER_TASK)):
        row = {"text": text} if SPLITS[task.split] == "train" else {"text": text, "log_prob": log_prob}
        stories.append((json.dumps(row).encode() + b"\n", log_prob))
    return stories


def synthesize(
    data_dir: Path,
    *,
    seed: int,
    train_bytes: int | None,
    train_stories: int | None,
    val_stories: int,
    workers: Workers,
    advance: Callable[[int], object],
) -> Record:
    """Write data_dir/synthetic: train.jsonl, val.jsonl, and source.json with the entropy of the validation stories.

    Args:
        data_dir: the folder of all sources.
        seed: the same seed gives the same files, on every machine and with any number of workers.
        train_bytes: the size at which train.jsonl is complete, or
        train_stories: its number of stories.
        val_stories: the number of stories in val.jsonl, each with its log-probability.
        workers: the processes that draw.
        advance: called with the number of bytes written.

    Raises:
        DiskError: if the disk is full.
    """
    folder = data_dir / SYNTHETIC
    (folder / RECORD_FILE).unlink(missing_ok=True)
    files: dict[str, tuple[RecordedFile, ...]] = {}
    log_probs: list[float] = []
    for split, name in enumerate(SPLITS):
        stories = _stories(seed, split, workers)
        chosen = islice(stories, val_stories if name == "val" else train_stories)
        path = folder / f"{name}.jsonl"
        size = 0
        with replacing(path) as file:
            for line, log_prob in chosen:
                file.write(line)
                size += len(line)
                advance(len(line))
                if name == "val":
                    log_probs.append(log_prob)
                elif train_bytes is not None and size >= train_bytes:
                    break
        files[name] = (RecordedFile.of(path, folder),)
    entropy = {"stories": len(log_probs), "nats": -math.fsum(log_probs)}
    record = Record(source=SYNTHETIC, files=files, entropy=entropy)
    record.write(folder)
    return record


def _stories(seed: int, split: int, workers: Workers) -> Iterator[tuple[bytes, float]]:
    """Yield stories endlessly, drawn by the workers."""
    for stories in workers.map(draw_stories, (StoryTask(seed, split, number) for number in count())):
        yield from stories
