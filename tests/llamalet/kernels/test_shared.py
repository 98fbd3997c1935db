"""Kernels that are compiled once: in the process that compiles them, and in one that finds them in the cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamalet.kernels.jit import kernel
from llamalet.kernels.shared import shared_kernel


@shared_kernel
def scaled_sum(x, factor, bounds) -> float:
    total = 0.0
    for i in range(bounds[0], bounds[1]):
        total += x[i] * factor
    return total


@kernel
def with_constants(x):
    return scaled_sum(x, 2, (0, len(x)))


@kernel
def with_variables(x, factor, first):
    return scaled_sum(x, factor, (first, len(x)))


@kernel
def through_another(x):
    return with_constants(x) + 1


CALLS = """
import numpy as np
from llamalet.kernels import cache
from test_shared import scaled_sum, with_constants, with_variables

callers = with_constants, with_variables
for caller in callers:
    cache.enable(caller)
x = np.arange(4.0)
print(with_constants(x), with_variables(x, 3, 1))
for found in (*callers, scaled_sum.compiled):
    print(len(found.signatures), sum(found.stats.cache_hits.values()))
"""


OUTER = """
import sys
import numpy as np
from llamalet.kernels import cache
import test_shared

for name in sys.argv[1:]:
    caller = getattr(test_shared, name)
    cache.enable(caller)
    print(caller(np.arange(4.0)))
"""


def calls(folder: Path, script: str = CALLS, *arguments: str) -> str:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_serves_constants_and_variables_and_the_next_process(tmp_path):
    assert calls(tmp_path) == "12.0 18.0\n1 0\n1 0\n1 0\n"
    assert calls(tmp_path) == "12.0 18.0\n1 1\n1 1\n1 1\n"
    for file in tmp_path.rglob("*scaled_sum*"):
        file.unlink()
    assert calls(tmp_path) == "12.0 18.0\n1 1\n1 1\n1 0\n"


def test_a_caller_of_a_caller_finds_it_in_the_next_process(tmp_path):
    assert calls(tmp_path, OUTER, "with_constants") == "12.0\n"
    assert calls(tmp_path, OUTER, "with_constants", "through_another") == "12.0\n13.0\n"
    assert calls(tmp_path, OUTER, "through_another") == "13.0\n"


def test_an_error_reaches_the_caller(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    with pytest.raises(AssertionError, match="IndexError"):
        calls(tmp_path, OUTER.replace("np.arange(4.0)", "np.arange(4.0), 2.0, -9"), "with_variables")


def test_a_caller_contains_a_call_and_no_copy():
    with_constants.compile("(f8[::1],)")
    code = with_constants.inspect_llvm(with_constants.signatures[0])
    (line,) = (line for line in code.splitlines() if "scaled_sum" in line and line.startswith(("declare", "define")))
    assert line.startswith("declare")
