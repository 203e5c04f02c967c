"""Where this rank stands in the grid, and its process groups. `config/layout.py` has the grid itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from megatron_omega.config.layout import Axis, Coordinate, Layout
from megatron_omega.parallel.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class Group:
    """One process group this rank belongs to. `handle` is None in a single process."""

    handle: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    rank: int
    """Position of this process inside the group."""

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Topology:
    """A layout, seen from one rank, with its process groups."""

    layout: Layout
    rank: int
    tensor: Group
    data: Group
    pipeline: Group
    model: Group
    """Tensor x pipeline: the ranks that hold one replica."""

    @property
    def coordinate(self) -> Coordinate:
        return self.layout.coordinate(self.rank)

    def tensor_parallel(self, *, sequence_parallel: bool = False) -> TensorParallel:
        """Return the handle that layers take to communicate along the tensor axis."""
        return TensorParallel(self.tensor.handle, self.tensor.rank, self.tensor.size, sequence_parallel)


def create_topology(layout: Layout, *, timeout: timedelta | None = None) -> Topology:
    """Create the process groups of `layout` that this rank is in. Collective: every rank calls it, in the same order.

    Without an initialised process group the layout must be a single process. `timeout` holds for their messages.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    assert layout.world_size == world_size, f"{layout} needs {layout.world_size} processes, found {world_size}"

    def group(*axes: Axis) -> Group:
        ranks = layout.group_of(rank, *axes)
        handles = {each: _create_group(each, timeout) for each in layout.groups(*axes)} if dist.is_initialized() else {}
        return Group(handles.get(ranks), ranks, ranks.index(rank))

    return Topology(layout, rank, group("tensor"), group("data"), group("pipeline"), group("pipeline", "tensor"))


def _create_group(ranks: Sequence[int], timeout: timedelta | None) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), timeout=timeout))
