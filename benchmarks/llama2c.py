"""llama2.c's train.py: run from a copy, on this project's data."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamalet.errors import DataError

SEEDS = {
    "train.py": ("torch.manual_seed({} + seed_offset)", 1337),
    "tinystories.py": ("seed = {} + worker_id", 42),
}
"""The two seeds that no option reaches: where each one stands, and what it is."""


def copy_home(source: Path, home: Path, splits: Mapping[str, Any], vocab_size: int, seed: int = 0) -> None:
    """Lay its program and the tokens of both splits into the new folder `home`, where it can run.

    Args:
        source: its repository.
        home: the folder to make.
        splits: `train` and `val`, each a long array of token ids; its first shard is the one it validates on.
        vocab_size: names its folder of shards.
        seed: added to its own two seeds, in the copy; 0 leaves its files as they are.

    Raises:
        DataError: if the seeds are not where they were.
    """
    data = home / "data" / f"tok{vocab_size}"
    data.mkdir(parents=True)
    for file in source.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if seed and file.name in SEEDS:
            words, own = SEEDS[file.name]
            if text.count(words.format(own)) != 1:
                raise DataError(f"{file}: must hold `{words.format(own)}` once; this is another version of llama2.c")
            text = text.replace(words.format(own), words.format(own + seed))
        (home / file.name).write_text(text, encoding="utf-8")
    for name, split in (("data00.bin", "val"), ("data01.bin", "train")):
        splits[split][:].astype("<u2").tofile(data / name)


def start(home: Path, options: Mapping[str, Any], threads: int | None = None) -> "subprocess.Popen[str]":
    """Start its train.py in `home`; it compiles its model, and prints a line a step into the pipe.

    Args:
        home: as `copy_home` leaves it.
        options: its own, by name.
        threads: OpenMP's choice where not given.
    """
    command = [sys.executable, "-u", "train.py", "--compile=True", "--vocab_source=custom", "--out_dir=out"]
    command += [f"--{key}={value}" for key, value in options.items()]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with (home / "stderr.txt").open("w") as log:
        return subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
