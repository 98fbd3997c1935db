"""The folder of a run: who may write into it, what it was set to, and which of its checkpoints to go on from."""

import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llamalet.errors import CheckpointError, DiskError, LockedError
from llamalet.files import replacing
from training.config import TrainConfig
from training.run import checkpoint
from training.run.progress import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE, CONFIG_FILE = ".lock", "config.toml"


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Keep other runs out of the folder for the block; the lock ends with the process, however it ends.

    Raises:
        LockedError: if another process holds it, naming that process.
        DiskError: if the folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(run_dir / LOCK_FILE, "a+", encoding="utf-8"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            os.write(file.fileno(), json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
        except BlockingIOError:
            raise LockedError(
                f"{run_dir}: in use by {_holder(file)}; wait for it, stop it, or give another --out_dir"
            ) from None
        except OSError as error:
            raise DiskError(f"{run_dir}: cannot be written to: {error.strerror or error}") from error
        yield


def _holder(file: IO[str]) -> str:
    """Return who wrote the lock file; who has just taken the lock may be about to."""
    for _ in range(20):
        file.seek(0)
        try:
            holder = json.load(file)
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "another process"


def find_checkpoint(config: TrainConfig, launch: str | None = None) -> Path | None:
    """Return the checkpoint to go on from, or None for a fresh start.

    Args:
        config: says where to look.
        launch: which start of torchrun this process is of; its own checkpoints are gone on from without being asked.

    Raises:
        CheckpointError: if one must be there and is not, or the run shall begin with another model's weights too.
    """
    if launch is not None:  # torchrun may have started the processes again, and the run goes on without being asked
        newest = checkpoint.find_latest(config.out_dir)
        if newest is not None and _is_of(launch, newest):
            return newest
    if config.resume not in (None, "auto") and config.init_from not in ("scratch", "resume"):
        raise CheckpointError(
            f"init_from={config.init_from}: a run that goes on has its own weights; leave out --init_from, or --resume "
            "to start anew"
        )
    if config.resume not in (None, "latest", "auto"):
        named = Path(str(config.resume))
        return checkpoint.find_latest(named) or named  # a run's folder is as good as its newest checkpoint
    wanted = config.resume == "latest" or config.init_from == "resume"
    if config.eval_only and not wanted:
        best = checkpoint.find_best(config.out_dir)
        if best is None:
            raise CheckpointError(f"{config.out_dir}: no sound checkpoint to evaluate; name another --out_dir")
        return best
    newest = checkpoint.find_latest(config.out_dir) if wanted or config.resume == "auto" else None
    if newest is None and wanted:
        raise CheckpointError(f"{config.out_dir}: no sound checkpoint to go on from; start with `python train.py`")
    return newest


def _is_of(launch: str | None, path: Path) -> bool:
    """Return whether a checkpoint was written since torchrun was started."""
    return launch is not None and checkpoint.read_state(path).get("launch") == launch


def check(config: TrainConfig, resumed: Path | None, launch: str | None = None) -> None:
    """Refuse to mix the checkpoints of two runs, or to remove the one to go on from.

    Raises:
        CheckpointError: saying what the folder holds and what to do.
    """
    earlier = checkpoint.list_steps(config.out_dir)
    own = (Path(config.out_dir) / checkpoint.FOLDER).resolve()
    if earlier and resumed is not None and resumed.resolve().is_relative_to(own):
        if config.overwrite and not _is_of(launch, resumed):
            raise CheckpointError(f"{config.out_dir}: --overwrite would remove {resumed}; leave it out to go on")
    elif earlier and not config.overwrite:
        raise CheckpointError(
            f"{config.out_dir}: holds the checkpoints of an earlier run; go on with --resume, keep them with "
            f"--out_dir=OTHER, or lose them with --overwrite"
        )


def prepare(run_dir: Path, config: TrainConfig, step: int, *, goes_on: bool) -> None:
    """Make the folder ready to go on after `step`, with the settings in a config.toml that train.py reads back.

    Args:
        run_dir: the run's out_dir.
        config: the settings.
        step: the step of the checkpoint to go on from, or 0.
        goes_on: whether that checkpoint lies in this folder, which `overwrite` leaves alone then.

    Raises:
        DiskError: if the folder cannot be changed.
    """
    if config.overwrite and not goes_on:
        checkpoint.remove_all(run_dir)
    for path in checkpoint.go_back(run_dir, step):
        say(f"a later checkpoint is out of the way: {path}")
    settings = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if value is not None and key not in ("source", "resume", "init_from", "overwrite")
    }
    with replacing(run_dir / CONFIG_FILE) as file:
        # Numbers, booleans and strings are written alike in JSON and TOML, but for this one character.
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())
        file.write("".join(lines).replace("\x7f", "\\u007f").encode())
