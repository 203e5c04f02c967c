"""Ranks share the writing of a checkpoint: every element once, the load even."""

from __future__ import annotations

import math

import pytest
from parts import cut

from megatron_omega.checkpoint.sharing import share_writing
from megatron_omega.parallel.regions import Holding, Region, find_gap, whole


def written(held: list[list[Holding]], replicas: list[int]) -> tuple[dict[str, list[Region]], list[int]]:
    regions: dict[str, list[Region]] = {}
    loads = []
    for rank, duties in enumerate(share_writing(held, replicas)):
        loads.append(sum(duty.count for duty in duties))
        for duty in duties:
            holding = held[rank][duty.holding]
            regions.setdefault(holding.name, []).append(holding.region.part(duty.offset, duty.count))
    return regions, loads


@pytest.mark.parametrize(
    ("tensor", "data", "sharded_optimizer"), [(1, 1, True), (2, 3, True), (3, 2, False), (1, 4, False)]
)
def test_every_element_is_written_once(tensor: int, data: int, sharded_optimizer: bool) -> None:
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "table": ((40, 4), 0),
        "down": ((4, 9), 1),
        "norm": ((64,), None),
    }
    held: list[list[Holding]] = []
    for rank in range(tensor * data):
        mine = []
        for name, (shape, axis) in shapes.items():
            bounds = (0, 0) if axis is None else cut(shape[axis], tensor)[rank % tensor]
            count = math.prod(Region(shape, axis, *bounds, 0, 0).box_shape)
            first, end = cut(count, data)[rank // tensor] if sharded_optimizer else (0, count)
            mine.append(Holding(name, Region(shape, axis, *bounds, first, end - first)))
        held.append(mine)
    regions, loads = written(held, [rank % tensor for rank in range(tensor * data)])
    for name, (shape, _) in shapes.items():
        assert find_gap(shape, regions[name]) is None
    assert max(loads) <= 1.5 * sum(loads) / len(loads)


def test_a_table_on_two_stages_is_written_by_the_one_with_less_to_do() -> None:
    table, layer = Holding("table", whole((8, 4))), Holding("layer", whole((64, 4)))
    regions, loads = written([[table, layer], [table]], [0, 1])
    assert find_gap((8, 4), regions["table"]) is None
    assert loads == [256, 32]


def test_two_copies_on_one_rank_are_written_once() -> None:
    halves = [[Holding("table", whole((8, 4)).part(16 * rank, 16), copy) for copy in (0, 1)] for rank in (0, 1)]
    regions, _ = written(halves, [0, 0])
    assert find_gap((8, 4), regions["table"]) is None
