"""Any elements get from any holder to any other, exactly once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import cut, elements

from megatron_omega.parallel.regions import (
    Holding,
    Region,
    copy_overlap,
    find_gap,
    offset_inside,
    overlaps,
    share_writing,
    whole,
)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region], list[Region]]:
    """A tensor, cut up in two ways: boxes along one axis, each cut into runs."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = draw(st.integers(0, len(shape) - 1))

    def regions() -> list[Region]:
        if draw(st.booleans()):
            boxes = [Region(shape, None, 0, 0, 0, math.prod(shape))]
        else:
            bounds = [bound for bound in cut(shape[axis], draw(st.integers(1, 4))) if bound[0] < bound[1]]
            boxes = [Region(shape, axis, *bound, 0, 0) for bound in bounds]
        return [
            Region(shape, box.axis, box.start, box.stop, first, end - first)
            for box in boxes
            for first, end in cut(math.prod(box.box_shape), draw(st.integers(1, 4)))
            if first < end
        ]

    return shape, regions(), regions()


@settings(max_examples=150, deadline=None)
@given(partitions())
def test_every_partition_is_filled_from_every_other(case: tuple[tuple[int, ...], list[Region], list[Region]]) -> None:
    shape, sources, destinations = case
    full = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    for destination in destinations:
        found = torch.full((destination.count,), -1.0)
        copied = 0
        for source in sources:
            moved = copy_overlap(elements(full, source), source, found, destination)
            offset = offset_inside(source, destination)
            if offset is not None:
                assert moved == source.count
                assert torch.equal(found[offset : offset + source.count], elements(full, source))
            assert moved == 0 or overlaps(source, destination)
            copied += moved
        assert copied == destination.count
        assert torch.equal(found, elements(full, destination))


@settings(max_examples=100, deadline=None)
@given(partitions(), st.data())
def test_a_gap_or_a_repetition_is_found(
    case: tuple[tuple[int, ...], list[Region], list[Region]], data: st.DataObject
) -> None:
    shape, regions, _ = case
    assert find_gap(shape, regions) is None
    victim = data.draw(st.sampled_from(regions))
    assert find_gap(shape, [region for region in regions if region is not victim]) is not None
    assert find_gap(shape, [*regions, victim]) is not None


def test_boxes_along_two_axes_are_refused() -> None:
    along_rows, along_columns = Region((4, 4), 0, 0, 2, 0, 8), Region((4, 4), 1, 0, 2, 0, 8)
    assert find_gap((4, 4), [along_rows, along_columns]) == "slices along different axes"
    with pytest.raises(AssertionError):
        overlaps(along_rows, along_columns)


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
