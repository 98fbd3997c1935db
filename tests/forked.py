"""Run train.py in forked processes, stop it at any point, and compare what it leaves by digests.

The processes are forks of a server that has already imported torch and numba, so a run of a small model takes a second.
The code under test needs no hooks for this: in each fork, a Probe wraps the functions that show where the run is.
"""

import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LIMIT_S = 300.0
PR_SET_PDEATHSIG = 1
BACKENDS = {"torch": ["--backend=torch"], "numba": ["--backend=numba", "--threads=2"]}
TIMED = {"tokens_per_s", "tflops", "mfu", "eta_s", "elapsed_s"}


@dataclass(frozen=True)
class Stop:
    """A signal to send when a run reaches some point; None matches anything."""

    event: str
    step: int | None = None
    part: int | str | None = None  # a number, or "mid" or "last" of the micro-steps
    how: str = "SIGTERM"  # name of the signal
    ranks: tuple[int, ...] | None = None
    after_s: float = 0.0  # delay of the signal, while the run continues
    again_s: float | None = None  # delay of a second signal, while the run hangs
    closes: int | None = None  # file descriptor whose reader disappears before the signal

    def __str__(self) -> str:
        place = [self.how, self.event] + [str(x) for x in (self.step, self.part) if x is not None]
        return " ".join(place) + (f" in {self.ranks}" if self.ranks else "")


@dataclass(frozen=True)
class Fault:
    """A wrong number in a micro-step; None matches anything."""

    kind: str  # loss, gradient, spike or evaluation
    step: int
    micro: int | None = None
    rank: int | None = None
    value: float = float("nan")


# A step that the guard skips, and one whose gradients are a spike.
SKIPPED, SPIKE = Fault("gradient", step=5, micro=0, rank=0), Fault("spike", step=7, micro=0, value=1e4)


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    codes: list[int]
    out: str
    err: str
    states: list[dict[str, Any]]  # of each process that could still write it
    took_s: float  # from the signal to the end of the last process; nan without a signal
    folder: Path = field(repr=False)

    @property
    def last_line(self) -> str:
        return self.out.rstrip().rpartition("\n")[2]

    @property
    def state(self) -> dict[str, Any]:
        """The final state, which all processes must share, except for the random states: a list, one per process."""
        common = [{**state, "random": [other["random"] for other in self.states]} for state in self.states]
        assert common and all(state == common[0] for state in common), self.states
        return common[0]


def run(
    folder: Path,
    argv: Sequence[str],
    *,
    processes: int = 1,
    stop: Stop | None = None,
    faults: Iterable[Fault] = (),
    patches: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run train.py to its end, on the data/ of `folder`.

    Args:
        folder: working directory; output and state files of the processes go there too.
        argv: arguments of train.py.
        processes: number of processes, started without torchrun.
        stop: a signal to send, and when.
        faults: wrong numbers to inject.
        patches: module attributes to replace, as in {"training.guard.WINDOW": 3}.
        environment: extra environment variables of the processes.
    """
    group = start(folder, argv, processes=processes, stop=stop, faults=faults, patches=patches, environment=environment)
    return finish(folder, group)


def start(
    folder: Path,
    argv: Sequence[str],
    *,
    processes: int = 1,
    stop: Stop | None = None,
    faults: Iterable[Fault] = (),
    patches: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[BaseProcess]:
    """Start the processes of `run` without waiting for them."""
    for old in [*folder.glob("state-*.json"), *folder.glob("signal-*")]:
        old.unlink()
    arguments = list(argv), stop, list(faults), dict(patches or {}), dict(environment or {})
    return fork(folder, processes, train_with_probe, *arguments)


def server() -> ForkServerContext:
    """Start the server, if it does not run yet, and return a context whose processes are its forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "train",
            "training.trainer",
            "training.step_torch",
            "training.step_numba",
            "matplotlib.figure",
            "torch._dynamo",
            "torch._inductor.compile_fx",
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        # The server ignores the sys.path passed to it, and a compiler's process pool would outlive its run.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        forkserver.ensure_running()
    return context


def fork(folder: Path, count: int, what: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    """Start forked processes with torch imported and torchrun's variables set.

    Args:
        folder: working directory; their output goes to out-RANK.txt and err-RANK.txt there.
        count: number of processes.
        what: a function at module level; each process calls it with its rank and `arguments`.
    """
    context = server()
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    counts = address | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)} if count > 1 else {}
    group = []
    for rank in range(count):
        variables = counts | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        process = context.Process(target=child, args=(folder, rank, variables, what, arguments), daemon=True)
        process.start()
        group.append(process)
    return group


def child(
    folder: Path, rank: int, variables: dict[str, str], what: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Set up one process of `fork` and call its function."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive the tests
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, "a fork has none of the threads that its server began"
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= variables
    what(rank, *arguments)


def join(group: Sequence[BaseProcess]) -> bool:
    """Wait for processes, killing all if one is killed or all hang. Return whether they ended in time."""
    deadline = time.monotonic() + LIMIT_S
    while any(process.is_alive() for process in group):
        if any(process.exitcode == -signal.SIGKILL for process in group) or time.monotonic() > deadline:
            for process in group:
                process.kill()
        multiprocessing.connection.wait([p.sentinel for p in group if p.is_alive()], timeout=0.5)
    return time.monotonic() < deadline


def finish(folder: Path, group: Sequence[BaseProcess]) -> Ended:
    """Wait for the processes of `start` and collect what they left."""
    in_time, ended = join(group), time.time()
    out, err = ("".join(path.read_text() for path in sorted(folder.glob(f"{name}-*.txt"))) for name in ("out", "err"))
    assert in_time, out + err
    signals = [float(path.read_text() or ended) for path in folder.glob("signal-*")]
    return Ended(
        codes=[process.exitcode or 0 for process in group],
        out=out,
        err=err,
        states=[json.loads(path.read_text()) for path in sorted(folder.glob("state-*.json"))],
        took_s=ended - min(signals) if signals else float("nan"),
        folder=folder,
    )


def train_with_probe(
    rank: int,
    argv: list[str],
    stop: Stop | None,
    faults: list[Fault],
    patches: dict[str, Any],
    environment: dict[str, str],
) -> None:
    """Run train.py in this process with a Probe installed, and exit as it does."""
    os.environ |= environment
    for name, value in patches.items():
        module, _, attribute = name.rpartition(".")
        setattr(sys.modules[module], attribute, value)

    import train
    from llamalet import command

    probe = Probe(
        rank,
        stop if stop and (stop.ranks is None or rank in stop.ranks) else None,
        [fault for fault in faults if fault.rank in (None, rank)],
    )
    probe.install()

    def main(arguments: Sequence[str]) -> int:
        try:
            return train.main(argv)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):  # as command.run does; users have no probe
                signal.signal(number, signal.SIG_IGN)
            probe.leave()

    command.run(main)


class Probe:
    """Follows a run, records the data it reads, and sends the signal or injects the faults."""

    def __init__(self, rank: int, stop: Stop | None, faults: list[Fault]) -> None:
        self.rank, self.stop, self.faults = rank, stop, faults
        self.trainer: Any = None
        self.micro: int | None = None  # of a step, while the backend computes it
        self.syncs = 0
        self.compiling = False
        self.stream = os.open(f"stream-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        """Wrap the functions that show where the run is."""
        import train
        from llamalet.backward.training_model import TrainingModel
        from llamalet.shards import TokenArray
        from training.batches import Windows
        from training.machine import hardware
        from training.run import checkpoint
        from training.run.interrupts import Interrupts
        from training.step_numba import NumbaBackend
        from training.step_torch import TorchBackend
        from training.trainer import Trainer

        wrap(Interrupts, "__enter__", after=lambda signals: self.at("start"))
        wrap(Trainer, "__init__", before=lambda *a, **k: self.at("set-up"))
        wrap(hardware, "compile_problem", before=lambda device: self.at("compiler"))
        wrap(train, "finish", before=lambda trainer: self.at("finish"))
        wrap(Trainer, "train", before=self.begin)
        wrap(Trainer, "prepare", before=lambda t: self.compiles(True), after=lambda t: self.compiles(False))
        wrap(Trainer, "optimizer_step", after=lambda t: self.at("stepped"))
        wrap(Trainer, "evaluate", after=lambda t: self.at("evaluated"))
        wrap(checkpoint, "save", before=lambda *a, **k: self.resets_syncs(), after=lambda *a, **k: self.at("saved"))
        wrap(os, "fsync", before=self.synced)
        wrap(Windows, "epoch_starts", before=lambda windows, seed, epoch: self.at("epoch", epoch))
        wrap(TokenArray, "__getitem__", before=self.reads)
        for backend in (TorchBackend, NumbaBackend):
            self.follow(backend)
        TorchBackend.loss = self.torch_faults(TorchBackend.loss)
        TrainingModel.loss_and_gradients = self.numba_faults(TrainingModel.loss_and_gradients)

    def begin(self, trainer: Any) -> None:
        self.trainer = trainer
        self.at("train")

    def compiles(self, now: bool) -> None:
        self.compiling = now
        if now:
            self.at("compile")

    def resets_syncs(self) -> None:
        self.syncs = 0

    def synced(self, descriptor: int) -> None:
        self.syncs += 1
        self.at("saving", self.syncs)

    def reads(self, tokens: Any, where: slice) -> None:
        """Report a window that spans two shards."""
        ends = tokens._ends
        if ends.searchsorted(where.start, "right") != ends.searchsorted(where.stop - 1, "right"):
            self.at("across shards")

    def follow(self, backend: Any) -> None:
        """Report a backend's micro-batches when it asks for them."""
        step, losses = backend.step, backend.losses
        backend.step = lambda this, batches, rate: step(this, self.training(batches), rate)
        backend.losses = lambda this, batches: self.evaluation_faults(losses(this, self.evaluating(batches)))

    def training(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Pass on the micro-batches of a step."""
        trainer = self.trainer
        for self.micro, (index, batch) in enumerate(batches):
            self.at("micro", self.micro)
            place = (trainer.step * trainer.accumulation + self.micro) * trainer.group.count + trainer.group.rank
            for row, (tokens, targets) in enumerate(zip(*batch, strict=True)):
                sequence = place * trainer.config.batch_size + row
                line = json.dumps([sequence, hashlib.sha256(bytes(tokens) + bytes(targets)).hexdigest()])
                os.write(self.stream, line.encode() + b"\n")
            yield index, batch
        self.micro = None

    def evaluating(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Pass on the batches of an evaluation."""
        for number, batch in enumerate(batches):
            if not self.compiling:
                self.at("evaluating", number)
            yield batch

    def evaluation_faults(self, losses: list[float]) -> list[float]:
        """Add the faults to the losses of an evaluation."""
        wrong = sum(fault.value for fault in self.faults if (fault.kind, fault.step) == ("evaluation", self.step))
        return [loss + wrong for loss in losses]

    def faults_now(self, kind: str) -> list[float]:
        """Return the wrong numbers of this kind in the micro-step that is being computed."""
        return [
            fault.value
            for fault in self.faults
            if self.micro is not None
            and (fault.kind, fault.step) == (kind, self.step)
            and fault.micro in (self.micro, None)
        ]

    def torch_faults(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Return TorchBackend.loss with the faults of training."""

        def loss(backend: Any, model: Any, batch: Any) -> Any:
            result = compute(backend, model, batch) + sum(self.faults_now("loss"))
            for value in self.faults_now("gradient"):
                spoil_gradient(backend.model.norm.weight, value)
            return result * math.prod(self.faults_now("spike"))

        return loss

    def numba_faults(self, compute: Callable[..., float]) -> Callable[..., float]:
        """Return TrainingModel.loss_and_gradients with the same faults."""

        def loss_and_gradients(model: Any, *args: Any, share: float = 1.0, **options: Any) -> float:
            factor = math.prod(self.faults_now("spike"))
            loss = factor * compute(model, *args, share=factor * share, **options)
            for value in self.faults_now("gradient"):
                model.gradients["norm"][0] = value
            return loss + sum(self.faults_now("loss"))

        return loss_and_gradients

    def at(self, event: str, part: int | None = None) -> None:
        """Send the signal if the run has reached the point of the Stop."""
        stop = self.stop
        if stop is None or stop.event != event or (stop.step is not None and stop.step != self.step):
            return
        last = self.trainer.accumulation - 1 if self.trainer else 0
        wanted = {"mid": (last + 1) // 2, "last": last}.get(str(stop.part), stop.part)
        if wanted not in (None, part):
            return
        self.stop = None
        number = signal.Signals[stop.how]
        if stop.after_s:
            later(stop.after_s, number, Path(f"signal-{self.rank}"))
            return
        Path(f"signal-{self.rank}").write_text(str(time.time()))
        if stop.closes is not None:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, stop.closes)
        os.kill(os.getpid(), number)
        if stop.again_s is not None:
            time.sleep(stop.again_s)
            os.kill(os.getpid(), number)
            time.sleep(LIMIT_S)

    @property
    def step(self) -> int:
        return self.trainer.step if self.trainer else 0

    def leave(self) -> None:
        """Write the final state of the run to state-RANK.json."""
        import torch
        from torch.distributed.fsdp import FSDPModule

        trainer = self.trainer
        if trainer is None or isinstance(
            trainer.backend.model, FSDPModule
        ):  # each process holds only its share of the state
            return
        state = {
            "step": trainer.step,
            "val_loss": trainer.val_loss,
            "weights": digest(trainer.backend.weights()),
            "optimizer": digest(trainer.backend.state()),
            "guard": trainer.backend.guard_state(),
            "random": hashlib.sha256(bytes(torch.get_rng_state().numpy())).hexdigest(),
        }
        Path(f"state-{self.rank}.json").write_text(json.dumps(state))


def spoil_gradient(weight: Any, value: float) -> None:
    """Replace the first number of the next gradient of a torch weight."""

    def spoil(gradient: Any) -> Any:
        handle.remove()
        gradient = gradient.clone()
        gradient[0] = value
        return gradient

    handle = weight.register_hook(spoil)


def later(seconds: float, number: int, note: Path) -> None:
    """Send a signal to this process from another one after a delay."""
    target = os.getpid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        time.sleep(seconds)
        if os.getppid() == target:
            note.write_text(str(time.time()))
            os.kill(target, number)
        os._exit(0)


def wrap(
    owner: Any, name: str, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> None:
    """Call `before` and, if the function returns, `after` with its arguments on every call of it."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            before(*args, **kwargs)
        result = function(*args, **kwargs)
        if after:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def digest(arrays: Mapping[str, Any]) -> str:
    """Return one SHA-256 over arrays and their names."""
    seal = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        seal.update(f"{name} {array.dtype} {array.shape}".encode())
        seal.update(array.tobytes())
    return seal.hexdigest()


def stream(folder: Path) -> dict[int, str]:
    """Return the digest of each training sequence by its number, checking that repeated ones are equal."""
    taken: dict[int, str] = {}
    for path in folder.glob("stream-*.jsonl"):
        for line in path.read_text().splitlines():
            sequence, seal = json.loads(line)
            assert taken.setdefault(sequence, seal) == seal, f"sequence {sequence} changed"
    return taken


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without the fields that depend on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def small_shards(folder: Path, vocab_size: int, *, n_tokens: int = 700, shard_tokens: int = 130) -> Path:
    """Write toy data in several shards whose ends fall inside documents and windows."""
    import numpy as np
    from toy import toy_data

    from llamalet import shards

    toy_data(folder, vocab_size, n_tokens=n_tokens)
    meta = shards.read_meta(folder / shards.META_FILE)
    ids = shards.Shards.open(folder).split("train")[:n_tokens]
    (folder / "train_00000.bin").unlink()
    parts = []
    for number, begin in enumerate(range(0, n_tokens, shard_tokens)):
        part = np.asarray(ids[begin : begin + shard_tokens])
        documents = int((part == meta.bos_id).sum())
        block = shards.TokenBlock(ids=part, documents=documents, text_bytes=3 * len(part))
        parts.append(shards.write_shard(folder / f"train_{number:05d}.bin", [block], vocab_size))
    splits = meta.splits | {"train": shards.Split(tuple(parts))}
    shards.write_meta(folder / shards.META_FILE, dataclasses.replace(meta, splits=splits))
    return folder
