"""What computes without PyTorch: llamalet/backward, on one CPU, in float32."""

import os
import platform
import time
from collections.abc import Iterable
from typing import Any

import numba
import numpy as np

from llamalet.backward import workspace
from llamalet.backward.dropout import NO_DROPOUT, Dropout, mix
from llamalet.backward.initial_weights import initial_weights
from llamalet.backward.optimizer import NumbaOptimizer
from llamalet.backward.training_model import TrainingModel
from llamalet.config import ModelConfig
from llamalet.cores import physical_cores
from llamalet.errors import CheckpointError, ConfigError, FormatError
from llamalet.kernels.simd import instruction_path
from llamalet.model_file.checkpoint import SUFFIX
from training.backend import Arrays, StepFigures
from training.batches import Batch
from training.config import TrainConfig
from training.guard import Guard
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
    if config.dtype not in ("auto", "float32"):
        problems.append(f"dtype={config.dtype}: the numba backend computes in float32 only")
    if config.eval_only:
        problems.append("eval_only: needs the torch backend; `llamalet evaluate CHECKPOINT TEXT` scores without it")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        problems.append(f"torchrun: the numba backend has one process, not {os.environ['WORLD_SIZE']}")
    ConfigError.raise_for(problems)


class NumbaBackend:
    """A backend.Backend; its methods are described there."""

    peak_tflops: float | None = None

    def __init__(self, config: TrainConfig, model_config: ModelConfig, weights: Arrays | None) -> None:
        """Take the memory, and the weights (None: initial ones).

        Raises:
            ConfigError: if the settings ask for what this backend cannot do.
            CheckpointError: if the weights do not fit the shape.
        """
        check_settings(config)
        self._config, self._accumulation = config, config.accumulation(1)
        self.threads = config.threads or max(physical_cores(), 1)
        if weights is None:
            tensors = initial_weights(model_config, config.seed, config.init)
        else:
            tensors = {name.removesuffix(SUFFIX): weight for name, weight in weights.items()}
        sizes = model_config, config.batch_size, config.max_seq_len, self.threads
        moments = 8 * model_config.n_params
        self.memory = (
            f"{workspace.n_bytes(*sizes) / 2**20:,.0f} MiB of weights, gradients and activations, and up to "
            f"{moments / 2**20:,.0f} MiB of moments"
        )
        try:
            self.model = TrainingModel(
                model_config,
                tensors,
                batch_size=config.batch_size,
                n_positions=config.max_seq_len,
                n_threads=self.threads,
            )
        except FormatError as error:
            raise CheckpointError(str(error)) from None
        self.optimizer = NumbaOptimizer(
            self.model.runner,
            self.model.weights,
            kind=config.optimizer,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.guard = Guard(spike_factor=config.spike_factor, max_skipped=config.max_skipped)
        self._last = 0.0, 0.0  # loss and gradient norm of the last step
        self.facts: dict[str, Any] = {
            "numba": numba.__version__,
            "device": "cpu",
            "numpy": np.__version__,  # draws the first weights
            "processor": f"{platform.machine()}, {instruction_path()}",
            "processes": 1,
            "dtype": "float32",
        }
        self.description = f"cpu, {self.threads} thread{'s' * (self.threads > 1)}, float32, numba"

    def prepare(self, training: Batch, evaluation: Batch) -> None:
        """Run a batch once and discard the results: new kernels are compiled."""
        start = time.perf_counter()
        self.model.loss_and_gradients(*training, self._dropout(0))
        self.optimizer.norm(self.model.gradients)
        self.model.loss(*evaluation)
        if (seconds := time.perf_counter() - start) > 5:
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


def _with_suffix(key: str) -> str:
    """Return a slot's name in checkpoints."""
    name, _, slot = key.rpartition(":")
    return f"{name}{SUFFIX}:{slot}"
