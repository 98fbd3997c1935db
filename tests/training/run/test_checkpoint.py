"""Checkpoints under fire: killed saves, full and failing disks, flipped bits, two runs in one folder, hostile files."""

import ast
import builtins
import ctypes
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from forked import BACKENDS, LIMIT_S, ROOT, fork, join
from torture import cases
from toy import SMALL_MODELS, random_tensors, toy_data, toy_state, toy_tokenizer

import train
from llamalet import command, model_file
from llamalet.convert import bin_file
from llamalet.convert.imported_model import ImportedModel
from llamalet.errors import CheckpointError, DiskError, LockedError, NonFiniteError
from llamalet.hf_names import MODEL_SAFETENSORS
from llamalet.model_file.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    find_best,
    find_latest,
    list_steps,
    step_of,
)
from llamalet.tokenizer import Tokenizer
from training.run import checkpoint, run_folder

CONFIG = SMALL_MODELS["gqa-tied"]
VOCAB = 300
SMALL = [
    "--dim=32", "--n_layers=2", "--n_heads=2", "--max_seq_len=32", "--batch_size=2", "--warmup_iters=1",
    "--eval_interval=5", "--eval_iters=2", "--log_interval=1", "--learning_rate=1e-2", "--dropout=0.1",
    "--compile=False", "--threads=1", "--min_lr=1e-4", "--no-sample", "--save_every=1",
]  # fmt: skip


# ---- saves in a process that something happens to ----


def save(run_dir: Path, step: int, val_loss: float | None = None, keep: int = 9) -> Path:
    """Save a checkpoint whose tensors tell its step."""
    rng = np.random.default_rng(step)
    return checkpoint.save(
        run_dir,
        toy_state(CONFIG, step, val_loss),
        model_state={"w": np.full((3, 5), step, np.float32), "b": rng.random(257, np.float32)},
        optimizer_state={"w:exp_avg": rng.random((3, 5), np.float32), "w:step": np.array(step, np.float32)},
        tokenizer_data=b"words" * 50,
        keep=keep,
    )


def load(path: Path) -> tuple[int, float | None]:
    """Load what `save` saved, and return its step and loss."""
    loaded = checkpoint.load(path)
    step, val_loss = loaded.state.step, loaded.state.val_loss
    np.testing.assert_array_equal(loaded.model_state["w"], np.full((3, 5), step, np.float32))
    assert loaded.optimizer_state["w:step"] == step
    return step, val_loss


class FileSystem:
    """Lets something happen at the nth operation on files of this process, for the rest of its life.

    Operations: opening a file for writing, each piece of what is written to it, fsync, and changes of folders. Nothing
    is synced: that is for when the power fails, not a process.
    """

    EVENTS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove"}

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        self.count, self.at, self.action = 0, at, action
        sys.addaudithook(self.audit)
        os.fsync = lambda descriptor: self.operation()
        file_system = self

        class Pieces(io.BufferedRandom):
            def write(self, data: Any) -> int:
                view = memoryview(data).cast("B")
                size = max(len(view) // cases(2, 16), 1)
                for begin in range(0, len(view), size):
                    file_system.operation()
                    super().write(view[begin : begin + size])
                    self.flush()  # so that half a file is there
                return len(view)

        open_ = io.open

        def open_in_pieces(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode in ("wb", "w+b"):
                return Pieces(io.FileIO(file, "w+b"))
            return open_(file, mode, *args, **kwargs)

        io.open = builtins.open = open_in_pieces

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in self.EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT):
            self.operation()

    def operation(self) -> None:
        self.count += 1
        if self.count == self.at + 1:
            self.action()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> Callable[[], None]:
    def raise_() -> None:
        raise OSError(number, os.strerror(number))

    return raise_


def forked(work: Callable[[Callable[[str], None]], None]) -> tuple[int, list[str], str]:
    """Run `work` in a fork of this process.

    Returns:
        Its exit code, the lines that it told by the function it is given, and its last words.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            torch.set_num_threads(1)
            work(lambda line: os.write(writer, f"{line}\n".encode()) and None)
            code = 0
        except BaseException as error:
            os.write(writer, ("\0" + "".join(traceback.format_exception(error))).encode())
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        told, _, words = pipe.read().partition("\0")
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), told.split("\n")[:-1], words


# A save of each kind: what was saved before, and what is going on when the kill comes.
Told = Callable[[str], None]


def saves(*wanted: tuple[int, float | None], keep: int = 9) -> Callable[[Path, Told], None]:
    def work(run_dir: Path, tell: Told) -> None:
        for step, val_loss in wanted:
            save(run_dir, step, val_loss, keep)
            tell(json.dumps([step, val_loss]))

    return work


def goes_back(run_dir: Path, tell: Told) -> None:
    checkpoint.go_back(run_dir, 2)


def halfway_through_a_replacement(run_dir: Path) -> None:
    """Leave what a kill between the two renames of a save leaves."""
    folder = run_dir / "checkpoints"
    (folder / "step-00000002").rename(folder / ".step-00000002.old")
    shutil.copytree(folder / "step-00000001", folder / ".step-00000002.tmp")


SCENARIOS: dict[str, tuple[Callable[[Path, Told], None], Callable[[Path, Told], None]]] = {
    "first": (saves(), saves((0, None))),
    "later": (saves((1, 3.0)), saves((2, None))),
    "same step": (saves((1, 3.0), (2, None)), saves((2, 2.0))),
    "retention": (saves((1, 1.0), (2, 3.0), (3, 2.0), (4, None)), saves((5, None), (6, None), keep=1)),
    "going back": (saves((1, 3.0), (2, 2.0), (3, None)), goes_back),
    "after a kill": (
        lambda run_dir, tell: (saves((1, 3.0), (2, None))(run_dir, tell), halfway_through_a_replacement(run_dir))[0],
        lambda run_dir, tell: (checkpoint.go_back(run_dir, 2), saves((2, 2.0))(run_dir, tell))[1],
    ),
    "the same step, not tidied": (
        lambda run_dir, tell: (saves((1, 3.0), (2, None))(run_dir, tell), halfway_through_a_replacement(run_dir))[0],
        saves((2, 2.0)),
    ),
}


def hidden(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").glob(".*")]


@pytest.mark.slow
@pytest.mark.campaign("kill -9 before each file operation of a save")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_kill_during_a_save_costs_what_was_saved(tmp_path, monkeypatch, scenario, record_property):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    before, during = SCENARIOS[scenario]
    reported: list[str] = []
    (tmp_path / "template").mkdir()
    before(tmp_path / "template", reported.append)
    for at in itertools.count():
        run_dir = tmp_path / f"killed-{at}"
        shutil.copytree(tmp_path / "template", run_dir)

        def work(tell: Told, run_dir: Path = run_dir, at: int = at) -> None:
            FileSystem(at, kill)
            during(run_dir, tell)

        code, told, words = forked(work)
        assert code in (0, -signal.SIGKILL), words
        saved = [json.loads(line) for line in [*reported, *told]]
        newest = find_latest(run_dir)
        if saved:
            newest_step = 2 if during is goes_back else max(step for step, _ in saved)
            assert newest is not None and load(newest)[0] >= newest_step, (at, hidden(run_dir))
            if losses := [loss for _, loss in saved if loss is not None]:
                assert load(find_best(run_dir))[1] <= min(losses), at
            if step_told := [tuple(pair) for pair in map(json.loads, told) if pair[0] == load(newest)[0]]:
                assert load(newest) == step_told[-1]
        # What the next start does needs nobody: it tidies up, goes on, and its saves are found.
        step = load(newest)[0] if newest else 0
        checkpoint.go_back(run_dir, step)
        assert not hidden(run_dir), at
        if newest:
            assert load(find_latest(run_dir))[0] == step
        save(run_dir, step + 1)
        assert load(find_latest(run_dir))[0] == step + 1
        shutil.rmtree(run_dir)
        if code == 0:
            break
    assert at > 1
    record_property("cases", at + 1)


@pytest.mark.slow
@pytest.mark.campaign("each file operation of a save fails once")
@pytest.mark.parametrize("number", cases([errno.EIO], [errno.EIO, errno.ENOSPC]), ids=errno.errorcode.get)
@pytest.mark.parametrize("scenario", ["first", "later", "same step", "retention"])
def test_a_save_that_fails_says_so_and_leaves_what_was_there(tmp_path, monkeypatch, scenario, number, record_property):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    before, during = SCENARIOS[scenario]
    (tmp_path / "template").mkdir()
    before(tmp_path / "template", lambda line: None)
    there = digests(tmp_path / "template")
    refused = 0
    for at in itertools.count():
        run_dir = tmp_path / f"failed-{at}"
        shutil.copytree(tmp_path / "template", run_dir)

        def work(tell: Told, run_dir: Path = run_dir, at: int = at) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            files = FileSystem(at, fail(number))
            try:
                during(run_dir, tell)
            except DiskError as error:
                tell(f"error {error}")
            tell(f"{files.count}")

        code, told, words = forked(work)
        assert code == 0, (at, words)
        if told[-2].startswith("error"):
            refused += 1
            assert os.strerror(number) in told[-2] and " bytes" in told[-2] and "step-0000000" in told[-2]
            if len(told) == 2:  # the first save failed
                assert digests(run_dir) == there, at
            assert not hidden(run_dir), at
        for step, val_loss in (json.loads(line) for line in told if line.startswith("[")):
            found = find_latest(run_dir)
            assert load(found)[0] >= step and (load(found)[0] > step or load(found)[1] == val_loss), at
        shutil.rmtree(run_dir)
        if int(told[-1]) <= at:
            break
    assert refused > 30
    record_property("cases", at + 1)


def digests(folder: Path) -> dict[str, str]:
    """What is in the files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Journal:
    """Tells every operation on files of this process, so that a power failure can be played at any moment."""

    def __init__(self, tell: Told) -> None:
        self.tell = tell
        sys.addaudithook(self.audit)
        os.fsync = lambda descriptor: self.note("sync", f"/proc/self/fd/{descriptor}")

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT:
            self.note("create", args[0])
        elif event in ("os.mkdir", "os.rmdir", "os.remove"):
            folder = args[-1]  # a descriptor, or -1
            self.note(event[3:], args[0] if folder < 0 else f"/proc/self/fd/{folder}/{args[0]}")
        elif event == "os.rename":
            self.note("rename", args[0], args[1])

    def note(self, what: str, path: Any, target: Any = None) -> None:
        folder, name = os.path.split(os.fspath(path))
        path = os.path.realpath(path) if what == "sync" else os.path.join(os.path.realpath(folder), name)
        content = Path(path).read_bytes().hex() if what == "sync" and os.path.isfile(path) else None
        self.tell(json.dumps([what, path, target and os.fspath(target), content]))


def after_power_failed(journal: list[list[Any]], pending: Callable[[int], int]) -> None:
    """Play what is on the disk when the power fails at the end of `journal`.

    What was synced is there. Of each folder's changes since it was synced, the first few are; of a file's content since
    then, nothing is.

    Args:
        journal: what was told.
        pending: given how many changes of a folder are not synced, says how many of them are there.
    """
    synced = {path: at for at, (what, path, *_) in enumerate(journal) if what == "sync"}
    waiting: dict[str, int] = {}
    for at, (what, path, *_) in enumerate(journal):
        if what != "sync" and at > synced.get(os.path.dirname(path), -1):
            waiting[os.path.dirname(path)] = waiting.get(os.path.dirname(path), 0) + 1
    left = {folder: pending(count) for folder, count in waiting.items()}
    contents = {path: bytes.fromhex(content) for what, path, _, content in journal if content is not None}
    for at, (what, path, target, _) in enumerate(journal):
        folder = os.path.dirname(path)
        if what == "sync":
            continue
        if at > synced.get(folder, -1):
            if not left[folder]:
                continue
            left[folder] -= 1
        if not os.path.isdir(folder):  # it was never made durable itself
            continue
        if what == "create":
            Path(path).write_bytes(contents.get(path, b""))
        elif what == "mkdir":
            os.mkdir(path)
        elif what == "rename" and os.path.exists(path):
            os.rename(path, target)
        elif what == "remove" and os.path.exists(path):
            os.remove(path)
        elif what == "rmdir" and os.path.isdir(path):
            shutil.rmtree(path)  # with what was removed from it only later


@pytest.mark.slow
@pytest.mark.campaign("the power fails during a save")
@pytest.mark.parametrize("scenario", ["first", "later", "same step", "retention"])
def test_no_power_failure_costs_what_was_saved(tmp_path, monkeypatch, scenario, record_property):
    before, during = SCENARIOS[scenario]
    reported: list[str] = []
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    before(run_dir, reported.append)
    shutil.copytree(run_dir, tmp_path / "template")

    def work(tell: Told) -> None:
        Journal(tell)
        during(run_dir, tell)

    code, told, words = forked(work)
    assert code == 0, words
    journal, saved_at = [], [(0, json.loads(line)) for line in reported]
    for entry in map(json.loads, told):
        if isinstance(entry[0], str):
            journal.append(entry)
        else:
            saved_at.append((len(journal), entry))
    assert len(journal) > 10
    draw = random.Random(0)
    choices = [lambda count: 0, lambda count: count, *[lambda count: draw.randint(0, count)] * cases(0, 20)]
    for end_, pending in itertools.product(range(len(journal) + 1), choices):
        shutil.rmtree(run_dir)
        shutil.copytree(tmp_path / "template", run_dir)
        after_power_failed(journal[:end_], pending)
        saved = [entry for at, entry in saved_at if at <= end_]
        if saved:
            newest = find_latest(run_dir)
            assert newest is not None and load(newest)[0] >= max(step for step, _ in saved), (end_, journal[:end_][-1])
            if losses := [loss for _, loss in saved if loss is not None]:
                assert load(find_best(run_dir))[1] <= min(losses)
    record_property("cases", (len(journal) + 1) * len(choices))


def test_tensors_are_written_as_safetensors_writes_them():
    rng = np.random.default_rng(0)
    arrays = {
        "layers.1.b": rng.random((3, 5), np.float32),
        "layers.1.a": rng.random((5, 3), np.float32).T,
        "step": np.array(4.0, np.float32),
        "nothing": np.zeros((0, 4), np.float32),
        "caf\u00e9": np.arange(3),
        "double": np.ones(2),
    }
    written = b"".join(checkpoint._encode(arrays))
    again = safetensors.numpy.load(written)
    assert again.keys() == arrays.keys() and b"".join(checkpoint._encode({})) == safetensors.numpy.save({})
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype and np.array_equal(again[name], array), name
    single = {"layers.1.b": arrays["layers.1.b"], "step": arrays["step"], "layers.1.a": arrays["layers.1.a"].copy("C")}
    assert b"".join(checkpoint._encode(single)) == safetensors.numpy.save(single)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["model_state", "optimizer_state"])
def test_what_is_not_finite_is_not_saved(tmp_path, which, value):
    states = {
        "model_state": {"w": np.ones(9, np.float32), "n": np.arange(3)},
        "optimizer_state": {"m": np.ones(4, np.float32)},
    }
    save(tmp_path, 1)
    there = digests(tmp_path)
    next(iter(states[which].values()))[2] = value
    with pytest.raises(NonFiniteError, match=r"step-00000002/\w+\.safetensors: not saved: [wm] is not finite"):
        checkpoint.save(tmp_path, toy_state(CONFIG, 2), **states, tokenizer_data=b"t")
    assert digests(tmp_path) == there


def test_retention_counts_whole_checkpoints_alone(tmp_path):
    for step, val_loss in ((1, 1.0), (2, 3.0), (3, 2.0), (4, None)):
        save(tmp_path, step, val_loss)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000001" / MODEL_SAFETENSORS).unlink()
    (folder / "step-00000004" / STATE).write_bytes(b"")
    save(tmp_path, 5, None, keep=2)
    assert [path.name for path in list_steps(tmp_path)] == ["step-00000003", "step-00000005"]


@pytest.mark.filterwarnings("error")
def test_a_checkpoint_of_the_first_layout_goes_on_to_the_same_loss(tmp_path, monkeypatch):
    """Written at version 0.1.0, before there were guards and intervals in minutes; kept to be read for ever."""
    monkeypatch.chdir(tmp_path)
    golden = ROOT / "tests" / "golden" / "checkpoint-1"
    toy_data(tmp_path / "data" / "toy", 276, tokenizer=Tokenizer.load(golden / "tokenizer.bin"))
    shutil.copytree(golden, "out/checkpoints/step-00000002")
    assert train.main(["--resume"]) == 0
    reached = checkpoint.load("out/checkpoints/step-00000004").state.val_loss
    assert reached == pytest.approx(5.404939768607156, rel=1e-5)


# ---- bits that flip ----


@pytest.mark.campaign("flipped bits")
def test_no_flipped_bit_goes_unnoticed(tmp_path, capsys, record_property):
    for step in (1, 2):
        save(tmp_path, step)
    files = sorted((tmp_path / "checkpoints" / "step-00000002").iterdir())
    assert len(files) == 5
    draw = random.Random(0)
    wanted = cases(files, [*files, *draw.choices(files, k=1000 - len(files))])
    for path in wanted:
        data = path.read_bytes()
        bit = draw.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = find_latest(tmp_path)
        assert found is not None and load(found)[0] == 1, (path, bit)
        said = capsys.readouterr().err
        assert said.startswith("warning: checkpoint step-00000002 is skipped: ") and said.count("\n") == 1
        with pytest.raises(CheckpointError):
            checkpoint.load(path.parent)
        path.write_bytes(data)
    assert load(find_latest(tmp_path))[0] == 2
    record_property("cases", len(wanted))


def test_a_manifest_of_another_step_is_refused(tmp_path):
    path = save(tmp_path, 2) / MANIFEST
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(CheckpointError, match=r"manifest\.json: step is 3, not that of state\.json"):
        checkpoint.load(path.parent)


# ---- nothing in a checkpoint is code ----


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", [MODEL_SAFETENSORS, OPTIMIZER, STATE, MANIFEST])
def test_a_pickle_in_the_place_of_a_file_is_refused(tmp_path, name, sealed):
    path = save(tmp_path, 1)
    evil = pickle.dumps(Evil(tmp_path / "canary"))
    (path / name).write_bytes(evil)
    if sealed and name != MANIFEST:  # by one who knows the manifest
        manifest = json.loads((path / MANIFEST).read_bytes())
        manifest["files"][name] = {"bytes": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}
        (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not (tmp_path / "canary").exists()
    pickle.loads(evil)
    assert (tmp_path / "canary").exists()


OTHER_FOLDERS = (".venv", "build", "tests")
# It reads a pipe whose other end only the process has that started it.
READS_A_PIPE = ROOT / "llamalet" / "kernels" / "second_process.py"
SOURCES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in OTHER_FOLDERS and path != READS_A_PIPE
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_here_runs_what_it_reads(path):
    assert not runs_what_it_reads(path.read_text())


def runs_what_it_reads(source: str) -> list[str]:
    """The imports and calls in a program by which a file could become code."""
    modules, found = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        elif isinstance(node, ast.Call):
            call, safe = ast.unparse(node.func), "weights_only=True" in map(ast.unparse, node.keywords)
            if call in ("eval", "exec", "np.load", "numpy.load", "os.system", "builtins.eval"):
                found.append(call)
            if call == "torch.load" and not safe:
                found.append(call)
            found += [keyword.arg for keyword in node.keywords if keyword.arg in ("allow_pickle", "shell")]
        found += [name for name in names if name in modules]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "eval('1')",
        "run('ls', shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert runs_what_it_reads(source)


# ---- exported models ----


@pytest.mark.slow
@pytest.mark.campaign("kill -9 before each file operation of an export")
@pytest.mark.parametrize("earlier", [False, True])
def test_a_killed_export_leaves_the_old_model_or_the_new_one(tmp_path, earlier, record_property):
    vocabulary = toy_tokenizer(CONFIG.vocab_size)
    models = [
        ImportedModel(name="toy", config=CONFIG, tensors=random_tensors(CONFIG, seed), tokenizer=vocabulary)
        for seed in (0, 1)
    ]
    (tmp_path / "template").mkdir()
    if earlier:
        bin_file.write(tmp_path / "template" / "model.bin", models[0], 1)
    bin_file.write(tmp_path / "new.bin", models[1], 1)
    whole = {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tmp_path.rglob("*.bin")
        if path.stem in ("model", "new")
    }
    for at in itertools.count():
        run_dir = tmp_path / f"killed-{at}"
        shutil.copytree(tmp_path / "template", run_dir)

        def work(tell: Told, target: Path = run_dir / "model.bin", at: int = at) -> None:
            FileSystem(at, kill)
            bin_file.write(target, models[1], 1)

        code, _, words = forked(work)
        assert code in (0, -signal.SIGKILL), words
        target = run_dir / "model.bin"
        assert target.exists() or not earlier
        if target.exists():
            assert hashlib.sha256(target.read_bytes()).hexdigest() in whole
            model_file.read(target, verify=True)
        if code == 0:
            break
    assert at > 3
    record_property("cases", at + 1)


# ---- whole runs ----


def start(folder: Path, argv: Sequence[str], count: int = 1, *, file_limit: int | None = None) -> list[BaseProcess]:
    """Start train.py in `count` processes, which note each checkpoint that is saved in saved.txt."""
    return fork(folder, count, train_here, list(argv), file_limit)


def train_here(rank: int, argv: list[str], file_limit: int | None) -> None:
    """Be a process of a run, and exit as it does."""
    save_ = checkpoint.save
    notes = os.open("saved.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def save_and_note(*args: Any, **kwargs: Any) -> Path:
        path = save_(*args, **kwargs)
        os.write(notes, f"{path.name}\n".encode())
        return path

    checkpoint.save = save_and_note
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    command.run(lambda _: train.main(argv))


def end(processes: Sequence[BaseProcess]) -> list[int]:
    """Wait for processes, and return how they exited."""
    assert join(processes), "a run hangs"
    return [process.exitcode for process in processes if process.exitcode is not None]


def run_whole(folder: Path, argv: Sequence[str], count: int) -> None:
    codes = end(start(folder, argv, count))
    assert codes == [0] * count, "".join((folder / f"err-{rank}.txt").read_text() for rank in range(count))


def final_state(folder: Path) -> dict[str, str]:
    """The digests of the weights and the optimizer that a run ended with."""
    last = list_steps(folder / "out")[-1]
    assert last.name == "step-00000012"
    return {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in (MODEL_SAFETENSORS, OPTIMIZER)}


def project(folder: Path) -> Path:
    toy_data(folder / "data" / "toy", VOCAB)
    return folder


UNSTOPPED = [*SMALL, "--max_iters=12", "--total_batch_tokens=128"]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """Give how a run that nothing happens to ends, and how long it takes, in each setting; run once."""
    start(project(tmp_path_factory.mktemp("first")), ["--help"])[0].join()  # and with it the process to fork from

    @functools.cache
    def reference(backend: str, count: int) -> tuple[dict[str, str], float]:
        for _ in range(2 if backend == "numba" else 1):  # the second has nothing to compile
            folder = project(tmp_path_factory.mktemp("unstopped"))
            began = time.monotonic()
            run_whole(folder, [*UNSTOPPED, *BACKENDS[backend]], count)
            seconds = time.monotonic() - began
        return final_state(folder), seconds

    return reference


KILLS = [(seed, 1, "torch") for seed in range(80)] + [(seed, 2, "torch") for seed in range(20)]
KILLS_OF_NUMBA = [(seed, 1, "numba") for seed in range(100)]


@pytest.mark.trains
@pytest.mark.campaign("kill -9 at random moments of a run")
@pytest.mark.parametrize(
    ("seed", "count", "backend"),
    cases(KILLS[:8] + KILLS[-2:] + KILLS_OF_NUMBA[:2], KILLS + KILLS_OF_NUMBA),
)
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(tmp_path, unstopped, seed, count, backend):
    folder, argv = project(tmp_path), [*UNSTOPPED, *BACKENDS[backend]]
    (state, _), (_, seconds) = (unstopped(backend, number) for number in (1, count))
    draw = random.Random(f"{seed} {count}")
    processes = start(folder, argv, count)
    time.sleep(draw.uniform(0.0, seconds))
    for process in draw.sample(processes, count):  # as torchrun does when one of its processes dies
        process.kill()
    killed = end(processes)
    assert set(killed) <= {0, 1, -signal.SIGKILL}, killed
    saved = (folder / "saved.txt").read_text().split() if (folder / "saved.txt").exists() else []
    found = find_latest(folder / "out")
    assert not saved or (found is not None and step_of(found) >= max(int(name[5:]) for name in saved))
    run_whole(folder, [*argv, "--resume=auto"], count)
    assert final_state(folder) == state
    assert not hidden(folder / "out")
    went_on = (folder / "out-0.txt").read_text()
    assert f"resume   after step {step_of(found)} of 12" in went_on if found else "resume " not in went_on
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 12


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> Path:
    """The folder of a run of three steps."""
    folder = project(tmp_path_factory.mktemp("three"))
    run_whole(folder, [*SMALL, "--max_iters=3", "--keep=2"], 1)
    return folder


@pytest.mark.trains
def test_a_resumed_run_says_what_it_passes_over_and_what_it_takes(tmp_path, three_steps, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(three_steps, tmp_path / "run"))
    damaged = Path("out/checkpoints/step-00000003") / OPTIMIZER
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert train.main([*SMALL, "--resume", "--max_iters=3"]) == 0
    out, err = capsys.readouterr()
    assert "checkpoint step-00000003 is skipped: " in err and "optimizer.safetensors: has " in err
    assert "resume   after step 2 of 3, from out/checkpoints/step-00000002\n" in out
    assert Path("out/checkpoints/abandoned/step-00000003").is_dir()


@pytest.mark.trains
@pytest.mark.campaign("disk full, by the size of a file")
@pytest.mark.parametrize(
    ("share", "backend"),
    cases(
        [(0.0, "torch"), (0.1, "torch"), (0.5, "torch"), (0.99, "torch"), (0.5, "numba")],
        [(number / 16, backend) for backend in BACKENDS for number in range(16)],
    ),
)
def test_a_full_disk_ends_a_run_in_order(tmp_path, three_steps, share, backend):
    folder = shutil.copytree(three_steps, tmp_path / "run")
    there = digests(folder / "out" / "checkpoints")
    largest = max(path.stat().st_size for path in (folder / "out" / "checkpoints").rglob("*") if path.is_file())
    readers = []
    for name in ("out", "err"):  # the limit does not hold for pipes
        (folder / f"{name}-0.txt").unlink()
        os.mkfifo(folder / f"{name}-0.txt")
        readers.append(os.open(folder / f"{name}-0.txt", os.O_RDONLY | os.O_NONBLOCK))
    argv = [*SMALL, *BACKENDS[backend], "--resume"]
    processes = start(folder, [*argv, "--max_iters=6"], file_limit=int(share * largest))
    assert end(processes) == [DiskError.exit_code]
    _, said = (os.read(reader, 65536).decode() for reader in readers)
    for name, reader in zip(("out", "err"), readers, strict=True):
        os.close(reader)
        (folder / f"{name}-0.txt").unlink()
    assert said.count("error: ") == 1 and said.splitlines()[-1].startswith("error: ")
    assert os.strerror(errno.EFBIG) in said, said
    assert digests(folder / "out" / "checkpoints") == there
    assert not hidden(folder / "out") and not list((folder / "out").glob(".*.tmp*"))
    run_whole(folder, [*argv, "--max_iters=4"], 1)


@pytest.mark.campaign("disk full, a small file system")
@pytest.mark.parametrize("pages", cases([0, 3, 5, 8], range(16)))
def test_a_full_file_system_costs_nothing_that_was_saved(tmp_path, pages):
    def work(tell: Told) -> None:
        mount_small(tmp_path, 4096 * (12 + pages))
        save(tmp_path, 1)
        there = digests(tmp_path)
        step = 2
        with pytest.raises(DiskError, match=rf"cannot save its [\d,]+ bytes: {os.strerror(errno.ENOSPC)}"):
            for step in range(2, 9):
                save(tmp_path, step)
                there = digests(tmp_path)
        assert digests(tmp_path) == there and not hidden(tmp_path)
        assert load(find_latest(tmp_path))[0] == step - 1
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
        save(tmp_path, step)

    code, _, words = forked(work)
    if "PermissionError" in words:
        pytest.skip("mounting needs more rights here")
    assert code == 0, words


def mount_small(folder: Path, size: int) -> None:
    """Mount a file system of `size` bytes, seen by this process alone; what else it does, it must do without rights."""
    new_namespace, new_user = 0x20000, 0x10000000
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (new_namespace, new_namespace | new_user):
        if libc.unshare(flags) == 0 and libc.mount(b"none", b"/", None, 0x44000, None) == 0:  # private, and all below
            if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0:
                return
    raise PermissionError


# ---- two runs in one folder ----


@pytest.mark.campaign("two runs, one folder")
@pytest.mark.parametrize("race", range(cases(5, 50)))
def test_of_two_runs_that_start_at_once_one_wins(tmp_path, race):
    gate, opener = os.pipe()
    readers = []
    for _ in range(2):
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                os.close(opener)
                os.read(gate, 1)
                with run_folder.lock(tmp_path / "out"):
                    os.write(writer, f"locked {os.getpid()}\n".encode())
                    time.sleep(60)
            except LockedError as error:
                os.write(writer, f"refused {error}\n".encode())
            finally:
                os._exit(0)
        os.close(writer)
        readers.append(open(reader))
    os.close(gate)
    os.close(opener)
    said = [reader.readline() for reader in readers]
    winner = next(line.split()[1] for line in said if line.startswith("locked"))
    try:
        assert sum(line.startswith("locked") for line in said) == 1
        assert any(f"in use by process {winner} on " in line for line in said), said
    finally:
        os.kill(int(winner), signal.SIGKILL)
        os.wait()
        os.wait()
        for reader in readers:
            reader.close()
    with run_folder.lock(tmp_path / "out"):  # the dead hold no lock
        pass


@pytest.mark.trains
@pytest.mark.campaign("two runs, one folder")
def test_a_second_run_is_refused_and_a_killed_one_is_no_obstacle(tmp_path, record_property):
    folder = project(tmp_path)
    (first,) = start(folder, [*SMALL, "--max_iters=100000"])
    wait_for(lambda: (folder / "saved.txt").exists() and "step-00000002" in (folder / "saved.txt").read_text())
    other = tmp_path / "other"
    other.mkdir()
    out = f"--out_dir={folder / 'out'}"
    began = time.monotonic()
    second = start(other, [*SMALL, out, "--resume"])
    assert end(second) == [LockedError.exit_code]
    record_property("seconds_to_refuse", round(time.monotonic() - began, 2))
    said = (other / "err-0.txt").read_text()
    assert f"in use by process {first.pid} on " in said and said.count("\n") == 1
    first.kill()
    end([first])
    before = step_of(find_latest(folder / "out"))
    run_whole(folder, [*SMALL, "--resume", f"--max_iters={before + 2}"], 1)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match="file/out: cannot be written to: .*file: not a folder"):
        run_folder.lock(tmp_path / "file" / "out").__enter__()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
