"""Training checkpoints: their layout, finding the right one, and checking it. Nothing here needs torch.

    out/checkpoints/step-00001000/
        model.safetensors       the weights, under the model's own names
        optimizer.safetensors   the optimizer's tensors, as `parameter:slot`
        state.json              model config, step, validation loss, data, train config
        tokenizer.bin           the vocabulary the model was trained with
        manifest.json           size and sha256 of each file above; written last

A checkpoint is written to .step-N.tmp, synced and renamed. While a step is saved a second time, .step-N.old holds the
first version, and counts as step N if there is no step-N. Steps that a run went back on are in checkpoints/abandoned/
and are found only by their full path. training/run/checkpoint.py writes all this; convert/checkpoint_file.py reads it
as a model.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamalet.errors import CheckpointError

FORMAT = "llamalet checkpoint"
VERSION = 1
FOLDER, ABANDONED = "checkpoints", "abandoned"
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
SUFFIX = ".weight"
"""Ends every name in model.safetensors, as in a PyTorch state dict; names in model files lack it."""

_STEP = re.compile(r"step-(\d{8,})|\.step-(\d{8,})\.old")


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint's folder, None for any other path."""
    match = _STEP.fullmatch(path.name)
    return int(match[1] or match[2]) if match else None


def list_steps(run_dir: str | Path) -> list[Path]:
    """Return a run's checkpoint folders, valid or not, oldest step first; one for each step."""
    paths = sorted((Path(run_dir) / FOLDER).glob("*"))  # a .step-N.old comes before its step-N, which takes its place
    found = {step: path for path in paths if (step := step_of(path)) is not None}
    return [found[step] for step in sorted(found)]


def best_first(steps: Iterable[Path]) -> list[Path]:
    """Return checkpoints sorted by validation loss; those without one come last, the newest of them first."""
    return sorted(sorted(steps, reverse=True), key=_val_loss)


def find_latest(run_dir: str | Path) -> Path | None:
    """Return a run's newest valid checkpoint, or None; invalid ones are named on stderr."""
    return _first_valid(reversed(list_steps(run_dir)))


def find_best(run_dir: str | Path) -> Path | None:
    """Return a run's best valid checkpoint, or None; invalid ones are named on stderr.

    The best has the lowest validation loss; if none was measured, the newest is the best.
    """
    return _first_valid(best_first(list_steps(run_dir)))


def newest_best(root: str | Path = "out") -> Path | None:
    """Return the best valid checkpoint of the run under `root` that saved last, or None."""
    folders = [path for path in Path(root).glob(f"**/{FOLDER}") if list_steps(path.parent)]
    newest = max(folders, key=lambda path: list_steps(path.parent)[-1].stat().st_mtime_ns, default=None)
    return find_best(newest.parent) if newest else None


def best_of(path: Path) -> Path:
    """Return the best valid checkpoint of a run's folder; any other path is returned as it is.

    Raises:
        CheckpointError: if none of the run's checkpoints is valid.
    """
    if not list_steps(path):
        return path
    best = find_best(path)
    if best is None:
        raise CheckpointError(f"{path}: none of its checkpoints is valid")
    return best


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json.

    Raises:
        CheckpointError: if it cannot be read.
    """
    return _read_json(path / STATE)


def verify(path: Path, *, digests: bool = True) -> None:
    """Compare a checkpoint's files with its manifest; only their sizes if `digests` is false.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint; a checkpoint is a folder out/checkpoints/step-00001000")
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: format is {manifest.get('format')!r}, must be {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path / MANIFEST}: version is {manifest.get('version')!r}, this program reads {VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not {MODEL, OPTIMIZER, STATE} <= files.keys():
        raise CheckpointError(f"{path / MANIFEST}: must list {MODEL}, {OPTIMIZER} and {STATE}")
    for name, seal in files.items():
        if Path(name).name != name or not isinstance(seal, dict):
            raise CheckpointError(f"{path / MANIFEST}: bad entry for {name!r}")
        try:
            with (path / name).open("rb") as file:
                size, digest = os.fstat(file.fileno()).st_size, None
                if digests and size == seal.get("bytes"):
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from None
        if size != seal.get("bytes"):
            raise CheckpointError(f"{path / name}: has {size} bytes, must have {seal.get('bytes')}")
        if digests and digest != seal.get("sha256"):
            raise CheckpointError(f"{path / name}: damaged, its sha256 does not match the manifest")
    if manifest.get("step") != read_state(path).get("step"):
        raise CheckpointError(f"{path / MANIFEST}: step is {manifest.get('step')!r}, not that of {STATE}")


def _val_loss(path: Path) -> float:
    """Return the validation loss that a checkpoint records; infinity if it has none or cannot be read."""
    try:
        loss = read_state(path).get("val_loss")
    except CheckpointError:
        return math.inf
    return loss if isinstance(loss, float) else math.inf


def _first_valid(paths: Iterable[Path]) -> Path | None:
    """Return the first checkpoint that passes `verify`, or None; each one before it is named on stderr."""
    for path in paths:
        try:
            verify(path)
        except CheckpointError as error:
            print(f"warning: checkpoint {path.name} is skipped: {error}", file=sys.stderr, flush=True)
        else:
            return path
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object or raise CheckpointError."""
    try:
        table = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; the checkpoint is incomplete") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return table
