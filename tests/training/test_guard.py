"""Steps that must not be taken are not: the same in all processes, with nothing changed, and not for ever."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import BACKENDS, Fault, run, small_shards
from safetensors import numpy as safetensors
from torture import cases

from llamalet.errors import NonFiniteError
from training.device_guard import DeviceGuard
from training.guard import WINDOW, Guard
from training.optimizer import Optimizer

OPTIONS = [
    "--dim=32", "--n_layers=1", "--n_heads=2", "--max_seq_len=32", "--batch_size=2", "--total_batch_tokens=256",
    "--max_iters=4", "--warmup_iters=1", "--eval_interval=9", "--eval_iters=4", "--save_every=1", "--keep=9",
    "--log_interval=1", "--compile=False", "--threads=1", "--min_lr=1e-4", "--no-sample", "--max_skipped=2",
]  # fmt: skip
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def folder(tmp_path):
    small_shards(tmp_path / "data" / "toy", 300)
    return tmp_path


def tensors(folder: Path, step: int) -> list[bytes]:
    """The bytes of all tensors of a checkpoint: weights, moments, AdamW's steps."""
    path = folder / "out" / "checkpoints" / f"step-{step:08d}"
    return [(path / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def skipped(folder: Path) -> list[int]:
    """How many steps were skipped up to each."""
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [row["skipped"] for row in map(json.loads, lines) if "skipped" in row]


FAULTS = {
    "the loss is NaN": (1, Fault("loss", 2)),
    "a gradient is infinite": (1, Fault("gradient", 2, 1, value=-INF)),
    "a gradient is NaN in one micro-step": (1, Fault("gradient", 2, 3)),
    "the loss is infinite in one process and micro-step": (2, Fault("loss", 2, 1, rank=1, value=INF)),
    "a gradient is NaN in one process": (2, Fault("gradient", 2, 0, rank=1)),
}
both_backends = pytest.mark.parametrize(("processes", "backend"), [(1, "torch"), (2, "torch"), (1, "numba")])


@pytest.mark.trains
@pytest.mark.campaign("guard: steps skipped")
@pytest.mark.parametrize("optimizer", cases(["muon"], ["adamw", "muon"]))
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for backend in BACKENDS for name in FAULTS if backend == "torch" or FAULTS[name][0] == 1],
)
def test_a_step_that_is_not_finite_changes_nothing_in_any_process(name, backend, optimizer, folder):
    processes, fault = FAULTS[name]
    argv = [*OPTIONS, f"--optimizer={optimizer}", *BACKENDS[backend]]
    ended = run(folder, argv, processes=processes, faults=[fault])
    assert ended.codes == [0] * processes, ended.err
    assert ended.state["step"] == 4  # and the same weights in all processes
    assert skipped(folder) == [0, 0, 1, 1]
    before, after, later = (tensors(folder, step) for step in (2, 3, 4))
    assert before == after
    assert all(a != b for a, b in zip(after, later, strict=True))
    assert "1 skipped" in ended.out


@pytest.mark.trains
@pytest.mark.campaign("guard: too many in a row")
@both_backends
def test_too_many_in_a_row_end_the_run_and_nothing_that_is_not_finite_is_saved(processes, backend, folder):
    faults = [Fault("loss" if step == 2 else "gradient", step, 0, rank=processes - 1) for step in (1, 2, 3)]
    ended = run(folder, [*OPTIONS, *BACKENDS[backend]], processes=processes, faults=faults)
    assert ended.codes == [NonFiniteError.exit_code] * processes
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == processes and "3 steps in a row" in errors[0] and "--resume" in errors[0]
    assert_finite(folder)
    again = run(folder, [*OPTIONS, *BACKENDS[backend], "--resume"], processes=processes)  # without the fault
    assert again.codes == [0] * processes, again.err
    assert again.state["step"] == 4


@pytest.mark.trains
def test_as_many_as_are_allowed_do_not(folder):
    ended = run(folder, OPTIONS, faults=[Fault("loss", 1), Fault("gradient", 2, 2, value=INF)])
    assert ended.codes == [0], ended.err
    assert skipped(folder) == [0, 1, 2, 2]


def assert_finite(folder: Path) -> None:
    checkpoints = list((folder / "out" / "checkpoints").glob("step-*"))
    assert checkpoints
    for path in checkpoints:
        for name in ("model", "optimizer"):
            for tensor in safetensors.load_file(path / f"{name}.safetensors").values():
                assert torch.from_numpy(tensor).isfinite().all()


@pytest.mark.trains
@both_backends
def test_a_state_whose_validation_loss_is_not_finite_is_not_saved(processes, backend, folder):
    fault = Fault("evaluation", 3, rank=processes - 1)
    ended = run(folder, [*OPTIONS, *BACKENDS[backend], "--eval_interval=3"], processes=processes, faults=[fault])
    assert ended.codes == [NonFiniteError.exit_code] * processes
    assert not (folder / "out" / "checkpoints" / "step-00000003").exists()
    assert_finite(folder)


def norms(guard: Guard | DeviceGuard, values: list[float], loss: float = 1.0) -> list[bool]:
    if isinstance(guard, Guard):
        return [guard.refuses(loss, value) for value in values]
    return [bool(guard.refuses(torch.tensor(loss), torch.tensor(value))) for value in values]


def device_guard(**options: float) -> DeviceGuard:
    return DeviceGuard(torch.device("cpu"), **{"spike_factor": 10.0, "max_skipped": 2, **options})


def host_guard(**options: float) -> Guard:
    return Guard(**{"spike_factor": 10.0, "max_skipped": 2, **options})


both_guards = pytest.mark.parametrize("guard", [device_guard, host_guard])


@both_guards
def test_a_spike_is_skipped_once_and_not_remembered(guard):
    ours = guard()
    assert not any(norms(ours, [1.0, 1e9, *[1.0] * (WINDOW - 2)]))  # too early to know what is a spike
    ours = guard()
    assert not any(norms(ours, [1.0] * WINDOW))
    before = ours.state()
    assert norms(ours, [10.0 + 1e-3, 9.9, 1.0, 50.0, 1.0]) == [True, False, False, True, False]
    assert before[0] == 1.0 and ours.state()[0] < 1.1 and ours.check() == 2


@both_guards
def test_no_spike_where_none_is_wanted(guard):
    assert not any(norms(guard(spike_factor=0.0), [1.0] * WINDOW + [1e9]))


@both_guards
def test_the_mean_survives_what_is_not_finite(guard):
    ours = guard()
    assert norms(ours, [NAN, 2.0, INF, 2.0]) == [True, False, True, False]
    assert norms(ours, [2.0], loss=NAN) == [True]
    assert ours.state() == [2.0, 2.0, 1.0, 3.0]


@both_guards
def test_the_state_goes_on_exactly(guard):
    first, whole = guard(), guard()
    values = [0.1 * (k % 7 + 1) for k in range(WINDOW + 20)]
    norms(first, values[:60])
    second = guard()
    second.load_state(json.loads(json.dumps(first.state())))
    norms(second, values[60:])
    norms(whole, values)
    assert second.state() == whole.state()


def test_both_guards_skip_alike():
    rng = np.random.default_rng(0)
    values = (rng.lognormal(0, 1, 400) * np.where(rng.random(400) < 0.05, 40, 1)).tolist()
    values[10] = values[300] = NAN
    device, host = device_guard(), host_guard()
    assert norms(device, values) == norms(host, values)
    assert device.state() == host.state()
    assert 5 < host.check() < 40


@pytest.mark.parametrize("skip", [False, True])
def test_the_fused_kernel_leaves_everything_as_it_was_where_it_is_told(skip):
    """The way that a GPU takes, which must not wait for the answer: torch's `found_inf`, here on the CPU's kernel."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = Optimizer(model, kind="adamw", rate=0.1, betas=(0.9, 0.95), weight_decay=0.1, dtype=torch.float32)
    for skipping in (False, skip):
        before = [tensor.clone() for tensor in (*model.state_dict().values(), *optimizer.state_dict().values())]
        model(torch.ones(2, 3)).sum().backward()
        if skipping:
            model.weight.grad.fill_(NAN)
        part = optimizer._parts[0]
        part.found_inf = torch.tensor(float(skipping))
        part.step()
        after = [*model.state_dict().values(), *optimizer.state_dict().values()]
    assert len(before) == len(after) == 8
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [skip] * 8
