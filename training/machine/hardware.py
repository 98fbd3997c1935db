"""What the machine can do: precision, compiler, threads, memory, peak speed."""

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llamalet.cores import physical_cores
from llamalet.errors import ConfigError, one_line
from training.config import TrainConfig
from training.machine import compiler_cache
from training.machine.distributed import Processes

# Peak of dense bf16 matrix products in TFLOP/s, by a part of the name that CUDA reports.
# Source: NVIDIA's data sheets; the SXM figure unless the name contains the form factor.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the device's peak in TFLOP/s, or None if it is unknown."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def machine_facts(config: TrainConfig, group: Processes, dtype: torch.dtype, *, compiled: bool) -> dict[str, Any]:
    """Return what decides the last bits of a result besides data, settings and seed; checkpoints record it."""
    return {
        "torch": torch.__version__,
        "device": group.device.type,
        "processor": torch.cuda.get_device_name() if group.device.type == "cuda" else platform.machine(),
        "processes": group.count,
        "parallel": config.parallel,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": compiled,
    }


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type of the matrix products: `name`, or for auto, bfloat16 if the hardware has it, else float32.

    Raises:
        ConfigError: if bfloat16 is asked for on a GPU without it.
    """
    if name == "float32":
        return torch.float32
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if name == "bfloat16" and not native and device.type != "cpu":
        raise ConfigError(f"dtype=bfloat16: {device} does not support it; use --dtype=float32")
    return torch.bfloat16 if native or name == "bfloat16" else torch.float32


def compile_problem(device: torch.device) -> str | None:
    """Return why torch.compile cannot be used here, or None if it can; it is tried on a small function."""
    if device.type == "mps":
        return "torch.compile is not reliable on MPS"
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.zeros(16, device=device))
    except Exception as error:  # compilers fail in many ways
        return "torch.compile does not work here: " + one_line(error)[:200]
    return None


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Turn an error of torch.compile into a ConfigError; since it works here, a damaged file in its cache is likely."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second, which only compiling needs

    try:
        yield
    except TorchDynamoException as error:
        lines = [line for line in str(error).splitlines() if line and not line.startswith(("backend=", "Set TORCH"))]
        raise ConfigError(
            f"torch.compile fails: {lines[0] if lines else type(error).__name__}; "
            f"remove {compiler_cache.current()} and try again, or go on without it: --compile=False"
        ) from error


def count_threads(n_processes: int) -> int:
    """Return one process's share of the physical cores, for `n_processes` on this machine.

    The hardware threads of a core share its multipliers, so a second one does not speed up a matrix product.
    OMP_NUM_THREADS is ignored: torchrun sets it to 1 if it is not set.
    """
    return max(physical_cores() // n_processes, 1)


def tune_allocator(device: torch.device) -> None:
    """Keep freed memory for the next step instead of returning it and faulting it in again, and use huge pages.

    A new page costs more than the arithmetic on it. Has an effect only for training on the CPU on Linux with glibc.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first allocates 2 MB
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt(mmap_max, 0)  # memory from mmap would be returned at once, whatever the trim threshold
    mallopt(trim_threshold, (1 << 31) - 1)


def set_threads(threads: int | None, n_processes: int) -> None:
    """Set PyTorch's number of threads; None means this process's share of the cores."""
    torch.set_num_threads(threads or count_threads(n_processes))


def set_precision(device: torch.device, deterministic: bool | None) -> None:
    """Use deterministic algorithms (None: on the CPU only), and on a GPU TF32 for products that stay float32."""
    if deterministic or (deterministic is None and device.type == "cpu"):
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS is deterministic only with a fixed workspace
        torch.use_deterministic_algorithms(True)
        # A debugging aid that costs a pass over the memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn the RuntimeError that torch raises when memory runs out into a MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError from error
        raise
