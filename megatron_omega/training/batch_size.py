"""The data of a step as a function of the samples consumed: how many, growing at the start of a run, and which.

Samples are numbered from 0. A run may leave some out (`left_out`: ascending, disjoint intervals [start, stop)): steps
pass over them, and the count of consumed samples passes over them too, so that it stays the position in the data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_omega.config.schema import BatchConfig

Interval = tuple[int, int]


def batch_size_at(batch: BatchConfig, consumed_samples: int) -> int:
    """Return the size, in samples, of the step that starts at `consumed_samples`."""
    ramp = batch.ramp_up
    if ramp is None or consumed_samples >= ramp.samples:
        return batch.global_batch_size
    steps = (batch.global_batch_size - ramp.start) // ramp.increment
    reached = ramp.start + ramp.increment * (consumed_samples * (steps + 1) // ramp.samples)
    return min(reached, batch.global_batch_size)


def samples_of_step(batch: BatchConfig, consumed_samples: int, left_out: Sequence[Interval] = ()) -> tuple[range, ...]:
    """Return the samples of the step that starts at `consumed_samples`, ascending; the next one starts at their end."""
    position, missing = consumed_samples, batch_size_at(batch, consumed_samples)
    pieces: list[range] = []
    for start, stop in (*left_out, (sys.maxsize, sys.maxsize)):
        count = min(missing, max(0, start - position))
        if count:
            pieces.append(range(position, position + count))
        position, missing = max(position + count, stop), missing - count
        if not missing:
            break
    return tuple(pieces)


def consumed_after(batch: BatchConfig, steps: int, left_out: Sequence[Interval] = (), *, begin: int = 0) -> int:
    """Return the samples consumed by `steps` steps, the first of which starts at `begin`."""
    consumed = begin
    while steps > 0:
        ahead = next((start for start, stop in left_out if stop > consumed), sys.maxsize)
        is_growing = batch.ramp_up is not None and consumed < batch.ramp_up.samples
        alike = 0 if is_growing else min(steps, max(0, ahead - consumed) // batch.global_batch_size)
        if alike:
            consumed, steps = consumed + alike * batch.global_batch_size, steps - alike
        else:
            consumed, steps = samples_of_step(batch, consumed, left_out)[-1].stop, steps - 1
    return consumed


def with_interval(left_out: Sequence[Interval], more: Interval) -> tuple[Interval, ...]:
    """Return the intervals that cover `left_out` and `more`, ascending and disjoint."""
    joined: list[Interval] = []
    for start, stop in sorted((*left_out, more)):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return tuple(joined)
