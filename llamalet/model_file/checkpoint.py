"""Training checkpoints: their layout, finding the right one, and checking it. Nothing here needs torch.

    out/checkpoints/step-00001000/
        model.safetensors       the weights, under the model's own names
        optimizer.safetensors   the optimizer's tensors, as `parameter:slot`
        state.json              model config, step, validation loss, data, train config
        tokenizer.bin           the vocabulary the model was trained with
        generation_config.json  what begins and ends its texts, if the vocabulary's file does not say it
        manifest.json           size and sha256 of each file above; written last

A checkpoint is written to .step-N.tmp, synced and renamed. While a step is saved a second time, .step-N.old holds the
first version, and counts as step N if there is no step-N. Steps that a run went back on are in checkpoints/abandoned/
and are found only by their full path. training/run/checkpoint.py writes all this; convert/checkpoint_file.py reads it
as a model.
"""

import hashlib
import math
import os
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llamalet import strict
from llamalet.config import ModelConfig
from llamalet.errors import CheckpointError, note
from llamalet.files import open_file
from llamalet.hf_names import MODEL_SAFETENSORS

FORMAT = "llamalet checkpoint"
VERSION = 1
FOLDER, ABANDONED = "checkpoints", "abandoned"
OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "state.json", "manifest.json"
SUFFIX = ".weight"
"""Ends every name in model.safetensors, as in a PyTorch state dict; names in model files lack it."""

MISSING = "no such file; the checkpoint is incomplete"

_STEP = re.compile(r"step-(\d{8,})|\.step-(\d{8,})\.old")


class Facts(NamedTuple):
    """What a reader of the model needs of state.json; training.run.run_state.RunState has all of it."""

    step: int
    """Optimizer steps done."""
    model_config: ModelConfig
    """Shape of the model."""
    tokenizer: str
    """Name of the tokenizer's file in the checkpoint."""
    val_loss: float | None = None
    """Validation loss in nats per token; None if it was not measured at this step."""
    tokenizer_sha256: str | None = None
    """Digest of the vocabulary."""
    data: str | None = None
    """Folder of the prepared data."""


class _Seal(NamedTuple):
    """Size and digest of a file, as manifest.json has them."""

    bytes: int
    sha256: str


class _Manifest(NamedTuple):
    """The contents of manifest.json."""

    step: int
    files: dict[str, _Seal]


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
    return strict.read_json(path / STATE, CheckpointError, MISSING)


def read_facts(path: Path) -> Facts:
    """Return what a checkpoint's state.json says of the model.

    Raises:
        CheckpointError: if it cannot be read, or a field is missing or wrong.
    """
    facts = strict.build(Facts, read_state(path), str(path / STATE), CheckpointError, ignore_unknown=True)
    if not strict.is_file_name(facts.tokenizer):
        raise CheckpointError(
            f"{path / STATE}: tokenizer={reprlib.repr(facts.tokenizer)}: must be the name of a file in the same folder"
        )
    return facts


def verify(path: Path, *, digests: bool = True) -> None:
    """Compare a checkpoint's files with its manifest; only their sizes if `digests` is false.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint; a checkpoint is a folder out/checkpoints/step-00001000")
    fields = strict.read_json(path / MANIFEST, CheckpointError, MISSING)
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        if fields.get(key) != expected:
            raise CheckpointError(
                f"{path / MANIFEST}: {key} is {reprlib.repr(fields.get(key))}, this program reads {expected!r}"
            )
    manifest = strict.build(_Manifest, fields, str(path / MANIFEST), CheckpointError, ignore_unknown=True)
    if not {MODEL_SAFETENSORS, OPTIMIZER, STATE} <= manifest.files.keys():
        raise CheckpointError(f"{path / MANIFEST}: must list {MODEL_SAFETENSORS}, {OPTIMIZER} and {STATE}")
    for name, seal in manifest.files.items():
        if not strict.is_file_name(name) or not (path / name).is_file():
            raise CheckpointError(f"{path / MANIFEST}: lists {reprlib.repr(name)}, which is no file beside it")
        try:
            with open_file(path / name) as file:
                size, digest = os.fstat(file.fileno()).st_size, None
                if digests and size == seal.bytes:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error.strerror}") from None
        if size != seal.bytes:
            raise CheckpointError(f"{path / name}: has {size} bytes, must have {seal.bytes}")
        if digests and digest != seal.sha256:
            raise CheckpointError(f"{path / name}: damaged, its sha256 does not match the manifest")
    if manifest.step != (found := read_state(path).get("step")):
        raise CheckpointError(f"{path / MANIFEST}: step is {manifest.step}, not that of {STATE}: {reprlib.repr(found)}")


def _val_loss(path: Path) -> float:
    """Return the validation loss that a checkpoint records; infinity if it has none or cannot be read."""
    try:
        loss = read_facts(path).val_loss
    except CheckpointError:
        return math.inf
    return math.inf if loss is None else loss


def _first_valid(paths: Iterable[Path]) -> Path | None:
    """Return the first checkpoint that passes `verify`, or None; each one before it is named on stderr."""
    for path in paths:
        try:
            verify(path)
        except CheckpointError as error:
            note(f"warning: checkpoint {path.name} is skipped: {error}")
        else:
            return path
    return None
