"""Which losses are bad: not finite, or far above what the last accepted steps had. Pure, so a resumed run agrees."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from megatron_omega.config.schema import ResilienceConfig

_NORMAL_MAD = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""
_SMALLEST_DEVIATION = 1e-3
"""Share of the median below which a deviation is not a measure of anything: losses that hardly move."""


def z_score(loss: float, recent: Sequence[float]) -> float:
    """Return how many robust standard deviations `loss` lies above the median of `recent` (below: negative)."""
    median = statistics.median(recent)
    deviation = _NORMAL_MAD * statistics.median(abs(value - median) for value in recent)
    return (loss - median) / max(deviation, _SMALLEST_DEVIATION * abs(median), 1e-12)


def judge(loss: float, recent: Sequence[float], config: ResilienceConfig) -> tuple[bool, float]:
    """Return whether a step of this loss may be taken, and its z-score: NaN before a quarter of the window."""
    is_judged = math.isfinite(loss) and len(recent) >= config.spike_window // 4
    score = z_score(loss, recent) if is_judged else math.nan
    is_spike = config.spike_z_score > 0 and score > config.spike_z_score
    return math.isfinite(loss) and not is_spike, score


def remember(loss: float, recent: Sequence[float], config: ResilienceConfig) -> tuple[float, ...]:
    """Return the accepted losses that the next one is measured against."""
    return (*recent, loss)[-config.spike_window :]
