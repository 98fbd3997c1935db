"""benchmarks/gpu.py as far as it goes without a GPU: the whole dry run, and what becomes of parts that fail."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import forked
import pytest
import torch

from benchmarks import gpu
from benchmarks import training as speed
from benchmarks.report import Key
from llamalet.errors import ConfigError, UsageError

PEER_TRAIN = """
import time
for number in range(10**6):
    print(f"{number} | loss 10.4 | lr 1e-4 | 2.50ms | mfu 1.00%")
    time.sleep(0.001)
"""


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts in forks of a process that has imported torch, instead of new processes."""
    server = forked.server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)


@pytest.mark.trains
@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_dry_run_goes_through_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for limit in ("RUN_LIMIT_S", "CPU_RUN_LIMIT_S", "RESUME_LIMIT_S"):
        monkeypatch.setattr(gpu, limit, 900.0)  # other programs may use the processors
    monkeypatch.setattr(gpu, "SHAPE_LIMITS_S", dict.fromkeys(speed.SHAPES, 900.0))
    (tmp_path / "llama2.c").mkdir()
    (tmp_path / "llama2.c" / "train.py").write_text(PEER_TRAIN)
    out = tmp_path / "out"
    argv = ["--dry-run", f"--out={out}", f"--peer-train={tmp_path / 'llama2.c'}", "--minutes=60"]
    code = gpu.main(argv)
    found, printed = json.loads((out / "gpu.json").read_bytes()), capsys.readouterr().out
    assert code == 0, printed
    parts = every_part(tmp_path / "llama2.c")
    names = [part.name for part in parts]
    assert list(found["parts"]) == names and len(names) == len(set(names)) >= 17  # 18 where bfloat16 is native
    assert not found["missing"] and not any("reason" in part for part in found["parts"].values())

    rows = {(row["shape"], row["contender"], row["figure"]): row["turns"] for row in found["figures"]}
    for part in parts:
        for figure in ("step", "memory") if part.key else ():
            assert min(rows[part.key.shape, part.key.contender, figure]) > 0
    losses = [found["parts"][f"demo {name}"]["val_loss"] for name in DEMOS]
    assert max(losses) - min(losses) < gpu.LOSS_BOUND
    resumed = found["parts"][gpu.RESUME]
    assert resumed["same"] and len(resumed["whole"]) == 2 and 5 <= resumed["stopped_at"] < 20

    assert (out / "gpu.txt").read_text() == printed and "dry run: tiny models" in printed
    for row in ("eager", gpu.ADAMW, gpu.MUON, speed.PEER, *DEMOS, gpu.RESUME):
        assert any(line.strip().startswith(row) for line in printed.splitlines()), row
    for name in speed.SHAPES:
        assert f"{name}: 1M parameters" in printed
    assert "FSDP2" in (out / "demo-FSDP2-one-process.log").read_text()
    assert found["date"] and "commit" in found["builds"] and "PyTorch" in found["builds"]["gpu"]


DEMOS = (gpu.ON_CPU, "bfloat16", "TF32", "FSDP2, one process")


def every_part(peer: Path | None = None) -> list[gpu.GpuPart]:
    config = gpu.GpuConfig(dry_run=True, peer_train=str(peer) if peer else None)
    return list(gpu.plan(config, torch.device("cpu"), dict.fromkeys(speed.SHAPES, gpu.TINY_SHAPE), Path("scratch")))


# -- parts that fail --------------------------------------------------------------------------------------------------


def hang(folder: Path) -> gpu.Figures:
    sleeper = subprocess.Popen(["sleep", "1000"], start_new_session=True)  # as torchrun starts its processes
    (folder.parent / "pid").write_text(str(sleeper.pid))
    print("half done", flush=True)
    time.sleep(1000)
    return {}


def fail(folder: Path) -> gpu.Figures:
    raise ValueError("no such kernel\nand more")


def die(folder: Path) -> gpu.Figures:
    print("about to die", flush=True)
    os._exit(3)


def part_of(work: gpu.Work | None, limit_s: float = 60.0) -> gpu.GpuPart:
    return gpu.GpuPart(name="a part, of some kind", work=work, limit_s=limit_s, key=Key("15M", "f32", "", "eager"))


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("work", "limit_s", "reason"),
    [
        (hang, 8.0, "ended after 8 s, its limit; its log ends with: half done"),
        (fail, 60.0, "ValueError: no such kernel"),
        (die, 60.0, "ended with exit code 3; its log ends with: about to die"),
    ],
)
def test_a_part_that_fails_says_why(tmp_path: Path, work: gpu.Work, limit_s: float, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        gpu.run_part(part_of(work, limit_s), tmp_path, tmp_path, 300)
    assert str(caught.value) == reason
    log = (tmp_path / "a-part-of-some-kind.log").read_text()
    assert work is not fail or "in fail\n" in log and log.endswith("and more\n")
    if work is hang:
        state = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"  # nobody has to wait for it


def test_a_part_without_time_or_program_is_not_started(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not run: the time for all parts was over"):
        gpu.run_part(part_of(hang), tmp_path, tmp_path, gpu.SHORTEST_S - 1)
    with pytest.raises(UsageError, match="not given: LLAMA2C=PATH names the folder of llama2.c"):
        gpu.run_part(part_of(None), tmp_path, tmp_path, 300)
    assert not list(tmp_path.iterdir())


def test_a_script_that_fails_says_so_with_its_error() -> None:
    with pytest.raises(UsageError, match="configurator.py ended with exit code 0, not 75: nothing"):
        gpu.run_script("configurator.py", [], stop_at=3)
    with pytest.raises(UsageError, match="sample.py ended with exit code 2: error: .*--no-such"):
        gpu.run_script("sample.py", ["--no-such"])


# -- what is reported -------------------------------------------------------------------------------------------------


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> gpu.GpuReport:
    """A report in which all is well."""
    made = gpu.new_report(gpu.GpuConfig(dry_run=True, peak_tflops=1e-3), torch.device("cpu"))
    for part in every_part():
        if part.work is None:
            made.leave_out(part, gpu.NO_PEER, 0.0)
        elif part.key:
            made.add(part, {"step": [1.0, 2.0, 2.0], "forward": [1.0], "memory": [5e6], "compile": [3.0]}, 1.0)
        else:
            digests = {"whole": {"model": "a", "optimizer": "b"}, "resumed": {"model": "a", "optimizer": "b"}}
            found = {"stopped_at": 7, "same": True, **digests} if part.name == gpu.RESUME else {}
            demo = {"val_loss": 1.5, "loss": 1.4, "tokens_per_s": 1000.0} if part.name.startswith("demo") else {}
            made.add(part, found | demo, 1.0)
    return made


def test_a_run_without_llama2c_is_good_and_says_what_is_missing(report: gpu.GpuReport) -> None:
    text = "\n".join(report.lines())
    assert report.is_good() and text.count(f"{speed.PEER}: {gpu.NO_PEER}") == 3
    flops = speed.training_flops(speed.TrainConfig(**gpu.TINY_SHAPE).model_config(speed.VOCABULARY))
    assert f"{flops * 16_000 / 1e9:.1%}" in text  # 32 tokens in 2 ms, of a peak of 1 GFLOP/s
    assert "stopped at step 7 and resumed, weights and moments are those of a run that never stopped" in text


def test_a_loss_too_far_from_the_cpus_is_marked(report: gpu.GpuReport) -> None:
    report.parts["demo TF32"]["val_loss"] = 1.5 - 2 * gpu.LOSS_BOUND
    assert not report.is_good()
    assert [line.split()[0] for line in report.lines() if "TOO FAR" in line] == ["TF32"]
    report.parts["demo TF32"]["val_loss"] = float("nan")
    assert not report.is_good()


def test_a_resumed_run_that_differs_is_marked(report: gpu.GpuReport) -> None:
    found = report.parts[gpu.RESUME]
    found["resumed"], found["same"] = {"model": "a", "optimizer": "c"}, False
    assert not report.is_good() and "resumed, optimizer DIFFER from a run" in "\n".join(report.lines())


def test_a_part_that_failed_is_in_the_table_with_its_reason(report: gpu.GpuReport) -> None:
    failed = {part.name: part for part in every_part()}
    for name in ("42M " + gpu.MUON, "demo bfloat16", gpu.RESUME, "corpus"):
        report.leave_out(failed[name], f"{name} is broken", 1.0)
    lines = list(report.lines())
    for name in ("42M " + gpu.MUON, "demo bfloat16", gpu.RESUME, "corpus"):
        assert sum(line.endswith(f": {name} is broken") for line in lines) == 1
    assert not report.is_good()


# -- the command ------------------------------------------------------------------------------------------------------


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no GPU: PyTorch .* finds none here; --dry-run tries every part on the CPU"):
        gpu.main([f"--out={tmp_path / 'out'}"])
    assert UsageError.exit_code == 2 and not list(tmp_path.iterdir())


def test_options_are_checked_together() -> None:
    with pytest.raises(ConfigError) as caught:
        gpu.GpuConfig(minutes=0, peak_tflops=-1, peer_train="/no/peer")
    assert all(part in str(caught.value) for part in ("minutes=0", "peak_tflops=-1", "peer_train=/no/peer"))


def test_the_script_calls_the_module_with_llama2c(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport os, sys\nprint(sys.argv[1:], os.environ['PYTHONPATH'])\n")
    python.chmod(0o755)
    script = str(forked.ROOT / "benchmarks" / "gpu.sh")
    call = partial(subprocess.run, [script, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=True)
    environment = os.environ | {"PYTHON": str(python), "LLAMA2C": "/a folder/llama2.c"}
    expected = ["-m", "benchmarks.gpu", "--peer-train=/a folder/llama2.c", "--dry-run"]
    assert call(env=environment).stdout == f"{expected} {forked.ROOT}\n"
    del environment["LLAMA2C"]
    assert call(env=environment).stdout == f"{['-m', 'benchmarks.gpu', '--dry-run']} {forked.ROOT}\n"
