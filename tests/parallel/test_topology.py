from __future__ import annotations

import doctest
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron_omega.config.layout
import megatron_omega.host.environment
import megatron_omega.parallel.tensor_parallel
from megatron_omega.config.layout import AXES, Axis, Layout
from megatron_omega.parallel.tensor_parallel import TensorParallel

layouts = st.builds(Layout, *(st.integers(1, 6),) * 3)


@given(layouts)
def test_rank_and_coordinate_are_each_others_inverse(layout: Layout) -> None:
    coordinates = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert [layout.rank(place) for place in coordinates] == list(range(layout.world_size))
    assert len(set(coordinates)) == layout.world_size


@given(layouts, st.sets(st.sampled_from(AXES), min_size=1))
def test_groups_partition_the_ranks_and_differ_only_along_their_axes(layout: Layout, axes: set) -> None:
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    fixed = [axis for axis in AXES if axis not in axes]
    for group in groups:
        assert list(group) == sorted(group)
        assert len({tuple(getattr(layout.coordinate(rank), axis) for axis in fixed) for rank in group}) == 1


def test_tensor_parallel_ranks_are_adjacent() -> None:
    assert Layout(2, 2, 2).groups("tensor")[0] == (0, 1)


@given(st.integers(0, 1000), st.integers(1, 16))
def test_shards_cover_everything_once_and_evenly(total: int, size: int) -> None:
    shards = [TensorParallel(None, rank, size).shard(total) for rank in range(size)]
    assert shards[0][0] == 0 and shards[-1][1] == total
    assert all(left[1] == right[0] for left, right in pairwise(shards))
    lengths = {stop - start for start, stop in shards}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    "module",
    [megatron_omega.config.layout, megatron_omega.parallel.tensor_parallel, megatron_omega.host.environment],
)
def test_examples_in_docstrings(module: object) -> None:
    results = doctest.testmod(module)  # pyright: ignore[reportArgumentType]
    assert results.attempted > 0 and results.failed == 0


@given(layouts, st.data(), st.sets(st.sampled_from(AXES), min_size=1))
def test_a_ranks_group_is_the_one_that_holds_it(layout: Layout, data: st.DataObject, axes: set[Axis]) -> None:
    rank = data.draw(st.integers(0, layout.world_size - 1))
    (expected,) = [ranks for ranks in layout.groups(*axes) if rank in ranks]
    assert layout.group_of(rank, *axes) == expected
