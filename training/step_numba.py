"""What computes without PyTorch: llamalet/backward, on one CPU."""

import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numba
import numpy as np

from llamalet.backward import optimizer as optimizers
from llamalet.backward import workspace
from llamalet.backward.dropout import NO_DROPOUT, Dropout, mix
from llamalet.backward.initial_weights import initial_weights
from llamalet.backward.optimizer import NumbaOptimizer
from llamalet.backward.training_model import TrainingModel
from llamalet.command import nothing_to_lose
from llamalet.config import IGNORED, ModelConfig
from llamalet.cores import MAX_THREADS, physical_cores
from llamalet.errors import CheckpointError, ConfigError, FormatError
from llamalet.kernels import bfloat16
from llamalet.kernels.cache import without_collecting
from llamalet.kernels.simd import instruction_path
from llamalet.kv_cache import free_memory
from llamalet.model_file.checkpoint import SUFFIX
from llamalet.model_file.tensors import tensor_specs
from training.backend import Arrays, StepFigures
from training.batches import Batch
from training.config import TrainConfig
from training.evaluation import Rows, Scorer
from training.guard import Guard
from training.run.checkpoint import Checkpoint
from training.run.interrupts import Interrupted, Interrupts
from training.run.progress import say


def check_settings(config: TrainConfig) -> None:
    """Refuse what this backend cannot do.

    Raises:
        ConfigError: listing it.
    """
    problems = []
    if config.device not in ("auto", "cpu"):
        problems.append(f"device={config.device}: the numba backend computes on the CPU only")
    if config.parallel != "ddp":
        problems.append(f"parallel={config.parallel}: the numba backend has one process")
    if config.dtype == "bfloat16" and bfloat16.instructions() is None:
        names = ", ".join(bfloat16.available_instructions()) or "none on this processor"
        problems.append(
            f"dtype=bfloat16: this processor does not multiply it faster than float32, or {bfloat16.VARIABLE} forbids "
            f"it; leave the option out for float32, or set {bfloat16.VARIABLE} to one of: {names}"
        )
    if (config.threads or 1) > MAX_THREADS:
        problems.append(f"threads={config.threads}: must be at most {MAX_THREADS}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        problems.append(f"torchrun: the numba backend has one process, not {os.environ['WORLD_SIZE']}")
    ConfigError.raise_for(problems)


class NumbaBackend:
    """A backend.Backend; its methods are described there."""

    peak_tflops: float | None = None

    def __init__(
        self, config: TrainConfig, model_config: ModelConfig, weights: Arrays | None, interrupts: Interrupts
    ) -> None:
        """Take the memory, and the weights (None: initial ones).

        Raises:
            ConfigError: if the settings ask for what this backend cannot do, or for more memory than there is.
            CheckpointError: if the weights do not fit the shape.
        """
        check_settings(config)
        self._config, self._accumulation, self._interrupts = config, config.accumulation(1), interrupts
        self.threads = config.threads or max(physical_cores(), 1)
        mebibytes = memory_bytes(config, model_config, self.threads) / 2**20
        say(f"{'memory':8} {mebibytes:,.0f} MiB of weights, gradients, activations and moments")
        try:
            if mebibytes > free_memory() / 2**20:
                raise MemoryError
            if weights is None:
                tensors = initial_weights(model_config, config.seed, config.init)
            else:
                tensors = {name.removesuffix(SUFFIX): weight for name, weight in weights.items()}
            self.model = TrainingModel(
                model_config,
                tensors,
                batch_size=config.batch_size,
                n_positions=config.max_seq_len,
                n_threads=self.threads,
                rounded=rounds(config),
            )
            self.optimizer = new_optimizer(config, self.model)
        except MemoryError:
            raise ConfigError(
                f"batch_size={config.batch_size}: training takes {mebibytes:,.0f} MiB of memory, more than is free; "
                "use a smaller --batch_size, --max_seq_len or model"
            ) from None
        except FormatError as error:
            raise CheckpointError(str(error)) from None
        self.guard = Guard(spike_factor=config.spike_factor, max_skipped=config.max_skipped)
        self._last = 0.0, 0.0  # loss and gradient norm of the last step
        dtype = "bfloat16" if rounds(config) else "float32"
        self.facts: dict[str, Any] = {
            "numba": numba.__version__,
            "device": "cpu",
            "numpy": np.__version__,  # draws the first weights
            "processor": f"{platform.machine()}, {instruction_path()}",
            "processes": 1,
            "dtype": f"{dtype}, {bfloat16.instructions()}" if rounds(config) else dtype,
        }
        self.description = f"cpu, {self.threads} thread{'s' * (self.threads > 1)}, {dtype}, numba"

    def prepare(self, training: Batch, evaluation: Batch) -> None:
        """Compile all kernels."""
        start = time.perf_counter()
        with suppress(Interrupted), self._interrupts.at_once():  # compiling can take long, and everything is saved
            compile_kernels(self._config)
        if not self._interrupts.requested and (seconds := time.perf_counter() - start) > 5:
            say(f"{'compile':8} took {seconds:.1f} s")

    def step(self, batches: Iterable[tuple[int, Batch]], rate: float) -> None:
        """Do one optimizer step."""
        share, loss = 1 / self._accumulation, 0.0
        for micro_step, (index, batch) in enumerate(batches):
            dropout = self._dropout(index)
            loss += share * self.model.loss_and_gradients(*batch, dropout, share=share, add=micro_step > 0)
        norm, largest = self.optimizer.norm(self.model.gradients), self._config.grad_clip
        if not self.guard.refuses(loss, norm):
            # As torch's clip_grads_with_norm_, which keeps clear of a division by zero in this way.
            scale = largest / (norm + 1e-6) if largest and norm > largest else 1.0
            self.optimizer.step(self.model.gradients, rate, scale)
        self._last = loss, norm
        self.guard.check()

    def _dropout(self, index: int) -> Dropout:
        """Return the dropout of a micro-batch, a function of the seed and its number alone."""
        rate = self._config.dropout
        return Dropout(rate, mix(self._config.seed) + index) if rate else NO_DROPOUT

    def figures(self) -> StepFigures:
        """Return the figures of the last step."""
        return StepFigures(*self._last, self.guard.check())

    def losses(self, batches: Iterable[Batch]) -> list[float]:
        """Return the mean loss of each batch."""
        return [self.model.loss(*batch) for batch in batches]

    def weights(self) -> Arrays:
        """Return the weights."""
        return {name + SUFFIX: weight for name, weight in self.model.weights.items()}

    def state(self) -> Arrays:
        """Return the optimizer's tensors."""
        return {_with_suffix(key): value for key, value in self.optimizer.state.items()}

    def guard_state(self) -> list[float]:
        """Return the guard's state."""
        return self.guard.state()

    def load(self, state: Arrays, guard: list[float] | None) -> None:
        """Restore the optimizer and the guard.

        Raises:
            CheckpointError: if the tensors are not this optimizer's.
        """
        own = {_with_suffix(key): value for key, value in self.optimizer.state.items()}
        shapes, wanted = ({key: value.shape for key, value in given.items()} for given in (state, own))
        if state and (wrong := sorted(shapes.items() ^ wanted.items())):
            raise CheckpointError(f"the optimizer's {wrong[0][0]} is missing, extra or of another shape")
        for key, value in state.items():
            own[key][...] = value
        if guard is not None:
            self.guard.load_state(guard)


def rounds(config: TrainConfig) -> bool:
    """Return whether products multiply bfloat16: unless float32 is asked for, if the processor can."""
    return config.dtype != "float32" and bfloat16.instructions() is not None


def memory_bytes(config: TrainConfig, model_config: ModelConfig, n_threads: int) -> int:
    """Return the bytes that a backend takes."""
    shapes = {spec.name: spec.shape for spec in tensor_specs(1, model_config)}
    step = workspace.n_bytes(model_config, config.batch_size, config.max_seq_len, n_threads, rounded=rounds(config))
    return step + optimizers.n_bytes(shapes, config.optimizer, n_threads, rounded=rounds(config))


def new_optimizer(config: TrainConfig, model: TrainingModel) -> NumbaOptimizer:
    """Return the optimizer that the settings ask for."""
    return NumbaOptimizer(
        model.runner,
        model.weights,
        kind=config.optimizer,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        rounded=rounds(config),
    )


def compile_kernels(config: TrainConfig) -> None:
    """Compile what a step needs, by one with a tiny model."""
    with without_collecting():
        model = tiny_model(rounded=rounds(config))
        optimizer = new_optimizer(config, model)
        model.loss_and_gradients(TINY_BATCH, TINY_BATCH)
        optimizer.norm(model.gradients)
        optimizer.step(model.gradients, rate=0.0)


TINY_BATCH = np.zeros((1, 2), np.int64)


def tiny_model(*, rounded: bool) -> TrainingModel:
    """Return a model for TINY_BATCH, with which to compile: kernels depend on the types of arrays, not on their sizes.

    It has one thread, because others would compile too, and go on when a signal interrupts this one.
    """
    config = ModelConfig.create(dim=16, n_layers=1, n_heads=2, vocab_size=16, max_seq_len=2)
    weights = initial_weights(config, 0, "normal")
    return TrainingModel(config, weights, batch_size=1, n_positions=2, n_threads=1, rounded=rounded)


def new_scorer(checkpoint: Checkpoint, threads: int | None) -> Scorer:
    """Return what scores text with a checkpoint's model, row by row."""
    with nothing_to_lose(), without_collecting():
        tiny_model(rounded=False).loss(TINY_BATCH, TINY_BATCH)
    context = checkpoint.model_config.max_seq_len
    model = TrainingModel(
        checkpoint.model_config,
        {name.removesuffix(SUFFIX): weight for name, weight in checkpoint.model_state.items()},
        batch_size=1,
        n_positions=context,
        n_threads=threads or max(physical_cores(), 1),
    )

    def score(tokens: Rows, targets: Rows) -> list[float]:
        padding = (0, 0), (0, context - tokens.shape[1])
        tokens, targets = np.pad(tokens, padding), np.pad(targets, padding, constant_values=IGNORED)
        means = [model.loss(*row) for row in zip(tokens[:, None], targets[:, None], strict=True)]
        return [mean * count for mean, count in zip(means, (targets != IGNORED).sum(axis=1).tolist(), strict=True)]

    return score


def _with_suffix(key: str) -> str:
    """Return a slot's name in checkpoints."""
    name, _, slot = key.rpartition(":")
    return f"{name}{SUFFIX}:{slot}"
