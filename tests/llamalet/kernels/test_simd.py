"""The kernels' tests again, on each instruction path of this processor but its best one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamalet.kernels import simd

ROOT = Path(__file__).parents[3]


@pytest.mark.compiles
@pytest.mark.parametrize("path", simd.available_paths()[1:])
def test_the_kernels_equal_the_reference(path, tmp_path):
    environment = os.environ | {simd.PATH_VARIABLE: path, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-m", "simd_path", "tests/llamalet/kernels/test_ops.py"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
