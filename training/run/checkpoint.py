"""Checkpoints: folders that describe themselves, appear whole or not at all, and are checked before they are trusted.

    out/checkpoints/step-00001000/
        model.safetensors       the weights, under the model's own names
        optimizer.safetensors   the optimizer's tensors, as `parameter:slot`
        state.json              model config, step, validation loss, data, train config
        tokenizer.bin           the vocabulary the model was trained with
        manifest.json           size and sha256 of each file above; written last

A checkpoint is written aside (.step-N.tmp), synced to disk and renamed, so that a step-* folder is complete, or was
damaged later, which the digests show. One of the same step is first renamed to .step-N.old, which stands in for step-N
as long as there is no such folder: whenever a save is killed, what was saved before is found. Nothing in a checkpoint
is ever unpickled. A run that goes back to an earlier step moves the later ones into checkpoints/abandoned/, where
nothing finds them unless it is told to.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from llamalet.config import ModelConfig
from llamalet.errors import CheckpointError, ConfigError, DiskError, NonFiniteError
from llamalet.files import sync_folder
from llamalet.model_file.checkpoint import best_first

FORMAT = "llamalet checkpoint"
VERSION = 1
FOLDER, ABANDONED = "checkpoints", "abandoned"
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"

_STEP = re.compile(r"step-(\d{8,})|\.step-(\d{8,})\.old")
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint in memory; its tensors are on the CPU."""

    path: Path
    model_config: ModelConfig
    model_state: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    state: dict[str, Any]
    """What else the run needs to go on: step, val_loss, tokenizer_sha256, data, train_config, ... in JSON types."""
    tokenizer_path: Path


def save(
    run_dir: Path,
    *,
    model_config: ModelConfig,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    state: Mapping[str, Any],
    tokenizer_name: str,
    tokenizer_data: bytes,
    keep: int = 2,
) -> Path:
    """Write a checkpoint durably, then remove old ones: all but the last `keep` and the best.

    Args:
        run_dir: the run's out_dir.
        model_config: shape of the model.
        model_state: its state dict.
        optimizer_state: `Optimizer.state_dict()`.
        state: JSON types; needs `step`, and `val_loss` (None where it was not measured).
        tokenizer_name: name of the tokenizer's file beside the weights.
        tokenizer_data: what is in it.
        keep: how many of the newest checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        NonFiniteError: if a weight or a tensor of the optimizer is not finite; nothing is written then.
        DiskError: if the disk is full or fails; older checkpoints are untouched then.
    """
    parent = run_dir / FOLDER
    final = parent / f"step-{state['step']:08d}"
    aside, old = parent / f".{final.name}.tmp", parent / f".{final.name}.old"
    tensors = {MODEL: model_state, OPTIMIZER: optimizer_state}
    for name, group in tensors.items():
        _refuse_non_finite(final / name, group)
    description = {**state, "model_config": model_config.to_dict(), "tokenizer": tokenizer_name}
    texts = {STATE: _json(description), tokenizer_name: tokenizer_data}
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    needed += sum(len(text) for text in texts.values())
    renamed = False
    try:
        if not parent.exists():
            parent.mkdir(parents=True)
            sync_folder(run_dir)
            sync_folder(run_dir.parent)
        _remove(aside)
        aside.mkdir()
        seals = {name: _write(aside / name, _safetensors(group)) for name, group in tensors.items()}
        seals |= {name: _write(aside / name, [text]) for name, text in texts.items()}
        manifest = {"format": FORMAT, "version": VERSION, "step": state["step"], "files": seals}
        _write(aside / MANIFEST, [_json(manifest)])
        sync_folder(aside)
        if final.exists():  # otherwise the old one, if any, stands in for it until now
            _remove(old)
            os.rename(final, old)
        os.rename(aside, final)
        renamed = True
        sync_folder(parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if renamed:
                os.rename(final, aside)
            if old.exists() and not final.exists():
                os.rename(old, final)
            _remove(aside)
        if not isinstance(error, OSError):
            raise
        older = list_steps(run_dir)
        raise DiskError(
            f"{final}: cannot save its {needed:,} bytes: {error.strerror or error}; "
            + ("older checkpoints are untouched, go on with --resume" if older else "there is no older checkpoint")
        ) from error
    try:
        _remove(old)
        _retire(run_dir, keep, final)
    except OSError as error:
        print(f"warning: {parent}: cannot remove old checkpoints: {error.strerror or error}", file=sys.stderr)
    return final


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, after comparing every file with its digest.

    Raises:
        CheckpointError: if it is missing, incomplete, damaged or of a newer version.
    """
    path = Path(path)
    verify(path)
    try:
        state = json.loads((path / STATE).read_bytes())
        model_config = ModelConfig.from_dict(state.pop("model_config"))
        tokenizer = path / state.pop("tokenizer")
        model_state = safetensors.torch.load_file(path / MODEL)
        optimizer_state = safetensors.torch.load_file(path / OPTIMIZER)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError, ConfigError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return Checkpoint(
        path=path,
        model_config=model_config,
        model_state=model_state,
        optimizer_state=optimizer_state,
        state=state,
        tokenizer_path=tokenizer,
    )


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json.

    Raises:
        CheckpointError: if it cannot be read.
    """
    return _read_json(path / STATE)


def label(path: Path) -> str:
    """Return a checkpoint's name and the beginning of its digest, which differ where two checkpoints do."""
    manifest = path / MANIFEST
    return f"{path.name} {hashlib.sha256(manifest.read_bytes()).hexdigest()[:8] if manifest.exists() else 'missing'}"


def verify(path: Path, *, digests: bool = True) -> None:
    """Compare a checkpoint's files with its manifest; their sizes alone if `digests` is false.

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


def find_latest(run_dir: str | Path) -> Path | None:
    """Return the newest checkpoint of a run that passes `verify`, or None; each one refused is named on stderr."""
    return _first_sound(reversed(list_steps(run_dir)))


def find_best(run_dir: str | Path) -> Path | None:
    """Return the best checkpoint of a run that passes `verify`, or None; each one refused is named on stderr.

    The best has the lowest validation loss; where none was measured, the newest is the best.
    """
    return _first_sound(best_first(list_steps(run_dir)))


def newest_best(root: str | Path = "out") -> Path | None:
    """Return the best sound checkpoint of the run below `root` that saved last, or None where there is none."""
    folders = [path for path in Path(root).glob(f"**/{FOLDER}") if list_steps(path.parent)]
    newest = max(folders, key=lambda path: list_steps(path.parent)[-1].stat().st_mtime_ns, default=None)
    return find_best(newest.parent) if newest else None


def list_steps(run_dir: str | Path) -> list[Path]:
    """Return the run's checkpoint folders, oldest step first, whether sound or not; one for each step."""
    paths = sorted((Path(run_dir) / FOLDER).glob("*"))  # a .step-N.old comes before its step-N, which takes its place
    found = {step: path for path in paths if (step := step_of(path)) is not None}
    return [found[step] for step in sorted(found)]


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint's folder, None for any other path."""
    match = _STEP.fullmatch(path.name)
    return int(match[1] or match[2]) if match else None


def remove_all(run_dir: Path) -> None:
    """Remove every checkpoint of a run.

    Raises:
        DiskError: if that fails.
    """
    try:
        _remove(run_dir / FOLDER)
    except OSError as error:
        raise DiskError(f"{run_dir / FOLDER}: cannot be removed: {error.strerror or error}") from error


def go_back(run_dir: Path, step: int) -> list[Path]:
    """Make a run's folder ready to go on after `step`, and return where the later checkpoints are now.

    They are of a branch that the run leaves: they must neither crowd out its new checkpoints nor be resumed or exported
    in their place. What killed saves left behind is put in its place, or removed.

    Raises:
        DiskError: if the folder cannot be changed.
    """
    parent = run_dir / FOLDER
    moved = []
    try:
        for path in list_steps(run_dir):
            if path.name.startswith("."):
                path.rename(parent / f"step-{step_of(path):08d}")
        for debris in parent.glob(".step-*"):
            shutil.rmtree(debris)
        for path in list_steps(run_dir):
            if int(path.name.removeprefix("step-")) > step:
                target = parent / ABANDONED / path.name
                target.parent.mkdir(exist_ok=True)
                _remove(target)
                moved.append(path.rename(target))
    except OSError as error:
        raise DiskError(f"{parent}: cannot be tidied up: {error.strerror or error}") from error
    return moved


def _refuse_non_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError if a value that would go to `path` is NaN or infinite."""
    numbers = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    # The extremes are NaN where any value is. All are on their way before the first is waited for.
    finite = [torch.stack(tensor.detach().aminmax()).isfinite().all() for tensor in numbers.values()]
    for name, is_finite in zip(numbers, finite, strict=True):
        if not is_finite:
            raise NonFiniteError(f"{path}: not saved: {name} is not finite; older checkpoints are untouched")


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, a tensor at a time, so that no second copy of all of them is needed.

    Source: https://huggingface.co/docs/safetensors: the header's length as u64, the header in JSON, and the tensors
    without gaps. As the library does, the widest types come first, so that all are aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _json(value: Any) -> bytes:
    """Return readable JSON; NaN is refused."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


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


def _first_sound(paths: Iterable[Path]) -> Path | None:
    """Return the first checkpoint that passes `verify`, or None; each one before it is named on stderr."""
    for path in paths:
        try:
            verify(path)
        except CheckpointError as error:
            print(f"warning: checkpoint {path.name} is skipped: {error}", file=sys.stderr, flush=True)
        else:
            return path
    return None


def _retire(run_dir: Path, keep: int, written: Path) -> None:
    """Remove all checkpoints but the newest `keep` and the best of those that are whole, and the one just written."""
    steps = list_steps(run_dir)
    whole = [path for path in steps if _is_whole(path)]
    staying = {written, *whole[-keep:], *best_first(whole)[:1]}
    for path in steps:
        if path not in staying:
            _remove(path)


def _is_whole(path: Path) -> bool:
    """Return whether all files are there in their sizes; reading them all would double the time of a save."""
    try:
        verify(path, digests=False)
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a folder where it exists; renamed first, so that half of a checkpoint never bears a checkpoint's name."""
    if path.exists():
        doomed = path.with_name(f".{path.name.lstrip('.')}.gone")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed)
