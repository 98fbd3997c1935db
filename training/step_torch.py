"""What computes with PyTorch: on a CPU, a GPU or several processes, compiled where a compiler works."""

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from llamalet.config import IGNORED, ModelConfig
from llamalet.errors import CheckpointError
from model import Llama
from training.backend import Arrays, StepFigures
from training.batches import Batch
from training.config import TrainConfig
from training.device_guard import DeviceGuard
from training.evaluation import Rows, Scorer
from training.machine import hardware
from training.machine.cpu import use_cpu_kernels
from training.machine.distributed import Processes, gather_weights, parallelize, sum_gradients
from training.optimizer import Optimizer, clip_gradients
from training.run.checkpoint import Checkpoint
from training.run.interrupts import Interrupted, Interrupts
from training.run.progress import activation_bytes
from training.weights import load_model, to_numpy, to_torch


class TorchBackend:
    """A backend.Backend; its methods are described there."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        group: Processes,
        weights: Arrays | None,
        interrupts: Interrupts,
    ) -> None:
        """Set up the machine, the model with these weights (None: initial ones), and the optimizer.

        Raises:
            ConfigError: if the device cannot compute in the type asked for.
            CheckpointError: if the weights do not fit the shape.
        """
        self._config, self._group, self._interrupts = config, group, interrupts
        self._accumulation = config.accumulation(group.count)
        self.machine = machine = set_up_machine(config, group, interrupts)
        activations = activation_bytes(config, model_config, machine.dtype.itemsize)
        group.print(
            f"{'memory':8} about {activations / 2**20:,.0f} MiB of activations and "
            f"{16 * model_config.n_params / 2**20:,.0f} MiB of weights, gradients and moments"
        )
        self.model = build_model(
            config, model_config, to_torch(weights) if weights else None, group.device, compiled=machine.compiled
        )
        # `model` is for checkpoints and evaluation; training calls `parallel`, which also sums the gradients.
        self._parallel = parallelize(self.model, config.parallel, group, compiled=machine.compiled)
        self.optimizer = Optimizer(
            self.model,
            kind=config.optimizer,
            rate=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            dtype=machine.dtype,
        )
        self.guard = DeviceGuard(group.device, spike_factor=config.spike_factor, max_skipped=config.max_skipped)
        self._last = torch.zeros(()), torch.zeros(())  # loss and gradient norm of the last step, on the device

        self.facts, self.threads = machine.facts, torch.get_num_threads()
        compiled = "compiled" if machine.not_compiled is None else f"not compiled: {machine.not_compiled}"
        dtype = str(machine.dtype).removeprefix("torch.")
        compiled += ", FSDP2" if isinstance(self.model, FSDPModule) else ""
        self.description = f"{group.device}, {self.threads} thread{'s' * (self.threads > 1)}, {dtype}, {compiled}"
        self.peak_tflops = hardware.peak_tflops(group.device, machine.dtype)

    def prepare(self, training: Batch, evaluation: Batch) -> None:
        """Run each kind of pass once and discard the results.

        Raises:
            ConfigError: if the compiler fails.
        """
        if self.machine.not_compiled is not None:
            return
        start = time.perf_counter()
        self._group.print(f"{'compile':8} takes up to a minute the first time")
        sharded = isinstance(self.model, FSDPModule)
        # Compiling can take long, and everything is saved, so a signal interrupts it at once. With sharded weights the
        # other processes wait for this one in the middle of a pass: they cannot be asked first, but notice its exit.
        waits = nullcontext() if sharded else suppress(Interrupted)
        with waits, self._interrupts.at_once(), hardware.compiler_errors():
            sum_gradients(self._parallel, sharded)  # FSDP would keep gradients that it did not sum
            self.loss(self._parallel, training).backward()
            self.model.zero_grad(set_to_none=True)
            self.losses([evaluation])
        if not self._group.any(self._interrupts.requested):
            self._group.print(f"{'compile':8} took {time.perf_counter() - start:.1f} s")

    def step(self, batches: Iterable[tuple[int, Batch]], rate: float) -> None:
        """Do one optimizer step."""
        config, group = self._config, self._group
        total = torch.zeros((), device=group.device)
        for micro_step, (index, batch) in enumerate(batches):
            # Dropout depends on this index and the seed alone: there is no RNG state to save.
            if config.dropout:
                torch.manual_seed(config.seed + 0x9E3779B97F4A7C15 * (index + 1) % 2**63)
            sum_gradients(self._parallel, micro_step == self._accumulation - 1)
            loss = self.loss(self._parallel, batch) / self._accumulation
            loss.backward()
            total += loss.detach()
        loss = group.mean(total)
        gradient_norm = clip_gradients(self.model.parameters(), config.grad_clip)
        self.optimizer.step(rate, skip=self.guard.refuses(loss, gradient_norm))
        self._last = loss, gradient_norm
        if group.device.type == "cpu":
            self.guard.check()  # on a GPU this waits for the device, so it is done only for a progress line

    def figures(self) -> StepFigures:
        """Return the figures of the last step."""
        loss, gradient_norm = self._last
        return StepFigures(loss.item(), gradient_norm.item(), self.guard.check())

    @torch.no_grad()
    def losses(self, batches: Iterable[Batch]) -> list[float]:
        """Return the mean loss of each batch."""
        self.model.eval()
        losses = [self.loss(self.model, batch) for batch in batches]
        self.model.train()
        return torch.stack(losses).tolist()  # the only place that waits for the device

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, computed in the chosen precision."""
        device, dtype = self._group.device, self.machine.dtype
        tokens, targets = map(torch.from_numpy, batch)
        if device.type == "cuda":  # copies from pinned memory are asynchronous
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        tokens, targets = tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext():
            loss: Tensor = model(tokens, targets)
            return loss

    def weights(self) -> Arrays:
        """Return the weights."""
        return to_numpy(gather_weights(self.model))

    def state(self) -> Arrays:
        """Return the optimizer's tensors."""
        return to_numpy(self.optimizer.state_dict())

    def guard_state(self) -> list[float]:
        """Return the guard's state."""
        return self.guard.state()

    def load(self, state: Arrays, guard: list[float] | None) -> None:
        """Restore the optimizer and the guard."""
        self.optimizer.load_state_dict(to_torch(state))
        if guard is not None:
            self.guard.load_state(guard)


@dataclass(frozen=True, slots=True)
class Machine:
    """How this process computes."""

    dtype: torch.dtype
    """Type of the matrix products."""
    not_compiled: str | None
    """Why torch.compile is not used; None if it is."""
    facts: dict[str, Any]
    """`hardware.machine_facts`."""

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is used."""
        return self.not_compiled is None


def set_up_machine(config: TrainConfig, group: Processes, interrupts: Interrupts) -> Machine:
    """Set PyTorch's threads, precision and memory, and find out whether there is a compiler.

    Raises:
        ConfigError: if the device cannot compute in the type asked for.
    """
    dtype = hardware.choose_dtype(config.dtype, group.device)
    hardware.set_threads(config.threads, group.local_count)
    hardware.set_precision(group.device, config.deterministic)
    hardware.tune_allocator(group.device)
    not_compiled = find_compiler(config, group, interrupts)
    return Machine(dtype, not_compiled, hardware.machine_facts(config, group, dtype, compiled=not_compiled is None))


def find_compiler(config: TrainConfig, group: Processes, interrupts: Interrupts) -> str | None:
    """Return why torch.compile is not used, or None if it is; the answer is the same in all processes."""
    if not config.compile:
        return "switched off"
    problem: str | None = "interrupted"
    with suppress(Interrupted), interrupts.at_once():  # the first use of a compiler takes long, even for little
        problem = hardware.compile_problem(group.device)
    others = group.any(problem is not None)
    return problem or ("another process has no compiler that works" if others else None)


def build_model(
    config: TrainConfig,
    model_config: ModelConfig,
    weights: Mapping[str, Tensor] | None,
    device: torch.device,
    *,
    compiled: bool,
) -> Llama:
    """Return the model on `device`, with the kernels for it.

    Args:
        config: the settings; `seed` and `init` decide the initial weights.
        model_config: the shape.
        weights: a state dict to use instead of initial weights.
        device: where to compute.
        compiled: whether torch.compile works here.
    """
    torch.manual_seed(config.seed)
    model = Llama(model_config, config.dropout)
    if config.init == "copying":
        model.start_by_copying()
    model.to(device)
    if weights:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"the weights are not those of the shape: {error}") from None
    if device.type == "cpu":
        use_cpu_kernels(model, compiled=compiled)
    return model


def new_scorer(checkpoint: Checkpoint, device: torch.device) -> Scorer:
    """Return what scores text with a checkpoint's model, in float32."""
    model = load_model(checkpoint.model_config, to_torch(checkpoint.model_state)).to(device)

    @torch.inference_mode()
    def score(tokens: Rows, targets: Rows) -> list[float]:
        logits = model(torch.from_numpy(tokens).to(device)).float()
        wanted = torch.from_numpy(targets).to(device)
        losses = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
        nats: list[float] = losses.cpu().double().sum(1).tolist()
        return nats

    return score
