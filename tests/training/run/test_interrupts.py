"""SIGTERM and Ctrl-C at any time: a state that can be gone on from, exit code 75, within seconds."""

import functools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from forked import BACKENDS, ROOT, Ended, Stop, rows, run, small_shards
from torture import cases

from training.run import interrupts
from training.run.interrupts import Interrupted, Interrupts

WITHIN_S = 20.0
OPTIONS = [
    "--dim=32", "--n_layers=2", "--n_heads=2", "--max_seq_len=32", "--batch_size=2", "--total_batch_tokens=256",
    "--max_iters=8", "--warmup_iters=2", "--eval_interval=3", "--eval_iters=3", "--save_every=2", "--keep=9",
    "--log_interval=1", "--learning_rate=1e-2", "--threads=1", "--dropout=0.1",
]  # fmt: skip
EAGER, COMPILED, NUMBA = ("--compile=False",), ("--compile=True",), tuple(BACKENDS["numba"])


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """Give the run that was never stopped, in each setting; run once."""

    @functools.cache
    def reference(processes: int, *setting: str) -> Ended:
        folder = tmp_path_factory.mktemp("whole")
        small_shards(folder / "data" / "toy", 300)
        for _ in range(2):  # the second takes as long as those to come: what all of them need has been started
            begin = time.time()
            whole = run(folder, [*OPTIONS, *setting, "--overwrite"], processes=processes)
        assert whole.codes == [0] * processes, whole.err
        return Ended(whole.codes, whole.out, whole.err, whole.states, time.time() - begin, folder)

    return reference


def check(folder: Path, whole: Ended, stop: Stop, processes: int, setting: tuple[str, ...]) -> float:
    """Stop a run, look at how it ends, let it go on and compare; return the seconds that it took to end.

    They are 0 where the signal would have come after the end.
    """
    shutil.copytree(whole.folder / "data", folder / "data")
    argv = [*OPTIONS, *setting]
    ended = run(folder, argv, processes=processes, stop=stop)
    took_s = 0.0 if math.isnan(ended.took_s) else ended.took_s
    assert took_s < WITHIN_S, ended
    if ended.codes != [0] * processes:  # the signal came before all was done
        assert_interrupted(ended, folder)
        assert ended.err.count("a second signal stops at once") == (stop.ranks != (1,)), ended.err
        assert ended.codes[0] == 75
        if ended.states[0]["step"] < 8:  # the others have nothing to do with the export
            assert ended.codes == [75] * processes, ended
        ended = run(folder, [*argv, "--resume"], processes=processes)
        assert ended.codes == [0] * processes, ended.err
    else:
        assert stop.after_s or stop.ranks == (1,), ended
    assert ended.state["weights"] == whole.state["weights"]
    assert ended.state["optimizer"] == whole.state["optimizer"]
    assert rows(folder / "out") == rows(whole.folder / "out")
    assert (folder / "out" / "model.bin").read_bytes() == (whole.folder / "out" / "model.bin").read_bytes()
    return took_s


def assert_interrupted(ended: Ended, folder: Path) -> None:
    found = re.fullmatch(
        r"interrupted at step (\d+) of 8, resume with: (?:python|torchrun .*) train\.py --resume --out_dir=out",
        ended.last_line,
    )
    assert found, ended.out + ended.err
    assert (folder / "out" / "checkpoints" / f"step-{int(found[1]):08d}").is_dir()


# What a run does when the signal comes, and to whom; processes and how they compute.
PLACES: dict[str, tuple[Stop, int, tuple[str, ...]]] = {
    "in set-up": (Stop("set-up"), 1, EAGER),
    "in set-up of one of two": (Stop("set-up", ranks=(1,)), 2, EAGER),
    "trying the compiler": (Stop("compiler"), 1, COMPILED),
    "trying the compiler in one of two": (Stop("compiler", ranks=(1,)), 2, COMPILED),
    "compiling": (Stop("compile", after_s=0.4, how="SIGINT"), 1, COMPILED),
    "compiling in one of two": (Stop("compile", after_s=0.2, ranks=(1,)), 2, COMPILED),
    "training": (Stop("micro", 4, "mid", "SIGINT"), 1, EAGER),
    "training in both": (Stop("micro", 4, "mid"), 2, EAGER),
    "training in the second of two": (Stop("micro", 4, 0, ranks=(1,)), 2, EAGER),
    "reading data": (Stop("across shards", 3), 1, EAGER),
    "evaluating in the first of two": (Stop("evaluating", 3, 0, ranks=(0,)), 2, EAGER),
    "saving": (Stop("saving", 2, 2), 1, EAGER),
    "saving in the end": (Stop("saving", 8, 3, "SIGINT"), 1, EAGER),
    "exporting": (Stop("finish"), 1, EAGER),
    "exporting, one of two": (Stop("finish", ranks=(0,)), 2, EAGER),
}
FEW = [
    "in set-up",
    "training in the second of two",
    "evaluating in the first of two",
    "saving",
    "exporting",
]
OF_NUMBA = [name for name, (_, processes, _) in PLACES.items() if processes == 1 and name != "trying the compiler"]


@pytest.mark.trains
@pytest.mark.campaign("signals: what a run may be doing")
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "torch") for name in cases(FEW, list(PLACES))] + [(name, "numba") for name in cases(["saving"], OF_NUMBA)],
)
def test_a_signal_at_a_place(name, backend, never_stopped, tmp_path, record_property):
    stop, processes, setting = PLACES[name]
    setting = NUMBA if backend == "numba" else setting
    took_s = check(tmp_path, never_stopped(processes, *setting), stop, processes, setting)
    record_property("seconds_to_end", took_s)


@pytest.mark.trains
@pytest.mark.campaign("signals: random moments")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(cases(2, 50)))
def test_a_signal_at_a_random_moment(seed, backend, never_stopped, tmp_path, record_property):
    draw = random.Random(seed)
    if backend == "numba":
        processes, setting = 1, NUMBA
    elif seed == 1:
        processes, setting = 2, EAGER
    else:
        processes, setting = draw.choice([1, 2]), COMPILED if cases(0, 1) and draw.random() < 0.2 else EAGER
    whole = never_stopped(processes, *setting)
    ranks = draw.choice([None, (0,), (1,)]) if processes == 2 else None
    how = draw.choice(["SIGTERM", "SIGINT"])
    stop = Stop("start", how=how, ranks=ranks, after_s=draw.uniform(0, whole.took_s))
    record_property("seconds_to_end", check(tmp_path, whole, stop, processes, setting))


def start(folder: Path, *argv: str, torchrun: bool = False) -> subprocess.Popen[str]:
    """Start train.py as people do."""
    small_shards(folder / "data" / "toy", 300)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if torchrun else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train.py"), *argv], cwd=folder, text=True, bufsize=1,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], word: str) -> str:
    """Read what a process prints up to the line that begins with what `word` matches."""
    assert process.stdout
    lines = ""
    for line in process.stdout:
        lines += line
        if re.match(word, line):
            return lines
    raise AssertionError(lines + process.stderr.read())


@pytest.mark.trains
def test_a_signal_after_the_first_line_while_torch_is_imported(tmp_path):
    process = start(tmp_path, *OPTIONS, "--compile=False")
    wait_for(process, "run")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert out.splitlines()[-1].startswith("interrupted at step 0 of 8, resume with: ")
    assert (tmp_path / "out" / "checkpoints" / "step-00000000").is_dir()


@pytest.mark.trains
def test_torchrun_passes_a_signal_on_and_both_processes_end_in_order(tmp_path):
    process = start(tmp_path, *OPTIONS, "--compile=False", "--max_iters=100000", torchrun=True)
    wait_for(process, r"step +5/")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert re.fullmatch(r"interrupted at step \d+ of 100000, resume with: .*", out.splitlines()[-1]), out + err
    assert err.count("a second signal stops at once") == 1
    assert "exitcode  : 75" in err or "SignalException" in err  # torchrun's own code says nothing of it
    step = int(re.findall(r"interrupted at step (\d+)", out)[0])
    assert (tmp_path / "out" / "checkpoints" / f"step-{step:08d}").is_dir()
    done = run(tmp_path, [*OPTIONS, "--compile=False", "--resume", f"--max_iters={step + 1}"], processes=2)
    assert done.codes == [0, 0] and done.state["step"] == step + 1


@pytest.mark.trains
@pytest.mark.parametrize("setting", [EAGER, NUMBA], ids=str)
def test_the_second_signal_ends_a_run_at_once_and_nothing_is_lost(setting, never_stopped, tmp_path):
    """The first one comes in a step that never ends."""
    whole = never_stopped(1, *setting)
    shutil.copytree(whole.folder / "data", tmp_path / "data")
    argv = [*OPTIONS, *setting]
    stopped = run(tmp_path, argv, stop=Stop("micro", 4, 1, "SIGINT", again_s=0.5))
    assert stopped.codes == [130], stopped
    assert "interrupted" not in stopped.out
    ended = run(tmp_path, [*argv, "--resume"])
    assert ended.codes == [0] and ended.state == whole.state


@pytest.mark.trains
def test_the_second_signal_ends_a_process_that_waits_for_another_one(never_stopped, tmp_path):
    shutil.copytree(never_stopped(2, *EAGER).folder / "data", tmp_path / "data")
    stop = Stop("micro", 4, 0, "SIGSTOP", ranks=(1,))
    first, second = forked.start(tmp_path, [*OPTIONS, "--compile=False"], processes=2, stop=stop)
    try:
        while not (tmp_path / "signal-1").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        first.terminate()
        first.join(1)
        assert first.exitcode is None
        first.terminate()
        first.join(20)
        assert first.exitcode == 143
    finally:
        first.kill(), second.kill()


@pytest.mark.trains
def test_a_closed_stderr_does_not_matter(never_stopped, tmp_path):
    whole = never_stopped(1, *EAGER)
    shutil.copytree(whole.folder / "data", tmp_path / "data")
    stop = Stop("micro", 4, 1, closes=2)
    ended = run(tmp_path, [*OPTIONS, "--compile=False"], stop=stop)
    assert ended.codes == [75] and ended.last_line.startswith("interrupted at step 4 of 8")


@pytest.mark.trains
def test_a_run_whose_stdout_has_gone_goes_on_and_says_so_once(never_stopped, tmp_path):
    whole = never_stopped(1, *EAGER)
    shutil.copytree(whole.folder / "data", tmp_path / "data")
    nobody_reads = Stop("stepped", 2, how="SIGCONT", closes=1)
    ended = run(tmp_path, [*OPTIONS, "--compile=False"], stop=nobody_reads)
    assert ended.codes == [0] and ended.state == whole.state
    assert "step 1/8" in ended.out and "step 2/8" not in ended.out
    assert ended.err == "warning: stdout: Broken pipe; training continues without it\n"
    assert rows(tmp_path / "out") == rows(whole.folder / "out")
    assert (tmp_path / "out" / "model.bin").read_bytes() == (whole.folder / "out" / "model.bin").read_bytes()


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    hook = sys.unraisablehook
    yield
    assert before == {number: signal.getsignal(number) for number in before}
    assert sys.unraisablehook == hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_raised_where_it_may_be(number, handlers, capfd):
    with Interrupts() as signals:
        with signals.at_once():
            pass
        signal.raise_signal(number)
        assert signals.requested
        signal.raise_signal(number)  # so soon after, as timeout(1) sends it: the same one
        with pytest.raises(Interrupted), signals.at_once():
            raise AssertionError("the block is not entered")
    assert capfd.readouterr().err.count("a second signal") == 1


class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_a_destructor_swallows_is_raised_all_the_same(monkeypatch, handlers):
    with Interrupts() as signals, pytest.raises(Interrupted), signals.at_once():
        monkeypatch.setattr(sys, "unraisablehook", lambda what: None)
        Late()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer")
def test_it_is_raised_soon_and_without_a_word(handlers, capfd):
    start = time.monotonic()
    with Interrupts() as signals, pytest.raises(Interrupted), signals.at_once():
        Late()
        time.sleep(30)
    assert time.monotonic() - start < 15
    assert len(capfd.readouterr().err.strip().splitlines()) == 1  # that it stops


def test_what_fails_because_a_signal_came_is_an_interruption(handlers):
    with Interrupts() as signals:
        with pytest.raises(Interrupted), signals.at_once():
            try:
                signal.raise_signal(signal.SIGTERM)
            except Interrupted:
                raise RuntimeError("the compiler has died of the same signal") from None
    with Interrupts() as signals, pytest.raises(RuntimeError), signals.at_once():
        raise RuntimeError("of itself")


@pytest.mark.parametrize(
    ("torchrun", "seconds", "codes"), [(False, 0.05, []), (False, 1.0, [143]), (True, 1.0, []), (True, 3.0, [143])]
)
def test_an_echo_is_longer_under_torchrun(torchrun, seconds, codes, monkeypatch):
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(interrupts.time, "monotonic", iter([100.0, 100.0 + seconds]).__next__)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "id") if torchrun else monkeypatch.delenv("TORCHELASTIC_RUN_ID", False)
    hears, told = os.pipe()
    os.write(told, bytes([signal.SIGTERM, signal.SIGCHLD, signal.SIGTERM, 0]))
    os.close(told)
    interrupts._end_at_second(hears)
    assert ends == codes
