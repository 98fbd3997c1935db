"""Kernels stay inside of the memory that was taken: here it ends at a page that nobody may touch."""

import subprocess
import sys
from pathlib import Path

import pytest

from llamalet.kernels import bfloat16

SCRIPT = """
import ctypes, mmap, sys
import numpy as np
from gradient_cases import batch
from toy import random_tensors
from llamalet.backward import memory
from llamalet.backward.optimizer import NumbaOptimizer
from llamalet.backward.training_model import TrainingModel
from llamalet.config import ModelConfig

def end_at_a_guarded_page(self, n_bytes):
    page, self.n_bytes, self.read_after = mmap.PAGESIZE, 0, 0
    size = -(-n_bytes // page) * page
    whole = np.frombuffer(mmap.mmap(-1, size + page), np.uint8)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.ctypes.data + size), page, 0) == 0
    self._bytes = whole[(size - n_bytes) // 64 * 64 : size][:n_bytes]

memory.Memory.__init__ = end_at_a_guarded_page
for B, T, C, F, V in ((1, 2, 16, 48, 16), (2, 9, 40, 33, 300), (1, 33, 24, 100, 3300)):
    config = ModelConfig.create(dim=C, n_layers=1, n_heads=2, hidden_dim=F, vocab_size=V, max_seq_len=T)
    model = TrainingModel(
        config, random_tensors(config), batch_size=B, n_positions=T, n_threads=1, rounded=sys.argv[1] == "bfloat16"
    )
    optimizer = NumbaOptimizer(
        model.runner, model.weights, kind="muon", betas=(0.9, 0.95), weight_decay=0.1, rounded=sys.argv[1] == "bfloat16"
    )
    assert np.isfinite(model.loss_and_gradients(*batch(config, B, T, ignored=0)))
    optimizer.step(model.gradients, 1e-3)
    assert all(np.isfinite(weight).all() for weight in model.weights.values())
print("stayed inside")
"""


@pytest.mark.compiles
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects a page with mprotect")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_read_after_the_end(dtype):
    if dtype == "bfloat16" and bfloat16.instructions() is None:
        pytest.skip("bfloat16 does not pay here")
    tests = [str(Path(__file__).parents[n]) for n in (0, 2)]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {tests}\n{SCRIPT}", dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "stayed inside\n", f"exit code {done.returncode}: {done.stderr[-500:]}"
