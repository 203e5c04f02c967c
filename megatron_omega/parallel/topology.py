"""Where every rank stands: the grid pipeline x data x tensor.

`Layout` is pure geometry. `Topology` adds this process's rank and its process groups. Nothing here knows of models.

Who uses which axis:

    axis      | ranks          | communicates
    ----------+----------------+---------------------------------------------------------------
    tensor    | adjacent       | sums of partial results in every layer; vocabulary-parallel loss
    data      | stride tp      | gradients (ZeRO), token counts of the losses
    pipeline  | stride tp * dp | hidden states and their gradients between neighbouring stages
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, cast

import torch.distributed as dist

from megatron_omega.parallel.mappings import TensorParallel

Axis = Literal["pipeline", "data", "tensor"]
AXES: tuple[Axis, ...] = ("pipeline", "data", "tensor")


class Coordinate(NamedTuple):
    """Position of one rank in the grid."""

    pipeline: int
    data: int
    tensor: int

    def __str__(self) -> str:
        return f"pp {self.pipeline}, dp {self.data}, tp {self.tensor}"


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes; ranks count tensor first, then data, then pipeline.

    >>> layout = Layout(pipeline=2, data=2, tensor=2)
    >>> layout.coordinate(5)
    Coordinate(pipeline=1, data=0, tensor=1)
    >>> layout.groups("pipeline")
    [(0, 4), (1, 5), (2, 6), (3, 7)]
    """

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    def coordinate(self, rank: int) -> Coordinate:
        """Return the position of `rank`."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline, data, tensor)

    def rank(self, coordinate: Coordinate) -> int:
        """Return the rank at `coordinate`; the inverse of `coordinate`."""
        return (coordinate.pipeline * self.data + coordinate.data) * self.tensor + coordinate.tensor

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """Return every group of ranks that differ only along `axes`, each ascending, in order of their first rank."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        fixed = [axis for axis in AXES if axis not in axes]
        free = [axis for axis in AXES if axis in axes]
        groups = []
        for outside in product(*(range(sizes[axis]) for axis in fixed)):
            inside = product(*(range(sizes[axis]) for axis in free))
            places = (dict(zip(fixed, outside, strict=True)) | dict(zip(free, place, strict=True)) for place in inside)
            groups.append(tuple(self.rank(Coordinate(**place)) for place in places))
        return groups

    def __str__(self) -> str:
        return f"PP {self.pipeline} x DP {self.data} x TP {self.tensor}"


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
