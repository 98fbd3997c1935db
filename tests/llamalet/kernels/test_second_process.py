"""The process that compiles a part of the kernels: it helps, and where it cannot, nothing is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from llamalet.kernels import second_process
from llamalet.kernels.second_process import SecondProcess

DEMO = Path(second_process.__file__).parents[1] / "assets" / "demo.bin"
REQUEST = ("llamalet.kernels.threads", "block_of_job", ())


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(second_process, "physical_cores", lambda: 2)


@pytest.mark.parametrize("boot", ["raise SystemExit", "import time; time.sleep(0.1); 1 / 0"])
def test_a_process_that_fails_is_not_waited_for(monkeypatch, two_cores, boot):
    monkeypatch.setattr(second_process, "BOOT", boot)
    process = SecondProcess()
    with process.while_compiling():
        process.ask(REQUEST)
        process.wait_for(REQUEST)
        process.ask(REQUEST)  # it would fail again
        assert process._process is None
    process.wait_for(REQUEST)


def test_a_process_that_does_not_answer_is_ended(monkeypatch, two_cores):
    monkeypatch.setattr(second_process, "BOOT", "import time; time.sleep(600)")
    monkeypatch.setattr(second_process, "LIMIT_S", 0.2)
    process = SecondProcess()
    with process.while_compiling():
        process.ask(REQUEST)
        process.wait_for(REQUEST)
        assert process._process is None


def test_it_belongs_to_one_thread(monkeypatch, two_cores):
    monkeypatch.setattr(second_process, "BOOT", "import time; time.sleep(600)")
    process = SecondProcess()

    def other():
        with process.while_compiling():
            process.wait_for(REQUEST)  # which would take minutes
            process.ask((*REQUEST[:2], (1,)))

    with process.while_compiling():
        process.ask(REQUEST)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert process._process.poll() is None and process._asked == [REQUEST]


@pytest.mark.parametrize("why", ["frozen", "no folder", "is the second one"])
def test_some_programs_have_none(monkeypatch, two_cores, why):
    if why == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    elif why == "is the second one":
        monkeypatch.setenv(second_process.MARK, "1")
    process = SecondProcess()
    with process.while_compiling(can_share=why != "no folder"):
        process.ask(REQUEST)
        assert process._process is None


def test_it_answers_in_order_and_ends_with_the_block(monkeypatch, two_cores):
    answers = "import pickle, sys\nwhile True: pickle.load(sys.stdin.buffer); print(end='.', flush=True)"
    monkeypatch.setattr(second_process, "BOOT", answers)
    process = SecondProcess()
    with process.while_compiling():
        for number in range(3):
            process.ask((*REQUEST[:2], (number,)))
        child = process._process
        process.wait_for((*REQUEST[:2], (1,)))
        assert process._asked == [(*REQUEST[:2], (2,))]
        process.wait_for((*REQUEST[:2], (0,)))  # has been answered
    assert child.returncode is not None and process._process is None
    process.ask(REQUEST)  # outside of the block
    assert process._process is None


def test_what_is_to_be_done_meanwhile_is_done_once_at_the_first_wait(monkeypatch, two_cores):
    answers = "import pickle, sys\nwhile True: pickle.load(sys.stdin.buffer); print(end='.', flush=True)"
    monkeypatch.setattr(second_process, "BOOT", answers)
    process, done = SecondProcess(), []
    with process.while_compiling(meanwhile=lambda: done.append(process._process)):
        process.wait_for(REQUEST)  # nobody asked for it
        assert not done
        for number in range(2):
            process.ask((*REQUEST[:2], (number,)))
            process.wait_for((*REQUEST[:2], (number,)))
    assert len(done) == 1 and done[0] is not None


def test_it_can_start_before_it_is_asked(monkeypatch, two_cores):
    monkeypatch.setattr(second_process, "BOOT", "import time; time.sleep(600)")
    process = SecondProcess()
    with process.while_compiling(at_once=True):
        child = process._process
        process.ask(REQUEST)
        assert child is not None and process._process is child


def test_one_core_has_none(monkeypatch):
    monkeypatch.setattr(second_process, "physical_cores", lambda: 1)
    process = SecondProcess()
    with process.while_compiling(at_once=True):
        process.ask(REQUEST)
        assert process._process is None


LOGITS = """
import sys
from pathlib import Path
from llamalet import model_file
from llamalet.kernels import second_process, stages
from llamalet.kernels.attention import attend
from llamalet.kernels.transformer import Transformer
second_process.physical_cores = lambda: int(sys.argv[2])
model = Transformer(model_file.read(Path(sys.argv[1])), threads=1)
sys.stdout.buffer.write(model.decode(model.new_cache(), 1).tobytes())
print(*(sum(kernel.stats.cache_hits.values()) for kernel in (stages.work, attend.compiled)), file=sys.stderr)
"""


@pytest.mark.compiles
@pytest.mark.slow
def test_the_kernels_are_the_same_and_come_from_the_cache(tmp_path):
    logits = []
    for cores, hits in (("2", "0 1"), ("2", "1 1"), ("1", "0 0")):
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / cores)}
        done = subprocess.run([sys.executable, "-c", LOGITS, DEMO, cores], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.decode().splitlines()[-1] == hits
        logits.append(np.frombuffer(done.stdout, np.float32))
    assert len(logits[0]) and all(np.array_equal(each, logits[0]) for each in logits)


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_while_compiling_is_one_line_and_the_next_start_works(tmp_path):
    words = [sys.executable, "-m", "llamalet", "generate", DEMO, "-n", "5", "-s", "7"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        assert "compiling the kernels" in program.stderr.readline()
        time.sleep(1)
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to both processes
        out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (130, "", "error: stopped by Ctrl-C\n")
    again = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout, again.stderr
    assert "damaged" not in again.stderr
