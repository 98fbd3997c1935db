"""The kernels' tests once more, on the instruction paths that this processor has besides its best one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamalet.kernels import simd

ROOT = Path(__file__).parents[3]
# What differs between the paths: how quantized matrices are multiplied.
TESTS = "matmul or whatever_is_multiplied or reads_nothing or nan"


@pytest.mark.parametrize("path", simd.available_paths()[1:])
def test_the_kernels_equal_the_reference(path, tmp_path):
    environment = os.environ | {simd.PATH_VARIABLE: path, "XDG_CACHE_HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/llamalet/kernels/test_ops.py",
        "-k",
        TESTS,
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
