"""Beyond the step: the start, checkpoints, failures, goodput, days and energy of a whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_omega import accounting
from megatron_omega.errors import ConfigError
from megatron_omega.planner.estimate import Estimate, Planner
from megatron_omega.planner.orthogonal import moved_matrices
from megatron_omega.planner.saving import advise_saving

HOST_COPY_BYTES_PER_SECOND = 10e9
"""Rate at which one accelerator's state is copied to host memory: all that an asynchronous save stops training for."""
NODE_OVERHEAD_WATTS = 0.35
"""Power of hosts, network and cooling, per watt of accelerators."""
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""fp32 weight and both moments; a matrix that Muon moves has one. Working weights are not saved: they follow."""


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
    stall_seconds: float | None = None
    """Measured time that training stops for one save; None: estimated."""
    write_seconds: float | None = None
    """Measured time until a save is complete; None: estimated."""

    def __post_init__(self) -> None:
        """Raise ConfigError for every number that cannot be."""
        found = []
        for name in (field.name for field in fields(self)):
            value, needs_more = getattr(self, name), name in ("tokens", "storage_bytes_per_second")
            if value is not None and not (value > 0 or (value == 0 and not needs_more)):
                option = {"storage_bytes_per_second": "storage-bandwidth"}.get(name, name.replace("_", "-"))
                found.append(f"--{option} {value:g} cannot be; use {'more than 0' if needs_more else '0 or more'}")
        if found:
            raise ConfigError(*found)


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
    """The interval that loses least."""
    checkpoint_interval_steps: int
    """The same as checkpoint.interval_steps; the whole run where nothing ever fails."""
    failures: float
    goodput: float
    """Share of the time that moves training forward; the rest goes to the three below."""
    saving: float
    lost_work: float
    restarting: float


def operations(estimate: Estimate, assumptions: Assumptions) -> Operations:
    """Return what a run of `assumptions.tokens` takes."""
    config, gpus = estimate.config, estimate.candidate.world_size
    without_second_moment = sum(matrix.elements for matrix in moved_matrices(config, estimate.stages))
    size = accounting.parameter_count(config.model) * CHECKPOINT_BYTES_PER_PARAMETER - 4 * without_second_moment
    write, stall = assumptions.write_seconds, assumptions.stall_seconds
    if write is None:
        write = size / assumptions.storage_bytes_per_second
    if stall is None:
        stall = size / gpus / HOST_COPY_BYTES_PER_SECOND if config.checkpoint.asynchronous else write
    failures_per_hour = assumptions.failures_per_gpu_hour * gpus
    advice = advise_saving(
        failures_per_hour=failures_per_hour, stall_seconds=stall, restart_seconds=assumptions.restart_seconds,
        write_seconds=write if config.checkpoint.asynchronous else 0.0,
    )  # fmt: skip
    steps = math.ceil(assumptions.tokens / (config.batch.global_batch_size * accounting.tokens_per_sample(config)))
    seconds = steps * estimate.step_seconds / advice.goodput if advice.goodput else math.inf
    watts = gpus * estimate.hardware.facts.watts * (1 + NODE_OVERHEAD_WATTS)
    return Operations(
        steps=steps,
        days=seconds / 86400,
        megawatt_hours=watts * seconds / 3.6e9,
        checkpoint_bytes=size,
        checkpoint_seconds=write,
        stall_seconds=stall,
        checkpoint_interval_seconds=advice.interval_seconds,
        checkpoint_interval_steps=max(1, int(min(steps, advice.interval_seconds / estimate.step_seconds))),
        failures=failures_per_hour / 3600 * seconds,
        goodput=advice.goodput,
        saving=advice.saving,
        lost_work=advice.lost_work,
        restarting=advice.restarting,
    )


_DRAW_SECONDS = {"cpu": 12e-9, "device": 0.4e-9}
"""For one element: measured on one core; on a device about forty passes over 8 bytes at 1 TB/s, not measured."""
_CIRCLE = 8
"""Ranks that are connected directly for checkpoints, as in `parallel/exchange.py`."""
_BYTES_A_PAIR, _BYTES_A_PAIR_AND_RANK = 699, 7.93
"""What gloo writes and reads in the store to connect N ranks with each other: (699 + 7.93 N) N^2, measured."""
_BYTES_A_BARRIER = 120
"""What a rank says when a group is made: every rank waits for all there."""


@dataclass(frozen=True)
class Starting:
    """The start of a run, as far as it follows from the layout."""

    drawn_elements: int
    """Of the rank that draws most; its slice alone."""
    drawing_seconds: float
    groups: int
    """Process groups that are made, one after the other."""
    store_bytes: int
    """Through rank 0's store."""
    connections: int
    """Of rank 0's store, and of the monitor beside it."""


def starting(estimate: Estimate, planner: Planner) -> Starting:
    """Return what the start of a layout costs."""
    c, config = estimate.candidate, estimate.config
    works = planner.works(c)
    parameters = []
    for rank in range(c.pipeline):
        stages = [estimate.stages[index] for index in c.stages_of(rank)]
        table = accounting.table_parameters(config.model) // c.tensor if any(stage.has_table for stage in stages) else 0
        parameters.append(table + sum(stage.parameters(config, works) for stage in stages))
    drawn = max(parameters)
    world = c.world_size
    groups = sum(world // size for size in (c.tensor, c.data, c.pipeline, c.tensor * c.pipeline))
    circles = world * _connected(_CIRCLE) / (_CIRCLE - 1) + groups * world * _BYTES_A_BARRIER
    is_cpu = estimate.hardware.name == "cpu"
    return Starting(drawn, drawn * _DRAW_SECONDS["cpu" if is_cpu else "device"], groups, int(circles), world)


def _connected(ranks: int) -> float:
    return (_BYTES_A_PAIR + _BYTES_A_PAIR_AND_RANK * ranks) * ranks**2


def starting_line(start: Starting) -> str:
    """Return one line for a report."""
    return (
        f"start: {start.drawn_elements / 1e6:,.0f} million elements drawn a rank, {start.drawing_seconds:.2g} s; "
        f"{start.groups:,} process groups, {start.store_bytes / 1e6:,.0f} MB through the store of rank 0, which has "
        f"{start.connections:,} connections"
    )
