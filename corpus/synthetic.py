"""A corpus of stories from the grammar, whose entropy is known and which needs no network."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus import story_grammar
from corpus.sources import RECORD_FILE, SYNTHETIC, Record, RecordedFile, sha256_of
from corpus.workers import Workers
from llamalet.files import replacing
from llamalet.shards import SPLITS

STORIES_PER_TASK = 200


class Task(NamedTuple):
    """A run of stories; its random numbers depend on nothing else."""

    seed: int
    split: int
    number: int


def tell(task: Task) -> list[tuple[bytes, float]]:
    """Draw STORIES_PER_TASK stories; this is what the workers run.

    Returns:
        For each story its line of .jsonl, and its log-probability in nats.
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
        data_dir: where sources lie.
        seed: the same seed gives the same files, on every machine and with any number of workers.
        train_bytes: the size at which train.jsonl is complete, or
        train_stories: the number of its stories.
        val_stories: the number of stories in val.jsonl; each has its log-probability beside it.
        workers: who draws.
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
        files[name] = (RecordedFile(path.name, size, sha256_of(path)),)
    entropy = {"stories": len(log_probs), "nats": -math.fsum(log_probs)}
    record = Record(source=SYNTHETIC, files=files, entropy=entropy)
    record.write(folder)
    return record


def _stories(seed: int, split: int, workers: Workers) -> Iterator[tuple[bytes, float]]:
    """Yield stories without end, drawn by the workers."""
    for stories in workers.map(tell, (Task(seed, split, number) for number in count())):
        yield from stories
