"""Save, load and retire the checkpoints of a run. llamalet/model_file/checkpoint.py describes their files.

A checkpoint is written to .step-N.tmp, synced to disk and renamed, so a step-* folder is complete unless it was damaged
later, which the digests show. An existing checkpoint of the same step is first renamed to .step-N.old, which counts as
step-N while there is no folder of that name: killing a save at any moment leaves the previous checkpoint in place.
Nothing in a checkpoint is unpickled. When a run resumes from an earlier step, the later checkpoints move to
checkpoints/abandoned/, where they are found only by path.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamalet.config import ModelConfig
from llamalet.convert import safetensors_file
from llamalet.errors import CheckpointError, DiskError, FormatError, NonFiniteError, note
from llamalet.files import read_file, sync_folder
from llamalet.hf_names import GENERATION_CONFIG_JSON, MODEL_SAFETENSORS
from llamalet.model_file import checkpoint as layout
from training.run.run_state import RunState

Arrays = Mapping[str, NDArray[Any]]

_DTYPES = {np.dtype(numpy_name): name for name, numpy_name in safetensors_file.DTYPES.items() if name != "BF16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint in memory."""

    path: Path
    state: RunState
    model_state: dict[str, NDArray[Any]]
    """The weights under their names in model.safetensors."""
    optimizer_state: dict[str, NDArray[Any]]
    """The optimizer's tensors, named `parameter:slot`."""

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the model."""
        return self.state.model_config


def save(
    run_dir: Path,
    state: RunState,
    *,
    model_state: Arrays,
    optimizer_state: Arrays,
    tokenizer_data: bytes,
    tokenizer_ids: bytes | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint durably, then remove old ones: all but the newest `keep` and the best.

    Args:
        run_dir: the run's out_dir.
        state: the contents of state.json.
        model_state: the weights under their names in model.safetensors.
        optimizer_state: the optimizer's tensors, named `parameter:slot`.
        tokenizer_data: the contents of the file `state.tokenizer`.
        tokenizer_ids: what begins and ends texts, a generation_config.json, if the tokenizer's file does not say it.
        keep: number of newest checkpoints to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        NonFiniteError: if a weight or an optimizer tensor is not finite; nothing is written then.
        DiskError: if the disk is full or fails; older checkpoints are untouched then.
    """
    final = run_dir / layout.FOLDER / f"step-{state.step:08d}"
    tensors = {MODEL_SAFETENSORS: model_state, layout.OPTIMIZER: optimizer_state}
    for name, arrays in tensors.items():
        _refuse_non_finite(final / name, arrays)
    texts = {layout.STATE: _json(state.to_json()), state.tokenizer: tokenizer_data}
    if tokenizer_ids is not None:
        texts[GENERATION_CONFIG_JSON] = tokenizer_ids
    n_bytes = sum(array.nbytes for arrays in tensors.values() for array in arrays.values())
    n_bytes += sum(len(text) for text in texts.values())
    try:
        with _replacing(final) as folder:
            entries = {name: _write(folder / name, _encode(arrays)) for name, arrays in tensors.items()}
            entries |= {name: _write(folder / name, [text]) for name, text in texts.items()}
            manifest = {"format": layout.FORMAT, "version": layout.VERSION, "step": state.step, "files": entries}
            _write(folder / layout.MANIFEST, [_json(manifest)])
    except OSError as error:
        older = layout.list_steps(run_dir)
        raise DiskError(
            f"{final}: cannot save its {n_bytes:,} bytes: {error.strerror or error}; "
            + ("older checkpoints are untouched, continue with --resume" if older else "there is no older checkpoint")
        ) from error
    try:
        _remove(_old(final))
        _retire(run_dir, keep, final)
    except OSError as error:
        note(f"warning: {final.parent}: cannot remove old checkpoints: {error.strerror or error}")
    return final


@contextlib.contextmanager
def _replacing(final: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `final`, durably, at the end of the block; if that fails, undo everything.

    What was `final` before is left as `_old(final)`.
    """
    parent, tmp, old = final.parent, final.with_name(f".{final.name}.tmp"), _old(final)
    renamed = False
    try:
        if not parent.exists():
            parent.mkdir(parents=True)
            sync_folder(parent.parent)
            sync_folder(parent.parent.parent)
        _remove(tmp)
        tmp.mkdir()
        yield tmp
        sync_folder(tmp)
        if final.exists():  # if it does not, .old may be the only copy of this step: it stays until the next rename
            _remove(old)
            os.rename(final, old)
        os.rename(tmp, final)
        renamed = True
        sync_folder(parent)
    except BaseException:
        with contextlib.suppress(OSError):
            if renamed:
                os.rename(final, tmp)
            if old.exists() and not final.exists():
                os.rename(old, final)
            _remove(tmp)
        raise


def _old(final: Path) -> Path:
    """Return the name of a checkpoint that is being replaced."""
    return final.with_name(f".{final.name}.old")


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint after comparing every file with its digest.

    Raises:
        CheckpointError: if it is missing, incomplete, damaged or of a newer version.
    """
    path = Path(path)
    layout.verify(path)
    try:
        loaded = Checkpoint(
            path=path,
            state=RunState.read(path),
            model_state=safetensors_file.read_arrays(path / MODEL_SAFETENSORS),
            optimizer_state=safetensors_file.read_arrays(path / layout.OPTIMIZER),
        )
    except (OSError, FormatError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    for key, array in loaded.optimizer_state.items():
        weight = loaded.model_state.get(key.rpartition(":")[0])
        if weight is None or array.shape not in ((), weight.shape):
            raise CheckpointError(f"{path / layout.OPTIMIZER}: {key}, {array.shape}, belongs to no weight of the model")
    return loaded


def label(path: Path) -> str:
    """Return a checkpoint's name and the start of its manifest's sha256, to tell two checkpoints apart."""
    manifest = path / layout.MANIFEST
    return f"{path.name} {hashlib.sha256(read_file(manifest)).hexdigest()[:8] if manifest.exists() else 'missing'}"


def remove_all(run_dir: Path) -> None:
    """Remove every checkpoint of a run.

    Raises:
        DiskError: if that fails.
    """
    try:
        _remove(run_dir / layout.FOLDER)
    except OSError as error:
        raise DiskError(f"{run_dir / layout.FOLDER}: cannot be removed: {error.strerror or error}") from error


def go_back(run_dir: Path, step: int) -> list[Path]:
    """Prepare a run's folder to continue after `step`; return the new paths of the later checkpoints.

    Those belong to a branch that the run abandons: they must neither displace its new checkpoints nor be resumed or
    exported instead. The leftovers of killed saves are restored or removed.

    Raises:
        DiskError: if the folder cannot be changed.
    """
    parent = run_dir / layout.FOLDER
    moved = []
    try:
        for path in layout.list_steps(run_dir):
            if path.name.startswith("."):
                path.rename(parent / f"step-{layout.step_of(path):08d}")
        for debris in parent.glob(".step-*"):
            shutil.rmtree(debris)
        for path in layout.list_steps(run_dir):
            if int(path.name.removeprefix("step-")) > step:
                target = parent / layout.ABANDONED / path.name
                target.parent.mkdir(exist_ok=True)
                _remove(target)
                moved.append(path.rename(target))
    except OSError as error:
        raise DiskError(f"{parent}: cannot be cleaned up: {error.strerror or error}") from error
    return moved


def _refuse_non_finite(path: Path, arrays: Arrays) -> None:
    """Raise NonFiniteError if a value that would go to `path` is NaN or infinite."""
    for name, array in arrays.items():
        # The extremes are NaN if any value is, and need no temporary array.
        if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
            raise NonFiniteError(f"{path}: not saved: {name} is not finite; older checkpoints are untouched")


def _encode(arrays: Arrays) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, one tensor at a time, so that they are never copied as a whole."""
    layout = {name: (_DTYPES[array.dtype], array.shape) for name, array in sorted(arrays.items())}
    return safetensors_file.encode(layout, lambda name: [arrays[name]])


def _json(value: Any) -> bytes:
    """Return readable JSON; NaN is refused."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write and sync one file, and return its entry in the manifest."""
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _retire(run_dir: Path, keep: int, written: Path) -> None:
    """Remove all checkpoints but the one just written and, of the complete ones, the newest `keep` and the best."""
    steps = layout.list_steps(run_dir)
    complete = [path for path in steps if _is_complete(path)]
    kept = {written, *complete[-keep:], *layout.best_first(complete)[:1]}
    for path in steps:
        if path not in kept:
            _remove(path)


def _is_complete(path: Path) -> bool:
    """Return whether all files have their sizes; comparing digests would double the time of a save."""
    try:
        layout.verify(path, digests=False)
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a folder if it exists; rename it first, so that a half-removed checkpoint is never taken for one."""
    if path.exists():
        doomed = path.with_name(f".{path.name.lstrip('.')}.gone")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed)
