"""Which values dropout drops, as a pure function of a seed and of where the value stands.

Nothing is stored and no generator moves on: the backward pass asks again and gets the same answer, in any order and
on any number of threads. The random numbers are SplitMix64's: its n-th output is a hash of n alone.

Source: dropout, https://jmlr.org/papers/v15/srivastava14a.html; SplitMix64, https://doi.org/10.1145/2714064.2660195.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(z: int) -> int:
    """Return SplitMix64's hash of 64 bits."""
    z = (z ^ z >> 30) * MULTIPLIERS[0] & MASK
    z = (z ^ z >> 27) * MULTIPLIERS[1] & MASK
    return z ^ z >> 31


@dataclass(frozen=True)
class Dropout:
    """Dropout of one batch.

    Attributes:
        rate: share of the values that become zero, 0 to 1; the rest are divided by 1 - rate.
        seed: what the choice depends on; another batch needs another seed.
    """

    rate: float
    seed: int

    def state(self, site: int) -> int:
        """Return the state from which SplitMix64 draws for one place in the model."""
        return mix((mix(self.seed & MASK) + site * GAMMA) & MASK)

    def scales(self, site: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return what each value is multiplied with, 0 or 1 / (1 - rate): float32 of `shape`.

        Args:
            site: where in the model the values arise; see backward/reference.py.
            shape: shape of the values.
        """
        count = math.prod(shape)
        z = np.uint64(self.state(site)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA)
        for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
            z = (z ^ z >> np.uint64(shift)) * np.uint64(multiplier)
        z ^= z >> np.uint64(31)
        drawn = (z >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)  # 24 bits: uniform in [0, 1)
        return np.where(drawn < self.rate, np.float32(0), np.float32(1 / (1 - self.rate))).reshape(shape)


NO_DROPOUT = Dropout(0.0, 0)
