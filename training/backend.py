"""What the training loop needs of what computes: step_torch.py and step_numba.py each have one. Needs no torch."""

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from training.batches import Batch

Arrays = Mapping[str, NDArray[Any]]


def has_torch() -> bool:
    """Return whether PyTorch is installed; it is not imported."""
    try:
        return importlib.util.find_spec("torch") is not None
    except ModuleNotFoundError:  # from an importer that blocks it
        return False


class StepFigures(NamedTuple):
    """What the last step was like."""

    loss: float
    """Mean loss in nats per token, over all processes."""
    gradient_norm: float
    """Norm of all gradients together, before it was clipped."""
    skipped: int
    """Steps that the guard has refused so far."""


class Backend(Protocol):
    """A model, its optimizer and its guard. It says how much memory they take before it takes it.

    In a run of several processes all of them must call the same methods in the same order.

    Attributes:
        facts: what decides the last bits of a result besides data, settings and seed; checkpoints record it.
        description: the same in words, for the summary of a run.
        threads: number of threads.
        peak_tflops: the device's peak in TFLOP/s; None if it is unknown.
    """

    facts: dict[str, Any]
    description: str
    threads: int
    peak_tflops: float | None

    def prepare(self, training: Batch, evaluation: Batch) -> None:
        """Compile what is needed for such batches, so that this is not part of a step; the model stays as it is."""

    def step(self, batches: Iterable[tuple[int, Batch]], rate: float) -> None:
        """Do one optimizer step. If the guard refuses it, the weights stay.

        Args:
            batches: the step's micro-batches, each after its number in the run, on which its dropout depends.
            rate: the learning rate.

        Raises:
            NonFiniteError: if the guard has refused too many steps in a row.
        """

    def figures(self) -> StepFigures:
        """Return the figures of the last step; on a GPU this waits for it.

        Raises:
            NonFiniteError: if the guard has refused too many steps in a row.
        """

    def losses(self, batches: Iterable[Batch]) -> list[float]:
        """Return the mean loss of each batch, without dropout."""

    def weights(self) -> Arrays:
        """Return the weights by the names that checkpoints use, in float32; the main process's are complete."""

    def state(self) -> Arrays:
        """Return the optimizer's tensors, named `WEIGHT:SLOT`; the main process's are complete."""

    def guard_state(self) -> list[float]:
        """Return the guard's state: see guard.Guard.state."""

    def load(self, state: Arrays, guard: list[float] | None) -> None:
        """Restore what `state` and `guard_state` returned; None leaves the guard as it is."""
