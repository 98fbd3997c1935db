"""The processes of a run, as torchrun starts them; a run without torchrun is a group of one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llamalet.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Processes:
    """This process and its place among the others."""

    rank: int
    count: int
    local_count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def print(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.is_main:
            print(line, flush=True)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values` over all processes, in float64; every process must call this."""
        if self.count == 1:
            return list(values)
        on_device = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=on_device, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a scalar over all processes, on the device and without waiting for it."""
        if self.count == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.count

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process; every process must call this, and the device does not matter."""
        if self.count == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the group that torchrun has started, if any, and leave it at the end.

    Args:
        device: auto (CUDA, else MPS, else CPU), or a torch device; with torchrun each process takes its own GPU.

    Raises:
        ConfigError: if there is no such device.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own = find_device(device, local_rank)
    if count > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, local_count, own)
    finally:
        if count > 1:
            dist.destroy_process_group()


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the torch device that `name` means for the process `local_rank` of this machine.

    Raises:
        ConfigError: if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: must be auto, cpu, cuda, cuda:N or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise ConfigError(f"device={name}: this torch finds no such device; use --device=cpu, or auto")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
    return device
