"""Run a copy of llama2.c's train.py on this project's data."""

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
"""The two seeds that have no option: where they are in its files, and their values."""


def copy_home(source: Path, home: Path, splits: Mapping[str, Any], vocab_size: int, seed: int = 0) -> None:
    """Copy its program and the tokens of both splits into the new folder `home`, where it can run.

    Args:
        source: its repository.
        home: the folder to create.
        splits: `train` and `val`, each a long array of token ids; it validates on its first shard.
        vocab_size: part of the name of its folder of shards.
        seed: added to its own two seeds, in the copy; 0 leaves its files unchanged.

    Raises:
        DataError: if the seeds are not found.
    """
    data = home / "data" / f"tok{vocab_size}"
    data.mkdir(parents=True)
    for file in source.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if seed and file.name in SEEDS:
            words, own = SEEDS[file.name]
            if text.count(words.format(own)) != 1:
                raise DataError(f"{file}: must contain `{words.format(own)}` once; this is another version of llama2.c")
            text = text.replace(words.format(own), words.format(own + seed))
        (home / file.name).write_text(text, encoding="utf-8")
    for name, split in (("data00.bin", "val"), ("data01.bin", "train")):
        splits[split][:].astype("<u2").tofile(data / name)


# Runs train.py unchanged and prints, every second, its peak GPU memory, which cannot be read from outside.
LAUNCHER = """
import runpy, sys, threading, time, torch
def report_memory():
    while torch.cuda.is_available():
        print("memory", torch.cuda.max_memory_allocated(), flush=True)
        time.sleep(1)
threading.Thread(target=report_memory, daemon=True).start()
sys.path.insert(0, ".")
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""
LOG = "stderr.txt"


def start(home: Path, options: Mapping[str, Any], threads: int | None = None) -> "subprocess.Popen[str]":
    """Start its train.py, compiled, in `home`; its lines, one per step, go into the pipe and its errors into LOG.

    Args:
        home: a folder made by `copy_home`.
        options: options of train.py, by name.
        threads: CPU threads; OpenMP's default if None.
    """
    options = {"compile": True, "vocab_source": "custom", "out_dir": "out", **options}
    command = [sys.executable, "-u", "-c", LAUNCHER, *(f"--{key}={value}" for key, value in options.items())]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with (home / LOG).open("w") as log:
        return subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
