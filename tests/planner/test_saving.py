"""How often to save: the closed form against a simulated job, and against what is known."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_omega.errors import ConfigError
from megatron_omega.planner.saving import advise_saving


def _simulated(interval: float, stall: float, rate: float, restart: float, *, saves: int) -> tuple[float, float]:
    """Run a job that fails at random until `saves` intervals are safe; return its goodput and share of restarting."""
    generator, clock, restarting = random.Random(1), 0.0, 0.0
    for _ in range(saves):
        until_failure = generator.expovariate(rate)
        while until_failure < interval + stall:  # the work since the last save is lost
            clock += until_failure
            while (until_failure := generator.expovariate(rate)) < restart:  # restarts fail, too
                clock, restarting = clock + until_failure, restarting + until_failure
            clock, restarting = clock + restart, restarting + restart
            until_failure = generator.expovariate(rate)
        clock += interval + stall
    return saves * interval / clock, restarting / clock


@pytest.mark.parametrize(("stall", "failures_per_hour", "restart"), [(30, 0.5, 300), (120, 4, 600), (5, 60, 20)])
def test_goodput_is_that_of_a_simulated_job(stall: float, failures_per_hour: float, restart: float) -> None:
    advice = advise_saving(failures_per_hour=failures_per_hour, stall_seconds=stall, restart_seconds=restart)
    goodput, restarting = _simulated(advice.interval_seconds, stall, failures_per_hour / 3600, restart, saves=20_000)
    assert advice.goodput == pytest.approx(goodput, rel=0.02)
    assert advice.restarting == pytest.approx(restarting, rel=0.05)


@given(
    stall=st.floats(0.1, 100), failures_per_hour=st.floats(1e-6, 10), restart=st.floats(0, 1000),
    factor=st.floats(0.3, 3),
)  # fmt: skip
def test_no_other_interval_is_better(stall: float, failures_per_hour: float, restart: float, factor: float) -> None:
    costs = {"failures_per_hour": failures_per_hour, "stall_seconds": stall, "restart_seconds": restart}
    best = advise_saving(**costs)
    other = advise_saving(**costs, interval_seconds=best.interval_seconds * factor)
    assert other.goodput <= best.goodput + 1e-9
    assert best.goodput + best.saving + best.lost_work + best.restarting == pytest.approx(1)
    assert min(best.goodput, best.saving, best.restarting) >= 0 and best.lost_work > -1e-9


def test_rare_failures_give_youngs_interval() -> None:
    advice = advise_saving(failures_per_hour=0.001, stall_seconds=10)
    assert advice.interval_seconds == pytest.approx(math.sqrt(2 * 10 * 3_600_000), rel=0.01)


def test_a_save_ends_before_the_next_begins() -> None:
    assert advise_saving(failures_per_hour=1, stall_seconds=0.001, write_seconds=300).interval_seconds == 300


def test_extremes_have_an_answer() -> None:
    assert advise_saving(failures_per_hour=0, stall_seconds=10).goodput == 1
    assert advise_saving(failures_per_hour=1e9, stall_seconds=1e4).goodput == pytest.approx(0)
    assert json.dumps(advise_saving(failures_per_hour=1, stall_seconds=0).goodput)
    with pytest.raises(ConfigError, match="stall_seconds=-1 is negative"):
        advise_saving(failures_per_hour=1, stall_seconds=-1)
