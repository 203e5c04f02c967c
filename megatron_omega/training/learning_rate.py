"""The learning rate as a pure function of the step. Knows no optimizer."""

from __future__ import annotations

import math

from megatron_omega.config.schema import ScheduleConfig


def learning_rate_fraction(schedule: ScheduleConfig, step: int, train_steps: int) -> float:
    """Return the share of the peak learning rate that step `step` (counted from 0) of `train_steps` uses."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return 1.0
    if schedule.decay == "inverse_square_root":
        return math.sqrt(max(schedule.warmup_steps, 1) / (step + 1))
    return _decayed(schedule, step, train_steps)


def _decayed(schedule: ScheduleConfig, step: int, train_steps: int) -> float:
    floor = schedule.min_learning_rate_fraction
    begin = schedule.warmup_steps
    if schedule.decay == "wsd":
        begin = max(begin, round(train_steps * (1 - schedule.decay_fraction)))
    progress = min(max(step - begin, 0) / max(train_steps - begin, 1), 1.0)
    if schedule.decay == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    return 1 - (1 - floor) * progress
