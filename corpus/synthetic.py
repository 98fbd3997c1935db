"""A corpus of stories from the grammar: it needs no network, and its entropy is known."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus.record import RECORD_FILE, Record, RecordedFile
from corpus.sources import SYNTHETIC
from corpus.workers import Workers
from llamalet import story_grammar
from llamalet.checks import not_positive
from llamalet.errors import ConfigError
from llamalet.files import check_replaceable, check_writable, replacing
from llamalet.shards import DATA_ROOT, SPLITS

STORIES_PER_TASK = 200
BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([kMG]?)B?", re.IGNORECASE)
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """How many stories to write."""

    size: str | None = None
    """Size of the training stories, such as 500kB, 10MB or 1GB; 20MB if neither size nor stories is given."""
    stories: int | None = None
    """Number of training stories, instead of a size."""
    val_stories: int = 1000
    """Number of validation stories."""
    seed: int = 0
    """Seed of the stories; the same seed gives the same bytes."""
    workers: int | None = None
    """Processes that write; one per core by default. The files do not depend on it."""
    data_dir: Path = Path(DATA_ROOT)
    """Folder of sources and prepared data."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        ConfigError.raise_for(not_positive(self, "stories", "val_stories", "workers"))
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")
        if self.size is not None and (self.stories is not None or not self.size_bytes):
            raise ConfigError(f"size={self.size}: must be like 500kB, 10MB or 1GB, and without stories=")

    @property
    def size_bytes(self) -> int | None:
        """The size as a number; None if the number of stories is given instead."""
        if self.stories is not None:
            return None
        match = BYTES.fullmatch(self.size or "20MB")
        return int(float(match[1]) * UNITS[match[2].upper()]) if match else 0


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


def synthesize(config: SynthesizeConfig, workers: Workers, advance: Callable[[int], object]) -> Record:
    """Write data_dir/synthetic: train.jsonl, val.jsonl, and source.json with the entropy of the validation stories.

    Args:
        config: what to write; the same gives the same files, on every machine and with any number of workers.
        workers: the processes that draw.
        advance: called with the number of bytes written.

    Raises:
        DiskError: if the disk is full.
    """
    folder, train_bytes = config.data_dir / SYNTHETIC, config.size_bytes
    check_writable(folder)
    for name in (*(f"{name}.jsonl" for name in SPLITS), RECORD_FILE):
        check_replaceable(folder / name)
    (folder / RECORD_FILE).unlink(missing_ok=True)
    files: dict[str, tuple[RecordedFile, ...]] = {}
    log_probs: list[float] = []
    for split, name in enumerate(SPLITS):
        stories = _stories(config.seed, split, workers)
        chosen = islice(stories, config.val_stories if name == "val" else config.stories)
        path = folder / f"{name}.jsonl"
        with replacing(path) as file:
            for line, log_prob in chosen:
                file.write(line)
                advance(len(line))
                if name == "val":
                    log_probs.append(log_prob)
                elif train_bytes is not None and file.tell() >= train_bytes:
                    break
        files[name] = (RecordedFile.of(path, folder),)
    entropy = {"stories": len(log_probs), "nats": -math.fsum(log_probs)}
    return Record(source=SYNTHETIC, files=files, entropy=entropy).write(folder)


def _stories(seed: int, split: int, workers: Workers) -> Iterator[tuple[bytes, float]]:
    """Yield stories endlessly, drawn by the workers."""
    for stories in workers.map(draw_stories, (StoryTask(seed, split, number) for number in count())):
        yield from stories
