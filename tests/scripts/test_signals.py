"""Ctrl-C and SIGTERM in the first second of every command: one line and an exit code, and never a traceback."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torture import cases
from toy import SMALL_MODELS, toy_data, toy_model

ROOT = Path(__file__).parents[2]
CONFIG = SMALL_MODELS["gqa-tied"]
LIMIT_S = 100

# Every process reports on a pipe when it has begun: when it imports llamalet.startup, in the first lines of a script.
# Before that, only Python itself has started.
SITE = """
import os, sys

def begun(event, arguments, pipe=[]):
    if event == "import" and arguments[0] == "llamalet.startup" and pipe:
        os.write(pipe[0], b"!")
        os.close(pipe.pop())

if "LLAMALET_BEGUN" in os.environ:
    begun.__defaults__[0].append(int(os.environ.pop("LLAMALET_BEGUN")))
    sys.addaudithook(begun)
"""

ENDLESS = ["-n", "0", "--overflow=roll", "--ignore-eos"]
TRAIN = ["--dim=32", "--n_layers=1", "--n_heads=2", "--max_iters=100000", "--compile=False", "--sample=False"]
# The commands, and whether they take longer than the signal, so that it must end them.
COMMANDS = {
    "sample": (["sample.py", "model.bin", *ENDLESS], True),
    "llamalet generate": (["-m", "llamalet", "generate", "model.bin", *ENDLESS], True),
    "llamalet evaluate": (["-m", "llamalet", "evaluate", "model.bin", "long.txt", "--backend=numpy"], True),
    "llamalet convert": (["-m", "llamalet", "convert", "model.bin", "new.bin", "--dtype=q8"], False),
    "train": (["train.py", "--out_dir=run", "--overwrite", *TRAIN], True),
    "train --backend=numba": (["train.py", "--backend=numba", "--out_dir=run", "--overwrite", *TRAIN], True),
    "train --eval_only": (["train.py", "--out_dir=none", "--eval_only"], False),
    "export": (["export.py", "other.bin", "--bin=model.bin"], False),
    "tinystories": (["tinystories.py", "synthesize", "--size=500MB", "--data-dir=made"], True),
    "benchmarks.runtime": (["-m", "benchmarks.runtime", "--out=bench"], True),
    "training.run.plot": (["-m", "training.run.plot", "out/demo"], False),
    "parity.demo": (["-m", "parity.demo", "out/demo"], False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    toy_model(folder, CONFIG)
    toy_data(folder / "data", CONFIG.vocab_size)
    (folder / "long.txt").write_text("a band and the band " * 20_000)
    (folder / "sitecustomize.py").write_text(SITE)
    return folder


def interrupt(folder: Path, words: list[str], number: int, delay_s: float) -> tuple[int, str]:
    """Start a command, send it a signal `delay_s` after it has begun; return its exit code and stderr."""
    reader, writer = os.pipe()
    script = [str(ROOT / words[0])] if words[0].endswith(".py") else words[:1]
    paths = os.pathsep.join([str(folder), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, *script, *words[1:]], cwd=folder, text=True, pass_fds=[writer], stdin=subprocess.DEVNULL,
        env=os.environ | {"LLAMALET_BEGUN": str(writer), "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writer)
    assert os.read(reader, 1) == b"!", process.communicate(timeout=LIMIT_S)
    os.close(reader)
    try:
        process.wait(delay_s)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    try:
        _, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    return process.returncode, err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.campaign("signals: the first second of every command")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_in_the_first_second(folder, command, record_property):
    (words, long), draw, count = COMMANDS[command], random.Random(command), cases(5, 200)
    for case in range(count):
        number = draw.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
        delay_s = draw.uniform(0, draw.choice([0.1, 1.0]))
        code, err = interrupt(folder, words, number, delay_s)
        about = f"case {case}: {number!r} after {delay_s:.3f} s: {code}\n{err}"
        assert "Traceback" not in err and "Exception ignored" not in err, about
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        if code == 130:
            assert number == signal.SIGINT and lines == ["error: stopped by Ctrl-C"], about
        elif code == -signal.SIGTERM:
            assert number == signal.SIGTERM and not lines, about
        elif "--overwrite" in words:
            assert code == 75, about
        else:
            assert not long and code in (0, 2, 3, 5), about
    record_property("cases", count)
