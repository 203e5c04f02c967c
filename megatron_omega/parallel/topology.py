"""Where this rank stands in the grid, and its process groups. `config/layout.py` has the grid itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch.distributed as dist

from megatron_omega.config.layout import Coordinate, Layout
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


def create_topology(layout: Layout) -> Topology:
    """Create the process groups of `layout`. Collective: every rank calls it, in the same order.

    Without an initialised process group the layout must be a single process.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    assert layout.world_size == world_size, f"{layout} needs {layout.world_size} processes, found {world_size}"
    return Topology(
        layout=layout,
        rank=rank,
        tensor=_create_group(layout.groups("tensor"), rank),
        data=_create_group(layout.groups("data"), rank),
        pipeline=_create_group(layout.groups("pipeline"), rank),
        model=_create_group(layout.groups("pipeline", "tensor"), rank),
    )


def _create_group(groups: list[tuple[int, ...]], rank: int) -> Group:
    mine: Group | None = None
    for ranks in groups:
        handle = cast(dist.ProcessGroup, dist.new_group(list(ranks))) if dist.is_initialized() else None
        if rank in ranks:
            mine = Group(handle, ranks, ranks.index(rank))
    assert mine is not None, f"rank {rank} is in none of {groups}"
    return mine
