"""Several processes as one: DDP and FSDP, with the checkpoints of either and of a single process; lost processes."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from forked import ROOT
from safetensors.torch import load_file
from torture import cases
from toy import toy_data

from llamalet.errors import CheckpointError, DiskError
from llamalet.hf_names import MODEL_SAFETENSORS
from llamalet.model_file.checkpoint import OPTIMIZER, STATE, find_latest, list_steps, step_of
from training.run.checkpoint import save

pytestmark = pytest.mark.trains

VOCAB = 301  # not even: the processes' shares differ in size
SMALL = [
    "--dim=32", "--n_layers=2", "--n_heads=2", "--max_seq_len=32", "--batch_size=2", "--max_iters=4",
    "--warmup_iters=1", "--eval_interval=2", "--eval_iters=2", "--log_interval=1", "--learning_rate=1e-2",
    "--compile=False", "--threads=1", "--no-sample", "--keep=9", "--total_batch_tokens=128", "--optimizer=adamw",
    "--min_lr=1e-4",
]  # fmt: skip
FSDP = "--parallel=fsdp"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    toy_data(folder / "data" / "toy", VOCAB)
    return folder


def train(folder: Path, *argv: str, processes: int = 2, codes: tuple[int, ...] = (0,)) -> forked.Ended:
    ended = forked.run(folder, [*SMALL, *argv], processes=processes)
    assert set(ended.codes) == set(codes), ended.out + ended.err
    return ended


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    return load_file(path / MODEL_SAFETENSORS) | load_file(path / OPTIMIZER)


def distance(one: Path, other: Path, step: int = 4) -> float:
    """The largest difference of weights, and of the optimizer's tensors, after a step."""
    a, b = tensors(one, step), tensors(other, step)
    assert a.keys() == b.keys() and len(a) >= 20
    assert all(a[name].shape == b[name].shape and a[name].dtype == b[name].dtype for name in a)
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.campaign("ddp, fsdp and one process go on with each other's checkpoints")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checkpoints_go_from_any_kind_of_run_to_any_other_bit_for_bit(project, optimizer, record_property):
    """Without clipping, all arithmetic is the same; the norm of shares is summed in another order."""
    kinds = {"one": (1, "--parallel=ddp"), "ddp": (2, "--parallel=ddp"), "fsdp": (2, FSDP)}
    options = [f"--optimizer={optimizer}", "--grad_clip=0", "--spike_factor=0"]
    options += ["--dtype=bfloat16"] if optimizer == "muon" else []  # the clipping below has float32
    for name, (processes, parallel) in kinds.items():
        train(project, *options, parallel, f"--out_dir={optimizer}-{name}", processes=processes)
    for name in ("ddp", "fsdp"):
        for step in (0, 2, 4):
            assert distance(project / f"{optimizer}-one", project / f"{optimizer}-{name}", step) == 0.0
    sample = [("one", "fsdp"), ("fsdp", "ddp"), ("fsdp", "one")]
    assert not [name for name in tensors(project / f"{optimizer}-one", 0) if ":" in name]  # saving makes no moments
    pairs = cases(sample, list(itertools.product(kinds, kinds)))
    for start, then in pairs:
        out, (processes, parallel) = f"{optimizer}-{start}-{then}", kinds[then]
        at = f"--resume={optimizer}-{start}/checkpoints/step-00000002"
        train(project, *options, parallel, f"--out_dir={out}", at, processes=processes)
        assert distance(project / f"{optimizer}-one", project / out) == 0.0, (start, then)
    record_property("cases", len(pairs))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_clipping_by_the_norm_of_shares_differs_in_the_last_bits_only(project, optimizer):
    options = [f"--optimizer={optimizer}", "--grad_clip=0.1", "--dtype=float32"]
    train(project, *options, f"--out_dir=clip-{optimizer}-one", processes=1)
    train(project, *options, FSDP, f"--out_dir=clip-{optimizer}-fsdp")
    assert distance(project / f"clip-{optimizer}-one", project / f"clip-{optimizer}-fsdp") <= 1e-6
    norms = [
        [row["gnorm"] for row in forked.rows(project / f"clip-{optimizer}-{kind}") if "gnorm" in row]
        for kind in ("one", "fsdp")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert min(norms[0]) > 0.2  # or nothing was clipped


def test_a_gradient_gone_bad_in_one_share_is_skipped_by_all(project):
    """The guard refuses the same step in all processes, and no weight or moment notices."""
    options = [*SMALL, "--grad_clip=0", "--no-tied", "--dropout=0.2", "--eval_interval=9", "--save_every=1"]
    fault = forked.Fault("gradient", step=1, rank=1)
    ended = forked.run(project, [*options, "--out_dir=bad", FSDP], processes=2, faults=[fault])
    assert ended.codes == [0, 0], ended.err
    assert [row["skipped"] for row in forked.rows(project / "bad") if "skipped" in row] == [0, 1, 1, 1]
    before, after = tensors(project / "bad", 1), tensors(project / "bad", 2)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.campaign("fsdp compiled and not")
@pytest.mark.skipif(not cases([], [1]), reason="the compiler takes a minute; with --torture")
def test_fsdp_compiled_is_fsdp_but_for_rounding(project):
    """What the compiler fuses is rounded less often."""
    for compiled in (False, True):
        train(project, f"--compile={compiled}", "--dtype=float32", FSDP, f"--out_dir=compiled-{compiled}")
    assert distance(project / "compiled-False", project / "compiled-True") < 1e-4


def test_each_process_holds_its_share(project):
    ended = forked.run(
        project, [*SMALL, FSDP, "--out_dir=share"], processes=2,
        patches={"training.step_torch.gather_weights": count_and_gather},
    )  # fmt: skip
    assert ended.codes == [0, 0], ended.err
    held = [int(line.split()[1]) for line in ended.out.splitlines() if line.startswith("holds")]
    whole = sum(tensor.numel() for name, tensor in tensors(project / "share", 4).items() if ":" not in name)
    assert held and max(held) < 0.52 * whole


def test_one_process_of_torchrun_can_be_sharded_too(project):
    """So that FSDP2 can be tried where there is one GPU; torchrun's variables are set without torchrun, for speed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    alone = address | {"TORCHELASTIC_RUN_ID": "one", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, variables in (("one-plain", {}), ("one-sharded", alone)):
        options = [*SMALL, FSDP, "--optimizer=muon", "--grad_clip=0", "--spike_factor=0", f"--out_dir={name}"]
        ended = forked.run(project, options, environment=variables)
        assert ended.codes == [0], ended.err
        assert ("FSDP2" in ended.out) == bool(variables)
    for step in (0, 2, 4):
        assert distance(project / "one-plain", project / "one-sharded", step) == 0.0


def count_and_gather(model):
    from training.machine import distributed

    model.reshard()
    print("holds", sum(p.to_local().numel() for p in model.parameters()), flush=True)
    return distributed.gather_weights(model)


def test_processes_that_find_different_checkpoints_are_refused(project):
    """As where each machine has a disk of its own."""
    train(project, "--out_dir=shared", "--max_iters=2", processes=1)
    ended = forked.run(
        project, [*SMALL, "--out_dir=shared", "--resume"], processes=2,
        patches={"training.run.run_folder.find_latest": own_newest},
    )  # fmt: skip
    assert ended.codes == [CheckpointError.exit_code] * 2
    assert len(ended.err.splitlines()) == 2
    for line in ended.err.splitlines():
        assert "process 0 step-00000002" in line and "process 1 step-00000000" in line


def own_newest(run_dir):
    return list_steps(run_dir)[-1 if os.environ["RANK"] == "0" else 0]


def test_a_process_that_cannot_start_does_not_leave_the_others_waiting(project):
    begin = time.monotonic()
    ended = forked.run(
        project, [*SMALL, "--out_dir=nodata"], processes=2, patches={"training.data.find_newest": own_data}
    )
    assert ended.codes == [1, 3] and time.monotonic() - begin < 60
    assert "process 0 of 2 has lost another one" in ended.err and "nowhere: no prepared data" not in ended.out
    assert len(ended.err.splitlines()) == 2 and "Traceback" not in ended.err


def own_data(root):
    return Path(root) / "toy" if os.environ["RANK"] == "0" else None


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_full_disk_of_the_main_process_ends_both(project, parallel):
    ended = forked.run(
        project, [*SMALL, f"--parallel={parallel}", f"--out_dir=full-{parallel}"], processes=2,
        patches={"training.run.checkpoint.save": save_until_the_disk_is_full},
    )  # fmt: skip
    assert ended.codes == [DiskError.exit_code, 1], ended.err
    first, second = ended.err.splitlines()
    assert first == "error: step-00000002: cannot be saved" and "process 1 of 2 has lost another one" in second
    assert step_of(find_latest(project / f"full-{parallel}")) == 0


def save_until_the_disk_is_full(run_dir, state, **kwargs):
    if state.step:
        raise DiskError(f"step-{state.step:08d}: cannot be saved")
    return save(run_dir, state, **kwargs)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_when_a_process_dies_the_others_say_so_in_one_line(project, parallel):
    stop = forked.Stop("micro", step=2, part=0, how="SIGKILL", ranks=(1,))
    group = forked.start(
        project, [*SMALL, f"--parallel={parallel}", f"--out_dir=dies-{parallel}"], processes=2, stop=stop
    )
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [1, -signal.SIGKILL]
    err = (project / "err-0.txt").read_text()
    assert err.startswith("error: process 0 of 2 has lost another one") and err.count("\n") == 1
    assert find_latest(project / f"dies-{parallel}") is not None


KILLED_ONCE = """
import os, pathlib, signal, sys
import train, training.trainer
step = training.trainer.Trainer.optimizer_step
def killed(trainer):
    if trainer.step == 3 and trainer.group.rank == 1 and not pathlib.Path("killed").exists():
        pathlib.Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer)
training.trainer.Trainer.optimizer_step = killed
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_nodes_one_of_which_loses_its_process_are_one_process_with_twice_the_accumulation(project):
    """They meet through torchrun, which starts both again: each counts its own restarts, and keeps its old store."""
    (project / "killed_once.py").write_text(KILLED_ONCE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=two", "--max-restarts=2",
        "--monitor-interval=0.1", str(project / "killed_once.py"), *SMALL, "--out_dir=nodes", "--save_every=1",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    nodes = [
        subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    said = [node.communicate(timeout=200)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert (project / "killed").exists() and "resume   after step 3 of 4" in "".join(said)
    train(project, "--out_dir=alone", processes=1)
    assert distance(project / "alone", project / "nodes") == 0.0
    state = json.loads((project / "nodes" / "checkpoints" / "step-00000004" / STATE).read_text())
    assert state["machine"]["processes"] == 2
