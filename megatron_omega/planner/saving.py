"""How often to save, and what is left of the time: from a failure rate and what saving, failing and restarting cost.

Failures are taken to come at random at a constant rate. The expected time of `interval` seconds of training, one save
and every repetition that failures cause is (Daly 2006, equation 20)

    exp(rate * restart) * (exp(rate * (interval + stall)) - 1) / rate

and the best interval is where that grows as slowly as the training it buys. Takes numbers, planned or measured; knows
neither models nor machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_omega.errors import ConfigError


@dataclass(frozen=True)
class SavingAdvice:
    """The best interval between two saves, and where the time goes with it. The four shares sum to 1."""

    interval_seconds: float
    """Training between two saves; infinite where nothing ever fails."""
    goodput: float
    """Share of the time that moves training forward."""
    saving: float
    """Share in which training stands still for a save."""
    lost_work: float
    """Share spent on steps that a failure undid: since the last complete save."""
    restarting: float
    """Share from failures to the first new step."""


def advise_saving(
    *,
    failures_per_hour: float,
    stall_seconds: float,
    restart_seconds: float = 0.0,
    write_seconds: float = 0.0,
    interval_seconds: float | None = None,
) -> SavingAdvice:
    """Return how often to save a job, and the goodput of that.

    Args:
        failures_per_hour: of the whole job; 1 / (hours between two failures).
        stall_seconds: time training stops for one save.
        restart_seconds: from a failure to the first new step, loading included.
        write_seconds: time until a save is complete behind training; until then a failure falls back to the one before,
            and the next one cannot begin.
        interval_seconds: judge this interval instead of the best.

    Raises:
        ConfigError: a number is negative, or the interval is not positive.
    """
    given = {"failures_per_hour": failures_per_hour, "stall_seconds": stall_seconds}
    given |= {"restart_seconds": restart_seconds, "write_seconds": write_seconds}
    for name, value in given.items():
        if not value >= 0:
            raise ConfigError(f"{name}={value:g} is negative; use 0 or more")
    if interval_seconds is not None and not interval_seconds > 0:
        raise ConfigError(f"interval_seconds={interval_seconds:g} is no time between two saves; use more than 0")
    rate = failures_per_hour / 3600
    if rate == 0 and interval_seconds is None:
        return SavingAdvice(math.inf, 1.0, 0.0, 0.0, 0.0)
    if interval_seconds is None:
        interval_seconds = max(_best_interval(rate, stall_seconds), write_seconds, 1.0)
    span = interval_seconds + stall_seconds
    if rate == 0:
        return SavingAdvice(interval_seconds, interval_seconds / span, stall_seconds / span, 0.0, 0.0)
    # A failure while a save is being written costs the interval before it too: on average `write_seconds` more of work.
    again = restart_seconds + write_seconds
    try:
        whole = math.exp(rate * again) * math.expm1(rate * span) / rate
    except OverflowError:  # the job fails many times before it ever reaches a save
        whole = math.inf
    if math.isinf(whole):
        return SavingAdvice(interval_seconds, 0.0, 0.0, 1.0, 0.0)
    goodput, saving = interval_seconds / whole, stall_seconds / whole
    restarting = -math.expm1(-rate * restart_seconds)  # a restart may fail, too
    return SavingAdvice(interval_seconds, goodput, saving, 1 - goodput - saving - restarting, restarting)


def _best_interval(rate: float, stall: float) -> float:
    """Return the root of (1 - x) exp(x) = exp(-rate * stall), x = rate * interval; near sqrt(2 * stall / rate)."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        if middle < 1 and middle + math.log1p(-middle) > -rate * stall:
            low = middle
        else:
            high = middle
    return low / rate
