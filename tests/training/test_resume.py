"""A run that was stopped and went on is the run that was never stopped, to the last bit."""

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import BACKENDS, ROOT, SKIPPED, SPIKE, Ended, Stop, rows, run, small_shards, stream
from safetensors.torch import load_file
from torture import cases

pytestmark = pytest.mark.trains

VOCAB = 300
OPTIONS = [
    "--dim=32", "--n_layers=2", "--n_heads=2", "--max_seq_len=32", "--batch_size=2", "--total_batch_tokens=256",
    "--max_iters=10", "--warmup_iters=2", "--eval_interval=4", "--eval_iters=3", "--save_every=3", "--keep=9",
    "--log_interval=1", "--learning_rate=1e-2", "--threads=1", "--min_lr=1e-4", "--no-sample", "--random_starts=0.4",
]  # fmt: skip
KINDS = {
    "plain": ["--optimizer=adamw", "--dtype=float32"],
    "dropout bf16": ["--optimizer=adamw", "--dropout=0.1", "--dtype=bfloat16"],
    "muon dropout": ["--dropout=0.1", "--optimizer=muon", "--dtype=float32"],
    "muon bf16": ["--optimizer=muon", "--dtype=bfloat16"],
}
NUMBA_KINDS = {
    "numba muon": [*BACKENDS["numba"], "--optimizer=muon"],
    "numba dropout": [*BACKENDS["numba"], "--optimizer=adamw", "--dropout=0.1"],
}

# Where a run stops, one after the other; steps count from 0, so that "stepped 4" is just before an evaluation.
CUTS: dict[str, list[Stop]] = {
    "before the first step": [Stop("train", 0)],
    "in the first micro-step": [Stop("micro", 0, 0, "SIGINT")],
    "killed in the first step": [Stop("micro", 0, "mid", "SIGKILL")],
    "after the first step": [Stop("stepped", 1)],
    "mid accumulation": [Stop("micro", 2, "mid")],
    "killed mid accumulation": [Stop("micro", 8, "mid", "SIGKILL")],
    "in the last micro-step of a step": [Stop("micro", 1, "last", "SIGINT")],
    "right before evaluation": [Stop("stepped", 4)],
    "in evaluation": [Stop("evaluating", 4, 1)],
    "killed in evaluation": [Stop("evaluating", 4, 1, "SIGKILL")],
    "right after evaluation": [Stop("evaluated", 4, how="SIGINT")],
    "killed right after evaluation": [Stop("evaluated", 4, how="SIGKILL")],
    "in the save after evaluation": [Stop("saving", 8, 2)],
    "killed right after the save": [Stop("saved", 8, how="SIGKILL")],
    "at a shard's end": [Stop("across shards", 2)],
    "at an epoch's end": [Stop("epoch", part=1)],
    "killed at an epoch's end": [Stop("epoch", part=2, how="SIGKILL")],
    "in a step that is skipped": [Stop("micro", 5, "last")],
    "after a skipped step": [Stop("stepped", 6)],
    "killed after a skipped step": [Stop("stepped", 6, how="SIGKILL")],
    "after a spike": [Stop("stepped", 8, how="SIGINT")],
    "twice": [Stop("micro", 2, "mid"), Stop("stepped", 7)],
    "twice in one step": [Stop("micro", 3, 0), Stop("micro", 3, 0, "SIGINT")],
    "killed thrice": [Stop(place, step, how="SIGKILL") for place, step in (("micro", 2), ("stepped", 5), ("micro", 9))],
    "in the last step": [Stop("micro", 9, "mid")],
    "before the last evaluation": [Stop("stepped", 10)],
    "in the last evaluation": [Stop("evaluating", 10, 0)],
    "killed in the last save": [Stop("saving", 10, 1, "SIGKILL")],
}  # fmt: skip
NAMES = list(CUTS)


def train(folder: Path, kind: str, processes: int, compiled: bool, stop: Stop | None = None, *more: str) -> Ended:
    argv = [*OPTIONS, *(KINDS | NUMBA_KINDS)[kind], f"--compile={compiled}", *more]
    patches = {"training.guard.WINDOW": 3}
    return run(folder, argv, processes=processes, stop=stop, faults=[SKIPPED, SPIKE], patches=patches)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """Give the run that was never stopped, of each kind and setting; run once."""

    @functools.cache
    def reference(kind: str, processes: int, compiled: bool, *more: str) -> Ended:
        folder = tmp_path_factory.mktemp("whole")
        small_shards(folder / "data" / "toy", VOCAB)
        whole = train(folder, kind, processes, compiled, None, *more)
        assert whole.codes == [0] * processes, whole.err
        assert whole.state["guard"][3] == 2, "the bad step and the spike are skipped"
        return whole

    return reference


def check_cut(folder: Path, whole: Ended, name: str, kind: str, processes: int, compiled: bool) -> None:
    """Stop a run as CUTS says, let it go on to its end, and compare it with the one that was never stopped."""
    shutil.copytree(whole.folder / "data", folder / "data")
    more: tuple[str, ...] = ()
    for stop in CUTS[name]:
        stopped = train(folder, kind, processes, compiled, stop, *more)
        if stop.how == "SIGKILL":
            assert -9 in stopped.codes, (stop, stopped)
        else:
            assert stopped.codes == [75] * processes, (stop, stopped)
            step = stopped.state["step"]
            assert stop.step is None or step - stop.step in (0, 1)  # what is saved is this step, or it ends first
            assert stopped.last_line.startswith(f"interrupted at step {step} of 10"), stopped.out
            assert (folder / "out" / "checkpoints" / f"step-{step:08d}").is_dir()
        more = ("--resume",)
    ended = train(folder, kind, processes, compiled, None, "--resume")
    assert ended.codes == [0] * processes, ended.err
    if name not in ("before the last evaluation", "in the last evaluation", "killed in the last save"):
        assert ended.state == whole.state
    else:  # no step was left to do, so nothing random was drawn
        assert ended.state | {"random": 0} == whole.state | {"random": 0}
    assert stream(folder) == stream(whole.folder)
    assert rows(folder / "out") == rows(whole.folder / "out")


def kind_of(number: int) -> str:
    """Give each cut another kind of run, so that all of them are met."""
    return list(KINDS)[number % len(KINDS)]


@pytest.mark.campaign("exact resume: 1 process, eager")
@pytest.mark.parametrize("number", range(len(CUTS)), ids=NAMES)
def test_one_process(number, never_stopped, tmp_path):
    kind = kind_of(number)
    check_cut(tmp_path, never_stopped(kind, 1, False), NAMES[number], kind, 1, False)


FEW_OF_NUMBA = [
    "killed mid accumulation",
    "mid accumulation",
    "killed after a skipped step",
    "after a spike",
]


@pytest.mark.campaign("exact resume: numba")
@pytest.mark.parametrize(
    ("name", "kind"),
    cases(list(zip(FEW_OF_NUMBA, itertools.cycle(NUMBA_KINDS))), list(itertools.product(NAMES, NUMBA_KINDS))),
)
def test_numba(name, kind, never_stopped, tmp_path):
    check_cut(tmp_path, never_stopped(kind, 1, False), name, kind, 1, False)


FEW = ["mid accumulation", "in evaluation", "in the save after evaluation", "killed after a skipped step"]


@pytest.mark.campaign("exact resume: 2 processes, eager")
@pytest.mark.parametrize("name", cases(FEW, NAMES))
def test_two_processes(name, never_stopped, tmp_path):
    kind = kind_of(NAMES.index(name) // cases(7, 1))
    check_cut(tmp_path, never_stopped(kind, 2, False), name, kind, 2, False)


@pytest.mark.campaign("exact resume: 1 process, compiled")
@pytest.mark.parametrize("name", cases(["mid accumulation", "killed after a skipped step"], NAMES))
def test_compiled(name, never_stopped, tmp_path):
    kind = kind_of(NAMES.index(name)) if cases(0, 1) else "dropout bf16"
    check_cut(tmp_path, never_stopped(kind, 1, True), name, kind, 1, True)


@pytest.mark.campaign("exact resume: 2 processes, compiled")
@pytest.mark.parametrize("name", cases([], NAMES))
def test_two_processes_compiled(name, never_stopped, tmp_path):
    kind = kind_of(NAMES.index(name))
    check_cut(tmp_path, never_stopped(kind, 2, True), name, kind, 2, True)


def assert_same_but_for_rounding(folder: Path, other: Path, last: int = 10) -> None:
    """Sums of four depend on their order; no figure and no weight may differ more than that makes it."""
    figures = [
        [{key: value for key, value in row.items() if value is not None} for row in rows(path / "out")]
        for path in (folder, other)
    ]
    for ours, theirs in zip(*figures, strict=True):
        if ours["step"] != SPIKE.step + 1:  # in each process it is a share of the data that is blown up
            assert ours == pytest.approx(theirs, rel=1e-6)
    one, two = (load_file(path / f"out/checkpoints/step-{last:08d}/model.safetensors") for path in (folder, other))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


PAIRED = "--total_batch_tokens=128"
"""Two micro-steps: the sum of two gradients does not depend on who adds them, so the bits are the same."""


@pytest.mark.campaign("exact resume: another number of processes")
@pytest.mark.parametrize("kind", cases(["muon dropout"], list(KINDS)))
@pytest.mark.parametrize("counts", [(1, 2, 1), (2, 1)], ids=str)
def test_two_processes_are_one_to_the_last_bit(counts, kind, never_stopped, tmp_path):
    one, two = (never_stopped(kind, count, False, PAIRED) for count in (1, 2))
    go_on_with(tmp_path, counts, kind, one, PAIRED)
    ended = train(tmp_path, kind, 1, False, None, "--resume")
    assert stream(tmp_path) == stream(one.folder) == stream(two.folder)
    assert len(stream(tmp_path)) == 40
    for name in ("step", "weights", "optimizer", "guard"):
        assert ended.state[name] == one.state[name] == two.state[name], name


@pytest.mark.campaign("exact resume: another number of processes")
@pytest.mark.parametrize("counts", cases([(4, 1)], [(4, 1), (1, 4, 2), (2, 4)]), ids=str)
def test_another_number_of_processes_goes_on_with_the_same_stream(counts, never_stopped, tmp_path):
    one = never_stopped("plain", 1, False)
    go_on_with(tmp_path, counts, "plain", one)
    assert stream(tmp_path) == stream(one.folder)
    assert len(stream(tmp_path)) == 80
    assert_same_but_for_rounding(tmp_path, one.folder)


def go_on_with(folder: Path, counts: tuple[int, ...], kind: str, whole: Ended, *more: str) -> None:
    """Run with the first number of processes, and go on with each of the others."""
    shutil.copytree(whole.folder / "data", folder / "data")
    for number, count in enumerate(counts):
        stop = Stop("micro", 3 * number + 1, 0) if number + 1 < len(counts) else None
        ended = train(folder, kind, count, False, stop, *more, *(["--resume"] if number else []))
        assert ended.codes == [75 if stop else 0] * count, ended.err
        assert ("not to the last bit what an unstopped run gives: processes" in ended.out) == bool(number)


@pytest.mark.campaign("4 processes are 1 within 1e-6")
def test_four_processes_are_one_but_for_rounding(never_stopped, tmp_path):
    one = never_stopped("plain", 1, False)
    shutil.copytree(one.folder / "data", tmp_path / "data")
    four = train(tmp_path, "plain", 4, False)
    assert four.codes == [0] * 4, four.err
    assert four.state["step"] == 10
    assert stream(tmp_path) == stream(one.folder)
    assert_same_but_for_rounding(tmp_path, one.folder)


@pytest.mark.parametrize(
    ("first", "then"),
    [((1, "--batch_size=4"), (1, "--batch_size=1")), ((1, "--batch_size=4"), (2, "--batch_size=2")), ((2,), (1,))],
    ids=str,
)
def test_the_steps_stay_whatever_they_are_made_of(first, then, tmp_path):
    """Where nobody says how large a step is, it is as large as it was when the run began."""
    options = [option for option in OPTIONS if not option.startswith("--total_batch_tokens")] + ["--max_iters=6"]
    options += [*KINDS["plain"], "--compile=False", "--eval_iters=99"]  # all of the split, whatever a batch is
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        small_shards(folder / "data" / "toy", VOCAB)
    (count, *words), (new_count, *new_words) = first, then
    assert run(folders[0], [*options, *words], processes=count).codes == [0] * count
    stopped = run(folders[1], [*options, *words], processes=count, stop=Stop("micro", 3, 0))
    assert stopped.codes == [75] * count, stopped.err
    ended = run(folders[1], ["--resume", *new_words], processes=new_count)
    assert ended.codes == [0] * new_count, ended.err
    assert "step     128 tokens = " in ended.out and ended.state["step"] == 6
    assert stream(folders[1]) == stream(folders[0]) and len(stream(folders[0])) == 24
    assert_same_but_for_rounding(*folders, last=6)


@pytest.mark.campaign("torchrun goes on by itself after kill -9")
@pytest.mark.parametrize("rank", cases([1], [0, 1]))
def test_torchrun_starts_a_run_again_whose_process_was_killed(rank, never_stopped, tmp_path):
    whole = never_stopped("plain", 2, False)
    shutil.copytree(whole.folder / "data", tmp_path / "data")
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE.format(rank=rank))
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=2", "--monitor-interval=0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script), *OPTIONS, *KINDS["plain"],
         "--compile=False"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "killed").exists()
    assert re.search(r"resume   after step [3-5] of 10", done.stdout)
    assert stream(tmp_path) == stream(whole.folder)
    assert rows(tmp_path / "out") == rows(whole.folder / "out")
    for name in ("model", "optimizer"):
        files = [path / "out/checkpoints/step-00000010" / f"{name}.safetensors" for path in (tmp_path, whole.folder)]
        assert files[0].read_bytes() == files[1].read_bytes()


KILLED_ONCE = """
import os, pathlib, sys
import forked, train, training.guard, training.trainer
training.guard.WINDOW = 3
rank, mark = int(os.environ["RANK"]), pathlib.Path("killed")
from forked import SKIPPED, SPIKE
stop = None
if rank == {rank} and not mark.exists():
    stop = forked.Stop("micro", 5, 0, "SIGKILL")
probe = forked.Probe(rank, stop, [fault for fault in (SKIPPED, SPIKE) if fault.rank in (None, rank)])
probe.install()
kill = os.kill
os.kill = lambda *arguments: (mark.touch(), kill(*arguments))
sys.exit(train.main(sys.argv[1:]))
"""
