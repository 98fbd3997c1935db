"""Which optimizer trains a weight, and Muon's constants, for any backend: needs neither torch nor numba."""

import math
from typing import Literal

Group = Literal["muon", "decayed", "plain"]

MUON_MOMENTUM, MUON_EPS, MUON_ITERATIONS = 0.95, 1e-7, 5
MUON_A, MUON_B, MUON_C = 3.4445, -4.775, 2.0315
"""Of the polynomial a x + b x^3 + c x^5, which takes singular values from (0, 1] near 1 in five iterations."""


def group_of(name: str, n_axes: int, optimizer: str) -> Group:
    """Return how a weight is trained.

    Muon is for matrices that map activations to activations: those of the layers, not the embedding and the output.
    AdamW trains the rest, and only matrices are decayed: shrinking the gains of the norms would do harm.

    Args:
        name: its name in a checkpoint.
        n_axes: 1 for a vector, 2 for a matrix.
        optimizer: adamw or muon.
    """
    if n_axes < 2:
        return "plain"
    return "muon" if optimizer == "muon" and name.startswith("layers.") else "decayed"


def muon_rate(rate: float, rows: int, cols: int) -> float:
    """Return the step of Muon's update, whose size is then about that of AdamW's: so one learning rate serves both.

    Source: Moonlight, https://arxiv.org/abs/2502.16982, section 2.2.
    """
    return 0.2 * math.sqrt(max(rows, cols)) * rate
