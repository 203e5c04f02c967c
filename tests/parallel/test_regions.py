"""Any elements get from any holder to any other, exactly once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import cut, elements

from megatron_omega.parallel.regions import (
    Region,
    copy_overlap,
    find_gap,
    offset_inside,
    overlaps,
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


@settings(max_examples=150)
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


@settings(max_examples=100)
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
