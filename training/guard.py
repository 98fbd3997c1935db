"""Decide whether to take an optimizer step, before anything changes."""

import math

import numpy as np

from llamalet.errors import NonFiniteError

WINDOW = 100
"""Steps over which the gradient norm is averaged; before that many steps, no norm counts as a spike."""


class Guard:
    """Refuses steps whose loss or gradient is not finite, and steps whose gradient norm is a spike.

    A refused step uses up its data and changes nothing else. device_guard.py decides the same on a device.

    Args:
        spike_factor: largest gradient norm as a multiple of its running mean; 0 allows any.
        max_skipped: number of steps in a row that may be refused.
    """

    def __init__(self, *, spike_factor: float, max_skipped: int) -> None:
        self.spike_factor, self.max_skipped = spike_factor, max_skipped
        self._mean, self._seen, self._in_a_row, self._skipped = np.float32(0), 0, 0, 0

    def refuses(self, loss: float, gradient_norm: float) -> bool:
        """Return whether the step must be skipped, and update the statistics.

        Args:
            loss: mean loss of the step.
            gradient_norm: norm of the gradients.
        """
        norm = np.float32(gradient_norm)
        skip = not (math.isfinite(loss) and math.isfinite(norm))
        if self.spike_factor and self._seen >= WINDOW and norm > np.float32(self.spike_factor) * self._mean:
            skip = True
        if skip:
            self._in_a_row, self._skipped = self._in_a_row + 1, self._skipped + 1
        else:
            self._in_a_row, self._seen = 0, min(self._seen + 1, WINDOW)
            self._mean += (norm - self._mean) / np.float32(self._seen)
        return skip

    def check(self) -> int:
        """Return the number of steps skipped so far.

        Raises:
            NonFiniteError: if more than `max_skipped` were skipped in a row.
        """
        check_in_a_row(self._in_a_row, self.max_skipped, self.spike_factor)
        return self._skipped

    def state(self) -> list[float]:
        """Return the state to save: the running mean of the norm, norms in it, steps skipped in a row and in all."""
        return [float(self._mean), float(self._seen), float(self._in_a_row), float(self._skipped)]

    def load_state(self, state: list[float]) -> None:
        """Restore `state`."""
        self._mean = np.float32(state[0])
        self._seen, self._in_a_row, self._skipped = map(int, state[1:])


def check_in_a_row(count: float, max_skipped: int, spike_factor: float) -> None:
    """Raise a NonFiniteError if more than `max_skipped` steps were skipped in a row."""
    if count > max_skipped:
        spike = f", or a gradient norm over {spike_factor:g} times its mean" if spike_factor else ""
        raise NonFiniteError(
            f"{count:.0f} steps in a row had a loss or gradient that is not finite{spike}; the weights are "
            "unchanged since. Continue from the newest checkpoint with --resume and a lower --learning_rate or a "
            "longer --warmup_iters"
        )
