"""Decide whether to take an optimizer step: on the device, the same in all processes, before anything changes."""

import torch
from torch import Tensor

from llamalet.errors import NonFiniteError

WINDOW = 100
"""Steps over which the gradient norm is averaged; before that many steps, no norm counts as a spike."""


class Guard:
    """Refuses steps whose loss or gradient is not finite, and steps whose gradient norm is a spike.

    A refused step uses up its data and changes nothing else. The decision is a tensor on the device, so the host need
    not wait for it; it depends only on values that are the same in all processes.

    Args:
        device: device of losses and norms.
        spike_factor: largest gradient norm as a multiple of its running mean; 0 allows any.
        max_skipped: number of steps in a row that may be refused.
    """

    def __init__(self, device: torch.device, *, spike_factor: float, max_skipped: int) -> None:
        self.spike_factor, self.max_skipped = spike_factor, max_skipped
        # The mean norm, the norms in it, the steps skipped in a row, and in all.
        self._state = torch.zeros(4, device=device)
        self._most_in_a_row = torch.zeros((), device=device)  # since the last check

    def refuses(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Return whether the step must be skipped, a bool scalar on the device, and update the statistics.

        Args:
            loss: mean loss of the step over all processes.
            gradient_norm: norm of the gradients over all processes.
        """
        mean, seen, in_a_row, skipped = self._state.unbind()
        skip = ~(torch.isfinite(loss) & torch.isfinite(gradient_norm))
        if self.spike_factor:
            skip |= (seen >= WINDOW) & (gradient_norm > self.spike_factor * mean)
        seen_now = torch.where(skip, seen, (seen + 1).clamp(max=WINDOW))
        mean_now = torch.where(skip, mean, mean + (gradient_norm - mean) / seen_now)
        in_a_row = torch.where(skip, in_a_row + 1, 0.0)
        self._most_in_a_row = torch.maximum(self._most_in_a_row, in_a_row)
        self._state = torch.stack((mean_now, seen_now, in_a_row, skipped + skip))
        return skip

    def check(self) -> int:
        """Return the number of steps skipped so far; this waits for the device.

        Raises:
            NonFiniteError: if more than `max_skipped` were skipped in a row.
        """
        in_a_row, skipped = torch.stack((self._most_in_a_row, self._state[3])).tolist()
        self._most_in_a_row = torch.zeros_like(self._most_in_a_row)
        if in_a_row > self.max_skipped:
            spike = f", or a gradient norm over {self.spike_factor:g} times its mean" if self.spike_factor else ""
            raise NonFiniteError(
                f"{in_a_row:.0f} steps in a row had a loss or gradient that is not finite{spike}; the weights are "
                "unchanged since. Continue from the newest checkpoint with --resume and a lower --learning_rate or a "
                "longer --warmup_iters"
            )
        return int(skipped)

    def state(self) -> list[float]:
        """Return the state to save: the running mean of the norm, norms in it, steps skipped in a row and in all."""
        return self._state.tolist()

    def load_state(self, state: list[float]) -> None:
        """Restore `state`."""
        self._state = torch.tensor(state, device=self._state.device)
