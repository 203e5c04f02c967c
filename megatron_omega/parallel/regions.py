"""Which elements of a global tensor a rank or a file holds, and how they get from one holder to another. Pure geometry.

A `Region` is a run of the row-major flattening of a box of the global tensor. The box is the whole tensor, or
[start, stop) along one axis (a tensor-parallel shard); the run is [first, first + count) of the flattened box (a ZeRO
partition, or one block of a file). To move elements between two regions both boxes are seen as matrices

    rows    = product of the extents before the sharded axis
    columns = the sharded axis and all after it, flattened

in which a box is a range of columns, so that an overlap is one strided block plus at most four ragged rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_WHOLE = (0, 0)


@dataclass(frozen=True)
class Region:
    """Elements [first, first + count) of the flattened box `shape` narrowed to [start, stop) along `axis`."""

    shape: tuple[int, ...]
    """Shape of the global tensor."""
    axis: int | None
    """Axis along which the box is narrowed; None: the box is the whole tensor."""
    start: int
    """First index of the box along `axis` (0 without an axis)."""
    stop: int
    """End (exclusive) of the box along `axis` (0 without an axis)."""
    first: int
    """Position of the first element in the flattened box."""
    count: int
    """Number of elements."""

    @property
    def box_shape(self) -> tuple[int, ...]:
        if self.axis is None:
            return self.shape
        return (*self.shape[: self.axis], self.stop - self.start, *self.shape[self.axis + 1 :])

    @property
    def is_whole_box(self) -> bool:
        return self.first == 0 and self.count == math.prod(self.box_shape)

    @property
    def box(self) -> tuple[int, int]:
        """The box along its axis; the same for every way to write the whole tensor."""
        return (
            _WHOLE if self.axis is None or self.stop - self.start == self.shape[self.axis] else (self.start, self.stop)
        )

    def part(self, offset: int, count: int) -> Region:
        """Return `count` elements of this region, from `offset` on."""
        assert offset >= 0, offset
        assert offset + count <= self.count, (offset, count, self)
        return Region(self.shape, self.axis, self.start, self.stop, self.first + offset, count)


def whole(shape: Sequence[int]) -> Region:
    """Return the region that is all of a tensor."""
    return Region(tuple(shape), None, 0, 0, 0, math.prod(shape))


def box_of(shape: Sequence[int], axis: int, start: int, stop: int) -> Region:
    """Return the region that is [start, stop) of a tensor along `axis`."""
    extent = (*shape[:axis], stop - start, *shape[axis + 1 :])
    return Region(tuple(shape), axis, start, stop, 0, math.prod(extent))


@dataclass(frozen=True)
class _Overlap:
    """Two regions as ranges of the same matrix."""

    columns: range
    source: _Band
    destination: _Band

    def rows(self) -> tuple[range, list[int]]:
        """Return the rows that both runs cover from end to end, and the others that both touch."""
        rows = _intersect(self.source.touched_rows, self.destination.touched_rows)
        block = _intersect(self.source.full_rows, self.destination.full_rows)
        if not block:
            return range(0), list(rows)
        return block, [*range(rows.start, block.start), *range(block.stop, rows.stop)]

    def span(self, row: int) -> range:
        """Return the columns of `row` that both runs cover."""
        return _intersect(self.source.columns_of(row), self.destination.columns_of(row))


@dataclass(frozen=True)
class _Band:
    """A region as a run through columns [left, right) of a matrix."""

    left: int
    right: int
    first: int
    end: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def touched_rows(self) -> range:
        return range(self.first // self.width, -(-self.end // self.width))

    @property
    def full_rows(self) -> range:
        return range(-(-self.first // self.width), self.end // self.width)

    def columns_of(self, row: int) -> range:
        """Return the columns of the matrix that this run covers in `row`."""
        begin = max(self.first - row * self.width, 0)
        end = min(self.end - row * self.width, self.width)
        return range(self.left + begin, self.left + end)

    def offset(self, row: int, column: int) -> int:
        """Position in the run of the element at (row, column)."""
        return row * self.width + column - self.left - self.first


def _band(region: Region, axis: int | None) -> _Band:
    end = region.first + region.count
    if axis is None:
        return _Band(0, math.prod(region.shape), region.first, end)
    left, right = (0, region.shape[axis]) if region.box == _WHOLE else region.box
    inner = math.prod(region.shape[axis + 1 :])
    return _Band(left * inner, right * inner, region.first, end)


def _common_axis(source: Region, destination: Region) -> int | None:
    axes = {region.axis for region in (source, destination) if region.box != _WHOLE}
    assert len(axes) <= 1, f"boxes along two axes {axes} of one tensor"
    return axes.pop() if axes else None


def _overlap(source: Region, destination: Region) -> _Overlap | None:
    axis = _common_axis(source, destination)
    bands = _band(source, axis), _band(destination, axis)
    columns = range(max(band.left for band in bands), min(band.right for band in bands))
    return _Overlap(columns, *bands) if columns and source.count and destination.count else None


def _intersect(first: range, second: range) -> range:
    start = max(first.start, second.start)
    return range(start, max(start, min(first.stop, second.stop)))


def overlaps(source: Region, destination: Region) -> bool:
    """Return whether the two regions (both of the same tensor) have elements in common."""
    overlap = _overlap(source, destination)
    if overlap is None:
        return False
    block, ragged = overlap.rows()
    return bool(block) or any(overlap.span(row) for row in ragged)


def offset_inside(source: Region, destination: Region) -> int | None:
    """Return where `source` begins in `destination` if it lies there whole and in one run, else None."""
    overlap = _overlap(source, destination)
    if overlap is None:
        return None
    mine, theirs = overlap.source, overlap.destination
    if mine.touched_rows == theirs.touched_rows == range(1):
        offset = (mine.left + mine.first) - (theirs.left + theirs.first)
    elif (mine.left, mine.right) == (theirs.left, theirs.right):
        offset = mine.first - theirs.first
    else:
        return None
    return offset if 0 <= offset <= destination.count - source.count else None


def copy_overlap(source: Tensor, source_region: Region, destination: Tensor, destination_region: Region) -> int:
    """Copy what both 1-D tensors hold of one global tensor; return the number of elements copied."""
    overlap = _overlap(source_region, destination_region)
    if overlap is None:
        return 0
    block, ragged = overlap.rows()
    return _copy_block(source, destination, overlap, block) + sum(
        _copy_row(source, destination, overlap, row) for row in ragged
    )


def _copy_block(source: Tensor, destination: Tensor, overlap: _Overlap, rows: range) -> int:
    if not rows:
        return 0
    left, right = overlap.columns.start, overlap.columns.stop

    def matrix(tensor: Tensor, band: _Band) -> Tensor:
        begin = band.offset(rows.start, band.left)
        bands = tensor[begin : begin + len(rows) * band.width].view(len(rows), band.width)
        return bands[:, left - band.left : right - band.left]

    matrix(destination, overlap.destination).copy_(matrix(source, overlap.source))
    return len(rows) * (right - left)


def _copy_row(source: Tensor, destination: Tensor, overlap: _Overlap, row: int) -> int:
    columns = overlap.span(row)
    begin, target = overlap.source.offset(row, columns.start), overlap.destination.offset(row, columns.start)
    destination[target : target + len(columns)].copy_(source[begin : begin + len(columns)])
    return len(columns)


@dataclass(frozen=True)
class Holding:
    """What one rank holds of one parameter."""

    name: str
    region: Region
    copy: int = 0
    """Several parameters of one rank may be the same canonical parameter: 0 for the first, 1 for the second."""


def find_gap(shape: Sequence[int], regions: Sequence[Region]) -> str | None:
    """Return None if `regions` hold every element of a tensor of `shape` exactly once, else what is wrong."""
    boxes: dict[tuple[int, int], list[Region]] = defaultdict(list)
    for region in regions:
        boxes[region.box].append(region)
    if len({region.axis for region in regions if region.box != _WHOLE}) > 1:
        return "slices along different axes"
    position = 0
    for box in sorted(boxes):
        if box[0] != position:
            return f"index {min(box[0], position)} of the sharded axis is held {_how_often(box[0], position)}"
        position = box[1]
        if (problem := _gap_in_box(boxes[box])) is not None:
            return problem
    axis = next((region.axis for region in regions if region.box != _WHOLE), None)
    if axis is not None and position != shape[axis]:
        return f"index {position} of the sharded axis is held nowhere"
    return None if regions else "it is held nowhere"


def _gap_in_box(regions: Sequence[Region]) -> str | None:
    end = 0
    for region in sorted(regions, key=lambda region: region.first):
        if region.first != end:
            return f"element {min(end, region.first)} is held {_how_often(region.first, end)}"
        end += region.count
    return None if end == math.prod(regions[0].box_shape) else f"element {end} is held nowhere"


def _how_often(next_held: int, expected: int) -> str:
    return "twice" if next_held < expected else "nowhere"
