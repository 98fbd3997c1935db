"""The learning rate as a pure function of the step. Needs no torch."""

import math
from typing import Literal

Schedule = Literal["cosine", "wsd"]


def learning_rate(
    step: int, *, peak: float, floor: float, warmup: int, total: int, schedule: Schedule = "cosine", decay: int = 0
) -> float:
    """Return the learning rate of an optimizer step: a linear warm-up, then a decay to `floor`.

    Args:
        step: 0 for the first step.
        peak: the highest rate.
        floor: the rate of the last step.
        warmup: steps of warm-up; the first has the rate peak / warmup, not 0.
        total: steps of the whole run.
        schedule: cosine decays along half a cosine from the end of the warm-up; wsd (warmup-stable-decay) stays at the
            peak, then decays linearly.
        decay: number of steps of the decay of wsd.

    Source: SGDR, https://arxiv.org/abs/1608.03983, equation 5, without restarts; MiniCPM,
    https://arxiv.org/abs/2404.06395, section 4, with the linear decay of https://arxiv.org/abs/2405.18392.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    begin = warmup if schedule == "cosine" else max(warmup, total - 1 - decay)
    progress = min(max((step - begin) / max(total - 1 - begin, 1), 0.0), 1.0)
    height = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return floor + (peak - floor) * height
