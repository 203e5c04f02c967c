"""The global batch size as a function of the samples consumed: constant, or growing at the start of a run."""

from __future__ import annotations

from megatron_omega.config.schema import BatchConfig


def batch_size_at(batch: BatchConfig, consumed_samples: int) -> int:
    """Return the size, in samples, of the step that starts at `consumed_samples`."""
    ramp = batch.ramp_up
    if ramp is None or consumed_samples >= ramp.samples:
        return batch.global_batch_size
    steps = (batch.global_batch_size - ramp.start) // ramp.increment
    reached = ramp.start + ramp.increment * (consumed_samples * (steps + 1) // ramp.samples)
    return min(reached, batch.global_batch_size)


def consumed_after(batch: BatchConfig, steps: int) -> int:
    """Return the samples consumed by the first `steps` steps."""
    consumed = 0
    while steps > 0 and batch.ramp_up is not None and consumed < batch.ramp_up.samples:
        consumed, steps = consumed + batch_size_at(batch, consumed), steps - 1
    return consumed + steps * batch.global_batch_size
