"""The processes of a run, as torchrun starts them, and how they share its model; without torchrun there is one.

With ddp every process holds the whole model and optimizer state, and gradients are summed during the backward pass.
With fsdp each holds a shard of every tensor, and a layer's weights are gathered only for its passes. Both compute the
same: weights are float32, autocast decides the precision of the products, gradients are summed in float32. So both, and
a single process, write the same checkpoints.
"""

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from llamalet.errors import ConfigError, LlamaletError, one_line
from model import Llama
from training.run.progress import say

REST_S = 0.2
"""Seconds between the last communication of a group and its end."""


class PeerError(LlamaletError):
    """Another process of the run cannot be reached."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among the processes of the run."""

    rank: int
    count: int
    local_count: int
    device: torch.device
    launch: str | None = None
    """Random name of the torchrun command, the same after it restarts processes; None without torchrun."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def print(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.is_main:
            say(line)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values` over all processes, in float64; every process must call this."""
        if self.count == 1:
            return list(values)
        on_device = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=on_device, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a scalar over all processes, on the device; the host does not wait."""
        if self.count == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.count

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process; every process must call this. The GPU is not involved."""
        if self.count == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def all_gather(self, text: str) -> list[str]:
        """Return the `text` of every process by rank, cut to 64 bytes; every process must call this."""
        if self.count == 1:
            return [text]
        own = torch.frombuffer(bytearray(text.encode()[:64].ljust(64)), dtype=torch.uint8)
        texts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(texts, own)
        return [bytes(text.tolist()).decode(errors="replace").rstrip() for text in texts]

    def barrier(self) -> None:
        """Return once every process has called this."""
        self.any(False)  # dist.barrier would go through the GPU

    def on(self, device: str) -> Self:
        """Return this process with `device` resolved for it.

        Args:
            device: auto (CUDA, else MPS, else CPU), or a torch device; cuda is the GPU of the local rank.

        Raises:
            ConfigError: if there is no such device.
        """
        return replace(self, device=find_device(device, int(os.environ.get("LOCAL_RANK", 0))))


@contextmanager
def process_group() -> Iterator[Processes]:
    """Join the process group that torchrun started, if any, and leave it at the end; the device is the CPU until `on`.

    Raises:
        ConfigError: if the environment asks for several processes but does not say where they meet.
        PeerError: if another process cannot be reached, or has ended.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes(0, 1, 1, torch.device("cpu"))
        return
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        store, group = _meet()
        # Tensors on the CPU go through gloo, so that flags and names need not wait for a GPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.count)
        yield group
    except RuntimeError as error:  # gloo raises plain RuntimeErrors
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise PeerError(
            f"process {rank} of {count} has lost another one, whose own message may say why; continue "
            f"with --resume (torch: {one_line(error).partition('. This is')[0]})"
        ) from error
    finally:
        if dist.is_initialized():
            # gloo's threads need the GIL to free the tensors of the last exchange. DDP, when it frees the group, waits
            # for them while it holds the GIL: a deadlock (pytorch issue 56297), unless they have finished before.
            time.sleep(REST_S)
            dist.destroy_process_group()


def _meet() -> tuple[dist.Store, Processes]:
    """Return a store shared by the processes of this start, and this process among them."""
    try:
        store, rank, count = next(dist.rendezvous("env://"))
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except ValueError as error:
        what = str(error).removeprefix("Error initializing torch.distributed using env:// rendezvous: ")
        raise ConfigError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} asks for several processes, but {what}; start them with "
            "`torchrun --nproc_per_node=2 train.py`, or unset WORLD_SIZE"
        ) from None
    launch = store.compare_set("launch", "", uuid.uuid4().hex).decode()
    group = Processes(rank, count, local_count, torch.device("cpu"), launch)
    return dist.PrefixStore(_agree_on_name(store, rank, count), store), group


def _agree_on_name(store: dist.Store, rank: int, count: int) -> str:
    """Return a name that all processes running now agree on, and that no earlier ones used.

    When torchrun restarts processes it keeps its store, and in it the addresses of the old processes, which gloo would
    wait for (pytorch issue 135712); and each machine counts its restarts by itself. So rank 0 publishes a random name,
    the others answer with an id, and a rank that sees its id confirmed knows that the name is current.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("start", own)
        answers = [f"{own}/{other}" for other in range(1, count)]
        store.wait(answers)
        store.set(f"{own}/heard", " ".join(store.get(answer).decode() for answer in answers))
        return own
    deadline = time.monotonic() + default_pg_timeout.total_seconds()
    while True:
        name = store.get("start").decode()
        store.set(f"{name}/{rank}", own)
        with suppress(dist.DistStoreError):
            store.wait([f"{name}/heard"], timedelta(seconds=1))
            if own in store.get(f"{name}/heard").decode():
                return name
        if time.monotonic() > deadline:
            raise dist.DistStoreError("process 0 did not start")
        time.sleep(0.05)


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the torch device for process `local_rank` of this machine.

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


def parallelize(model: Llama, kind: str, group: Processes, *, compiled: bool) -> nn.Module:
    """Prepare `model` for training by all processes; return what to call in training, in place of `model`.

    Args:
        model: on the process's device, with the same weights in every process.
        kind: ddp or fsdp; ignored for a single process, unless torchrun started it with fsdp.
        group: the processes.
        compiled: whether to use torch.compile.
    """
    if kind == "ddp" or not dist.is_initialized():
        if compiled:
            model.compile()
        if group.count == 1:
            return model
        # The buffers are constants. With gradients as views of the communication buckets there is no second copy.
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    mesh = init_device_mesh(group.device.type, (group.count,))
    for layer in model.layers:
        if compiled:  # layer by layer: FSDP's hooks are opaque to the compiler, which compiles one layer for all
            layer.compile()
        fully_shard(layer, mesh=mesh)
    if compiled and group.device.type != "cpu":  # the CPU's loss compiles itself
        model.head_loss = torch.compile(model.head_loss)
    fully_shard(model, mesh=mesh)
    return model


def sum_gradients(model: nn.Module, now: bool) -> None:
    """Set whether the next backward pass sums the gradients over the processes, as the last of an accumulation does."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `model`. If it is sharded, all processes must call this; only the main one gets it."""
    state: Any = get_model_state_dict(model, options=_whole(model))
    return state


def gather_slots(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, dict[str, Tensor]]:
    """Return the optimizers' tensors by parameter and slot; if they are sharded, see `gather_weights`."""
    if isinstance(model, FSDPModule):
        model.reshard()  # after a forward pass alone, some weights are still gathered and have no state
    # Without state, torch would take a step to create it.
    started = [optimizer for optimizer in optimizers if optimizer.state]
    state: Any = get_optimizer_state_dict(model, started, options=_whole(model)) if started else {}
    return state.get("state", {})


def _whole(model: nn.Module) -> StateDictOptions:
    """Gather shards into the main process's memory, one tensor at a time; leave whole tensors where they are."""
    return StateDictOptions(full_state_dict=True, cpu_offload=isinstance(model, FSDPModule))


def shard(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a tensor that every process has, sharded like `like`."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients together, a scalar that is the same in every process."""
    first = gradients[0]
    if not isinstance(first, DTensor):
        return get_total_norm(gradients)
    # One sum over the processes; torch would do one per gradient.
    shares = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    return DTensor.from_local(get_total_norm(shares).square(), first.device_mesh, [Partial()]).full_tensor().sqrt()
