"""The guard on a device, the same in all processes: it decides as guard.py does, and the host need not wait for it."""

import torch
from torch import Tensor

from training import guard


class DeviceGuard:
    """A guard whose decision is a tensor on the device; it depends only on values that are the same in all processes.

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
            skip |= (seen >= guard.WINDOW) & (gradient_norm > self.spike_factor * mean)
        seen_now = torch.where(skip, seen, (seen + 1).clamp(max=guard.WINDOW))
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
        guard.check_in_a_row(in_a_row, self.max_skipped, self.spike_factor)
        return int(skipped)

    def state(self) -> list[float]:
        """Return the state to save: the running mean of the norm, norms in it, steps skipped in a row and in all."""
        return self._state.tolist()

    def load_state(self, state: list[float]) -> None:
        """Restore `state`."""
        self._state = torch.tensor(state, device=self._state.device)
