"""The learning rate as a pure function of the step. Needs no torch."""

import math


def learning_rate(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """Return the learning rate of an optimizer step: a linear warm-up, then half a cosine down to `floor`.

    Args:
        step: 0 for the first step.
        peak: the highest rate.
        floor: the rate that the last step comes down to.
        warmup: steps of warm-up; the first has peak / warmup, never 0.
        total: steps of the whole run.

    Source: SGDR, https://arxiv.org/abs/1608.03983, equation 5, without restarts.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))
