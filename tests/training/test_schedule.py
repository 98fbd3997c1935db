import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalet.errors import ConfigError
from training.config import TrainConfig
from training.schedule import learning_rate

SETTINGS = st.fixed_dictionaries(
    {
        "peak": st.floats(1e-5, 1.0),
        "floor": st.just(0.0) | st.just(1e-6),
        "warmup": st.integers(0, 40),
        "total": st.integers(45, 200),
        "schedule": st.sampled_from(["cosine", "wsd"]),
        "decay": st.integers(0, 200),
    }
)


@given(SETTINGS)
def test_a_run_warms_up_never_rises_again_and_ends_at_the_floor(settings):
    rates = [learning_rate(step, **settings) for step in range(settings["total"] + 5)]
    warmup, peak, floor, last = settings["warmup"], settings["peak"], settings["floor"], settings["total"] - 1
    assert rates[:warmup] == [peak * (step + 1) / warmup for step in range(warmup)]
    assert rates[warmup] == pytest.approx(peak)
    assert all(later <= earlier for earlier, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert all(rate == floor for rate in rates[last:] if settings["schedule"] == "cosine" or settings["decay"])
    assert rates == [learning_rate(step, **settings) for step in range(settings["total"] + 5)]


def test_wsd_is_a_plateau_and_a_straight_line():
    rates = [
        learning_rate(step, peak=1.0, floor=0.2, warmup=4, total=21, schedule="wsd", decay=8) for step in range(21)
    ]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:13] == [1.0] * 9
    assert rates[12:] == pytest.approx([1.0 - 0.1 * step for step in range(9)])


def test_the_options_reach_the_schedule():
    options = {"max_iters": 100, "warmup_iters": 10, "learning_rate": 1e-2, "min_lr": 0.0, "decay_share": 0.2}
    wsd, cosine = TrainConfig(**options, schedule="wsd"), TrainConfig(**options, schedule="cosine")
    assert wsd.rate(79) == 1e-2 > wsd.rate(90) > wsd.rate(99) == 0.0
    assert cosine.rate(50) < 6e-3 and cosine.rate(99) == 0.0
    assert {TrainConfig(**options, decay_lr=False).rate(step) for step in range(10, 100)} == {1e-2}
    with pytest.raises(ConfigError, match="decay_share=1.5"):
        TrainConfig(decay_share=1.5)
