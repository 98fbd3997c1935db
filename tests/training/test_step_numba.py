"""The same run with PyTorch and without: losses, checkpoints, and what is refused."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from toy import toy_data

import train
from llamalet.backward.runner import Runner
from llamalet.backward.training_model import TrainingModel
from llamalet.convert import safetensors_file
from llamalet.errors import ConfigError, NonFiniteError
from llamalet.kernels import bfloat16
from training import evaluation
from training.config import TrainConfig
from training.step_numba import NumbaBackend

ROOT = Path(__file__).parents[2]
VOCAB = 300
OPTIONS = [
    "--dim=32", "--n_layers=2", "--n_heads=4", "--n_kv_heads=2", "--max_seq_len=32", "--batch_size=2",
    "--total_batch_tokens=128", "--max_iters=8", "--warmup_iters=2", "--eval_interval=4", "--eval_iters=3",
    "--save_every=2", "--keep=9", "--log_interval=1", "--learning_rate=1e-2", "--threads=2", "--compile=False",
    "--dtype=float32", "--no-sample",
]  # fmt: skip
NUMBA = "--backend=numba"
needs_bfloat16 = pytest.mark.skipif(bfloat16.instructions() is None, reason="bfloat16 does not pay here")
each_kind = pytest.mark.parametrize(
    "more",
    [
        ("--optimizer=muon",),
        ("--optimizer=adamw", "--dropout=0.1"),
        pytest.param(("--dtype=bfloat16",), marks=needs_bfloat16),
    ],
    ids=" ".join,
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_data(tmp_path / "data" / "toy", VOCAB)
    return tmp_path


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row[key] for row in rows(folder) for key in ("loss", "val_loss") if key in row]


def machine(folder: Path) -> dict:
    return json.loads((folder / "checkpoints" / "step-00000008" / "state.json").read_text())["machine"]


def digests(folder: Path, step: int) -> list[str]:
    """The SHA-256 of the weights and of the optimizer after a step."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    return [hashlib.sha256((path / f"{name}.safetensors").read_bytes()).hexdigest() for name in ("model", "optimizer")]


@pytest.mark.trains
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_are_those_of_torch(project, optimizer):
    options = [*OPTIONS, f"--optimizer={optimizer}", "--max_iters=6"]
    assert train.main([*options, "--out_dir=start", "--max_iters=1", NUMBA]) == 0
    for backend in ("torch", "numba"):
        options_of = [*options, "--init_from=start", f"--out_dir={backend}", f"--backend={backend}"]
        assert train.main(options_of) == 0
    np.testing.assert_allclose(losses(project / "numba"), losses(project / "torch"), atol=1e-4)
    assert [row.keys() for row in rows(project / "numba")] == [row.keys() for row in rows(project / "torch")]


@needs_bfloat16
@pytest.mark.trains
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_in_bfloat16_are_nearly_those_of_torch(project, optimizer):
    options = [*OPTIONS, f"--optimizer={optimizer}", "--dtype=bfloat16"]
    assert train.main([*options, "--out_dir=start", "--max_iters=1", NUMBA]) == 0
    for backend in ("torch", "numba"):
        assert train.main([*options, "--init_from=start", f"--out_dir={backend}", f"--backend={backend}"]) == 0
    np.testing.assert_allclose(losses(project / "numba"), losses(project / "torch"), atol=0.02)
    assert "bfloat16" in json.dumps(machine(project / "numba"))


@pytest.mark.trains
@each_kind
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(project, more):
    assert train.main([*OPTIONS, *more, NUMBA, "--out_dir=whole"]) == 0
    # Resumed from a checkpoint in its middle, where torch is installed and nobody says which backend.
    assert train.main([*OPTIONS, *more, NUMBA, "--out_dir=part"]) == 0
    assert train.main(["--out_dir=again", "--resume=part/checkpoints/step-00000002"]) == 0
    assert digests(project / "whole", 8) == digests(project / "again", 8)
    assert losses(project / "whole")[-3:] == losses(project / "again")[-3:]


@pytest.mark.trains
def test_the_bits_do_not_depend_on_the_number_of_threads(project):
    for threads in (1, 2):
        assert train.main([*OPTIONS, NUMBA, f"--threads={threads}", f"--out_dir=t{threads}"]) == 0
    assert digests(project / "t1", 8) == digests(project / "t2", 8)


@pytest.mark.trains
@pytest.mark.parametrize(("first", "second"), [("torch", "numba"), ("numba", "torch")])
def test_either_backend_continues_the_others_run(project, capsys, first, second):
    options = [*OPTIONS, "--optimizer=adamw", f"--backend={first}"]
    assert train.main([*options, "--out_dir=a"]) == 0
    for backend in (first, second):
        resume = ["--resume=a/checkpoints/step-00000002", f"--backend={backend}", f"--out_dir={backend}"]
        assert train.main(resume) == 0
        assert (f"unstopped run gives: backend {first} before, {second} now" in capsys.readouterr().out) == (
            backend != first
        )
    np.testing.assert_allclose(losses(project / first), losses(project / second), atol=1e-4)


@pytest.mark.trains
def test_a_step_that_is_not_finite_changes_nothing(project, monkeypatch):
    step, count = NumbaBackend.step, 0

    def poisoned(backend, batches, rate):
        nonlocal count
        count += 1
        if count == 3:
            batches = list(batches)
            backend.model.weights["norm"][0], kept = np.nan, backend.model.weights["norm"][0]
            step(backend, batches, rate)
            backend.model.weights["norm"][0] = kept
        else:
            step(backend, batches, rate)

    monkeypatch.setattr(NumbaBackend, "step", poisoned)
    assert train.main([*OPTIONS, NUMBA, "--save_every=1"]) == 0
    assert digests(project / "out", 2) == digests(project / "out", 3) != digests(project / "out", 4)
    assert [row["skipped"] for row in rows(project / "out") if "skipped" in row] == [0, 0, *[1] * 6]


@pytest.mark.trains
def test_an_infinite_gradient_beside_a_finite_loss_is_skipped(project, monkeypatch):
    compute, calls = TrainingModel.loss_and_gradients, []

    def poisoned(model, *args, **options):
        loss = compute(model, *args, **options)
        calls.append(loss)
        if len(calls) == 6:  # after the one that prepares: in the third step
            model.gradients["layers.1.feed_forward.w2"][3, 5] = np.inf
        return loss

    monkeypatch.setattr(TrainingModel, "loss_and_gradients", poisoned)
    assert train.main([*OPTIONS, NUMBA, "--save_every=1"]) == 0
    assert np.isfinite(calls).all()
    assert [row["skipped"] for row in rows(project / "out") if "skipped" in row] == [0, 0, *[1] * 6]
    assert digests(project / "out", 2) == digests(project / "out", 3) != digests(project / "out", 4)


@pytest.mark.trains
def test_too_many_in_a_row_end_the_run(project, monkeypatch):
    monkeypatch.setattr("llamalet.backward.optimizer.NumbaOptimizer.norm", lambda self, gradients: float("nan"))
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        train.main([*OPTIONS, NUMBA, "--max_skipped=2"])


def kinds_of_calls(monkeypatch) -> set:
    """A set that gets the function and the types of its arguments, on which its compilation depends, of every call."""
    run, kinds = Runner.run, set()

    def noted(runner, op, n_blocks, *arguments):
        kinds.add((op.__name__, tuple(map(numba.typeof, arguments))))
        run(runner, op, n_blocks, *arguments)

    monkeypatch.setattr(Runner, "run", noted)
    return kinds


@pytest.mark.trains
@each_kind
def test_all_is_compiled_before_the_first_step(project, monkeypatch, more):
    kinds, prepare, prepared = kinds_of_calls(monkeypatch), NumbaBackend.prepare, set()

    def noted(backend, *batches):
        before = {name: weight.copy() for name, weight in (backend.weights() | backend.state()).items()}
        prepare(backend, *batches)
        prepared.update(kinds)
        after = backend.weights() | backend.state()
        assert all(np.array_equal(after[name], value) for name, value in before.items())

    monkeypatch.setattr(NumbaBackend, "prepare", noted)
    assert train.main([*OPTIONS, *more, NUMBA, "--max_iters=2"]) == 0
    assert prepared and kinds == prepared


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_signal_while_kernels_are_compiled_ends_the_run_at_once(project, monkeypatch, capsys):
    calls = []

    def compiling(runner, op, *arguments):
        calls.append(op)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Runner, "run", compiling)
    assert train.main([*OPTIONS, NUMBA]) == 75
    assert len(calls) == 3
    assert "interrupted at step 0 of 8, resume with: python train.py --resume" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(project)
    assert train.main(["--resume", NUMBA, "--max_iters=1"]) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_memory_is_said_before_it_is_taken(project, monkeypatch, capsys, optimizer):
    def refuse(count):
        raise MemoryError

    monkeypatch.setattr("llamalet.backward.memory.Memory", refuse)
    words = r"batch_size=2: training takes \d MiB of memory, more than is free; use a smaller --batch_size"
    with pytest.raises(ConfigError, match=words):
        train.main([*OPTIONS, NUMBA, f"--optimizer={optimizer}"])
    assert "MiB of weights, gradients, activations and moments" in capsys.readouterr().out


def test_more_memory_than_is_free_is_refused(project):
    with pytest.raises(
        ConfigError, match=r"batch_size=9000000: training takes [\d,]+ MiB of memory, more than is free"
    ):
        train.main([*OPTIONS, NUMBA, "--batch_size=9000000", "--total_batch_tokens=288000000"])


@pytest.mark.trains
def test_eval_only_finds_the_numbers_of_torch(project, monkeypatch, capsys):
    assert train.main([*OPTIONS, NUMBA, "--max_iters=4"]) == 0
    totals, printed, report = [], [], evaluation.report
    monkeypatch.setattr(evaluation, "report", lambda total, entropy: (totals.append(total), report(total, entropy))[1])
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 4 * VOCAB * 100)  # several batches, of unequal lengths
    for backend in ("torch", "numba"):
        capsys.readouterr()
        assert train.main(["--eval_only", f"--backend={backend}"]) == 0
        printed.append(capsys.readouterr().out)
    assert totals[1].nats == pytest.approx(totals[0].nats, rel=1e-6) and totals[0].nats > 0
    assert dataclasses.replace(totals[1], nats=totals[0].nats) == totals[0]
    assert printed[0] == printed[1] and "on the val split of" in printed[0]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--device=cuda", "device=cuda: the numba backend computes on the CPU only"),
        ("--parallel=fsdp", "parallel=fsdp: the numba backend has one process"),
        ("--threads=1025", "threads=1025: must be at most 1024"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(project, option, words):
    with pytest.raises(ConfigError, match=words):
        train.main([*OPTIONS, NUMBA, option])


def test_bfloat16_needs_a_processor_that_multiplies_it(project, monkeypatch):
    monkeypatch.setattr(bfloat16, "instructions", lambda: None)
    with pytest.raises(ConfigError, match="dtype=bfloat16: this processor does not multiply it faster"):
        train.main([*OPTIONS, NUMBA, "--dtype=bfloat16"])


@pytest.mark.parametrize(
    "resume", ["--resume", "--resume=auto", "--resume=out", "--init_from=resume", "--resume=out/{}"]
)
def test_a_run_keeps_its_backend_unless_told_otherwise(project, resume):
    last = "checkpoints/step-00000001"
    assert train.main([*OPTIONS, NUMBA, "--max_iters=1"]) == 0
    config = train.read_options(TrainConfig, [resume.format(last)])
    assert train.choose_backend(config) == "numba"
    assert train.choose_backend(dataclasses.replace(config, backend="torch")) == "torch"
    assert train.choose_backend(TrainConfig()) == train.choose_backend(TrainConfig(resume="nowhere")) == "torch"
    (project / "out" / last / "state.json").write_text("{")
    assert train.choose_backend(config) == "torch"


def test_numba_that_compiles_nothing_is_refused(project, monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(ConfigError, match="backend=numba: NUMBA_DISABLE_JIT is set"):
        train.main([*OPTIONS, NUMBA])


def test_torchrun_is_refused_by_name(project, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="torchrun: the numba backend has one process, not 2"):
        train.main([*OPTIONS, NUMBA])


WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
import train
from llamalet.command import run
run(train.main)
"""


@pytest.mark.trains
def test_a_run_without_torch_is_the_same_run(project):
    command = [sys.executable, "-c", WITHOUT_TORCH, *OPTIONS, "--out_dir=without"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "backend  numba, because PyTorch is not installed" in done.stdout
    assert train.main([*OPTIONS, NUMBA, "--out_dir=with"]) == 0
    assert digests(project / "without", 8) == digests(project / "with", 8)
    command[3:] = ["--eval_only", "--out_dir=without"]
    scored = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert scored.returncode == 0 and "nats per token" in scored.stdout, scored.stderr
    asked = subprocess.run([*command, "--backend=torch"], env=environment, capture_output=True, text=True, timeout=300)
    assert asked.returncode == 2 and "backend=torch: PyTorch is not installed" in asked.stderr


def test_new_weights_are_drawn_as_the_models(project):
    """Same distribution, not the same numbers."""
    from llamalet.backward.initial_weights import initial_weights
    from llamalet.config import ModelConfig
    from model import Llama

    config = ModelConfig.create(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=64)
    torch.manual_seed(1)
    for init in ("normal", "copying"):
        ours, model = initial_weights(config, 1, init), Llama(config)
        if init == "copying":
            model.start_by_copying()
        theirs = {name.removesuffix(".weight"): weight.detach().numpy() for name, weight in model.named_parameters()}
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            assert ours[name].shape == weight.shape and ours[name].dtype == np.float32
            assert ours[name].std() == pytest.approx(weight.std(), rel=0.1)
            assert ours[name].mean() == pytest.approx(weight.mean(), abs=0.01)
    again, other = (initial_weights(config, seed, "copying") for seed in (1, 2))
    assert all(np.array_equal(ours[name], again[name]) for name in ours)
    assert not np.array_equal(ours["tok_embeddings"], other["tok_embeddings"])
    wq, wk = (ours[f"layers.0.attention.{name}"].reshape(-1, 16, 64) for name in ("wq", "wk"))
    assert np.array_equal(wq, np.repeat(wk, 2, axis=0))


def test_checkpoints_name_tensors_as_torch_does(project):
    assert train.main([*OPTIONS, NUMBA, "--max_iters=1"]) == 0
    assert train.main([*OPTIONS, "--backend=torch", "--max_iters=1", "--out_dir=torch"]) == 0
    for name in ("model", "optimizer"):
        ours, theirs = (
            safetensors_file.read_arrays(project / out / "checkpoints" / "step-00000001" / f"{name}.safetensors")
            for out in ("out", "torch")
        )
        assert {key: (a.shape, a.dtype) for key, a in ours.items()} == {
            k: (a.shape, a.dtype) for k, a in theirs.items()
        }
