"""Where this rank stands in the grid, and its process groups. `config/layout.py` has the grid itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from megatron_omega.config.layout import Axis, Coordinate, Layout
from megatron_omega.parallel import shared_memory
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
    timeout: timedelta | None = None
    """How long a message of a group may take, those that others create of it too; None: torch's own."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of this rank."""
        return self.tensor, self.data, self.pipeline, self.model

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
        handle = own_group(layout.groups(*axes), timeout) if dist.is_initialized() else None
        return Group(handle, ranks, ranks.index(rank))

    return Topology(
        layout, rank, group("tensor"), group("data"), group("pipeline"), group("pipeline", "tensor"), timeout
    )


def own_group(groups: Sequence[Sequence[int]], timeout: timedelta | None) -> dist.ProcessGroup | None:
    """Create disjoint groups, and return the one that this rank is in, if it is in one. Collective.

    Where the world's group is bound to a device, as DeepSpeed binds it on CUDA, all are one split of its communicator;
    made one after another, each would be a split of its own, in which all ranks meet.
    """
    world = dist.group.WORLD
    if world is not None and world.bound_device_id is not None:
        return dist.split_group(split_ranks=[list(ranks) for ranks in groups], timeout=timeout)
    handles = [(ranks, new_group(ranks, timeout)) for ranks in groups]
    return next((handle for ranks, handle in handles if dist.get_rank() in ranks), None)


def new_group(ranks: Sequence[int], timeout: timedelta | None) -> dist.ProcessGroup:
    """Create one group, through shared memory where `ranks` are CPUs of one host. Collective among all ranks."""
    is_on_cpus = dist.get_backend() == dist.Backend.GLOO and len(ranks) > 1
    if is_on_cpus:
        shared_memory.register()
    backend = shared_memory.BACKEND if is_on_cpus else None
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), timeout=timeout, backend=backend))
