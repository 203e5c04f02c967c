"""What a start costs: drawing the first weights, and what ranks say to each other through rank 0's store."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_omega import accounting
from megatron_omega.planner.estimate import Estimate, Planner

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
