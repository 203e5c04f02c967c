"""Beyond the step: checkpoints, failures, goodput, days and energy of a whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_omega import accounting
from megatron_omega.planner.estimate import Estimate

HOST_COPY_BYTES_PER_SECOND = 10e9
"""Rate at which one accelerator's state is copied to host memory: all that an asynchronous save stops training for."""
NODE_OVERHEAD_WATTS = 0.35
"""Power of hosts, network and cooling, per watt of accelerators."""
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""fp32 master and both moments; the working weights come on top."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know."""

    tokens: float = 100e9
    """Tokens of the run."""
    failures_per_gpu_hour: float = 2e-5
    """Failures that stop the job: one in 50,000 accelerator-hours (as reported for a 16,384-GPU run of 2024)."""
    restart_seconds: float = 300.0
    """From a failure to the first new step."""
    storage_bytes_per_second: float = 20e9
    """Rate of the shared file system, all writers together."""


@dataclass(frozen=True)
class Operations:
    """What running to the end takes."""

    steps: int
    days: float
    """Failures and checkpoints included."""
    megawatt_hours: float
    checkpoint_bytes: int
    checkpoint_seconds: float
    """Time to write one, behind training."""
    stall_seconds: float
    """Time training stops for one."""
    checkpoint_interval_seconds: float
    """The interval that loses least (Young 1974, Daly 2006), but no shorter than a write."""
    failures: float
    goodput: float
    """Share of the time that moves training forward."""


def operations(estimate: Estimate, assumptions: Assumptions) -> Operations:
    """Return what a run of `assumptions.tokens` takes."""
    config, gpus = estimate.config, estimate.candidate.world_size
    element = 0 if config.precision.dtype == "fp32" else 2
    parameters = sum(cost.parameters for cost in accounting.layer_costs(config))
    size = parameters * (CHECKPOINT_BYTES_PER_PARAMETER + element)
    write = size / assumptions.storage_bytes_per_second
    stall = size / gpus / HOST_COPY_BYTES_PER_SECOND if config.checkpoint.asynchronous else write
    rate = assumptions.failures_per_gpu_hour * gpus / 3600
    interval = max(math.sqrt(2 * stall / rate), write) if rate else math.inf
    lost_to_saving = stall / (interval + stall) if math.isfinite(interval) else 0.0
    lost_to_failures = rate * (interval / 2 + write + assumptions.restart_seconds) if rate else 0.0
    goodput = (1 - lost_to_saving) / (1 + lost_to_failures)
    steps = math.ceil(assumptions.tokens / (config.batch.global_batch_size * accounting.tokens_per_sample(config)))
    seconds = steps * estimate.step_seconds / goodput
    watts = gpus * estimate.hardware.facts.watts * (1 + NODE_OVERHEAD_WATTS)
    return Operations(
        steps, seconds / 86400, watts * seconds / 3.6e9, size, write, stall, interval, rate * seconds, goodput
    )
