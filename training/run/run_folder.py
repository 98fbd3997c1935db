"""The folder of a run: its lock, its settings, and which of its checkpoints to resume from."""

import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llamalet import strict
from llamalet.errors import CheckpointError, DataError, DiskError, LockedError
from llamalet.files import check_replaceable, check_writable, replacing
from llamalet.model_file.checkpoint import FOLDER, find_best, find_latest, list_steps
from llamalet.model_file.companions import special_ids_path, tokenizer_paths
from training.config import TrainConfig
from training.run import checkpoint
from training.run.metrics import METRICS_FILE
from training.run.progress import say
from training.run.run_state import RunState, backend_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE, CONFIG_FILE = ".lock", "config.toml"
EXPORT = "model.bin"
MAX_HOLDER = 1000  # characters of the lock file


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Keep other runs out of the folder during the block; the lock ends with the process, however it ends.

    Raises:
        LockedError: if another process holds it, naming that process.
        DiskError: if the folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        check_writable(run_dir)
        check_replaceable(run_dir / LOCK_FILE)
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
    """Return the process named in the lock file; it may take a moment to write its name after taking the lock."""
    for _ in range(20):
        file.seek(0)
        try:
            holder = strict.parse_json(file.read(MAX_HOLDER).encode(), LOCK_FILE, DataError)
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            time.sleep(0.05)
    return "another process"


def find_checkpoint(config: TrainConfig, launch: str | None = None) -> Path | None:
    """Return the checkpoint to resume from, or None for a fresh start.

    Args:
        config: `out_dir`, `resume`, `init_from` and `eval_only` are used.
        launch: identifies the torchrun command that started this process; checkpoints that it wrote are resumed from
            even without --resume.

    Raises:
        CheckpointError: if the checkpoint asked for does not exist, or --init_from contradicts --resume.
    """
    if launch is not None:  # torchrun may have restarted the processes
        newest = find_latest(config.out_dir)
        if newest is not None and _is_of(launch, newest):
            return newest
    if config.resume not in (None, "auto") and config.init_from not in ("scratch", "resume"):
        raise CheckpointError(
            f"init_from={config.init_from}: a resumed run has its own weights; leave out --init_from, or leave out "
            "--resume to start a new run"
        )
    if config.resume not in (None, "latest", "auto"):
        named = Path(str(config.resume))
        return find_latest(named) or named  # for a run's folder, its newest checkpoint
    wanted = config.resume == "latest" or config.init_from == "resume"
    if config.eval_only and not wanted:
        best = find_best(config.out_dir)
        if best is None:
            raise CheckpointError(f"{config.out_dir}: no valid checkpoint to evaluate; name another --out_dir")
        return best
    newest = find_latest(config.out_dir) if wanted or config.resume == "auto" else None
    if newest is None and wanted:
        raise CheckpointError(f"{config.out_dir}: no valid checkpoint to resume from; start with `python train.py`")
    return newest


def earlier_backend(config: TrainConfig) -> str | None:
    """Return the backend of the run to resume, torch or numba; None if there is none.

    Nothing is verified yet: `find_checkpoint` has more to say of a checkpoint that cannot be read.
    """
    if config.resume is None and config.init_from != "resume":
        return None
    run_dir = config.out_dir if config.resume in (None, "latest", "auto") else str(config.resume)
    try:
        return backend_of(RunState.read((list_steps(run_dir) or [Path(run_dir)])[-1]).machine)
    except CheckpointError:
        return None


def _is_of(launch: str | None, path: Path) -> bool:
    """Return whether a checkpoint was written by the torchrun command `launch`."""
    return launch is not None and RunState.read(path).launch == launch


def check(config: TrainConfig, resumed: Path | None, launch: str | None = None) -> None:
    """Refuse to mix the checkpoints of two runs, or to remove the one to resume from; check the place of the export.

    Raises:
        CheckpointError: saying what the folder holds and what to do.
        DiskError: if something else is in the place of the files that the run writes at its end.
    """
    export = Path(config.out_dir) / EXPORT
    beside = (special_ids_path(export), *tokenizer_paths(export).values())
    for path in (export, *beside, *(export.with_name(name) for name in (CONFIG_FILE, METRICS_FILE))):
        check_replaceable(path)
    check_writable(export.with_name(FOLDER))
    earlier = list_steps(config.out_dir)
    own = (Path(config.out_dir) / FOLDER).resolve()
    if earlier and resumed is not None and resumed.resolve().is_relative_to(own):
        if config.overwrite and not _is_of(launch, resumed):
            raise CheckpointError(f"{config.out_dir}: --overwrite would remove {resumed}; leave it out to resume")
    elif earlier and not config.overwrite:
        raise CheckpointError(
            f"{config.out_dir}: holds the checkpoints of an earlier run; continue it with --resume, keep it with "
            "--out_dir=OTHER, or remove its checkpoints with --overwrite"
        )


def set_up(run_dir: Path, config: TrainConfig, step: int, *, continues: bool) -> None:
    """Prepare the folder to continue after `step`, and write the settings to config.toml, which train.py can read.

    Args:
        run_dir: the run's out_dir.
        config: the settings.
        step: the step of the checkpoint to resume from, or 0.
        continues: whether that checkpoint is in this folder; then `overwrite` removes nothing.

    Raises:
        DiskError: if the folder cannot be changed.
    """
    if config.overwrite and not continues:
        checkpoint.remove_all(run_dir)
    for path in checkpoint.go_back(run_dir, step):
        say(f"moved a later checkpoint out of the way: {path}")
    settings = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if value is not None and key not in ("source", "resume", "init_from", "overwrite")
    }
    with replacing(run_dir / CONFIG_FILE) as file:
        # Numbers, booleans and strings are the same in JSON and TOML, except for this one character.
        lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())
        file.write("".join(lines).replace("\x7f", "\\u007f").encode())
