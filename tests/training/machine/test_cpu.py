import os

import pytest
import torch

import model
from llamalet import cores
from llamalet.config import IGNORED
from training.machine import cpu, hardware


@pytest.mark.parametrize("ignored", [0, 5])
@pytest.mark.parametrize("chunk_rows", [None, 128])
def test_the_chunked_loss_is_the_plain_one(monkeypatch, ignored, chunk_rows):
    """Values and gradients, in one chunk and in several slabs, with and without targets that do not count."""
    torch.manual_seed(0)
    B, T, C, V = 3, 150, 24, 97
    if chunk_rows is not None:
        monkeypatch.setattr(cpu, "CHUNK_BYTES", chunk_rows * V * 4)
        monkeypatch.setattr(cpu, "SLAB_BYTES", 2 * chunk_rows * V * 4)
    hidden, weight = torch.randn(B, T, C), torch.randn(V, C)
    targets = torch.randint(0, V, (B, T))
    targets.view(-1)[:ignored] = IGNORED
    results = []
    for head_loss in (model.head_loss, cpu.HeadLoss(compiled=False)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = head_loss(h, w, targets)
        (3 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(4, 4, 300), (4, 2, 128), (6, 1, 17)])
def test_blocked_attention_is_the_plain_one(heads, kv_heads, length):
    torch.manual_seed(0)
    shapes = [(2, heads, length, 16), (2, kv_heads, length, 16), (2, kv_heads, length, 16)]
    inputs = [torch.randn(shape) for shape in shapes]
    results = []
    for attend in (model.causal_attention, cpu.attend_in_blocks):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        out = attend(q, k, v, 0.0)
        (out * torch.arange(16.0)).sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_each_physical_core_gets_one_thread(tmp_path, monkeypatch):
    """Two cores with two hardware threads each, whatever torchrun has put into the environment."""
    for cpu_number in range(4):
        folder = tmp_path / f"cpu{cpu_number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu_number % 2},{cpu_number % 2 + 2}\n")
    monkeypatch.setattr(cores, "Path", lambda path: tmp_path / path.removeprefix("/sys/devices/system/cpu/"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [hardware.count_threads(processes) for processes in (1, 2, 3)] == [2, 1, 1]


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("X", None)]
)
def test_the_peak_is_that_of_the_gpu_and_not_of_a_namesake(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_tflops(torch.device("cuda"), torch.bfloat16) == peak
    assert hardware.peak_tflops(torch.device("cuda"), torch.float32) is None
