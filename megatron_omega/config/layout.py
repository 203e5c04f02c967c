"""The grid pipeline x data x tensor of a run: pure geometry, known before a process starts.

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
from typing import Literal, NamedTuple

from megatron_omega.config.schema import ModelConfig, RunConfig

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

    def group_of(self, rank: int, *axes: Axis) -> tuple[int, ...]:
        """Return the ranks that differ from `rank` only along `axes`, ascending."""
        own = self.coordinate(rank)
        extents = {axis: range(getattr(self, axis)) if axis in axes else (getattr(own, axis),) for axis in AXES}
        return tuple(self.rank(Coordinate(*place)) for place in product(*(extents[axis] for axis in AXES)))

    def __str__(self) -> str:
        return f"PP {self.pipeline} x DP {self.data} x TP {self.tensor}"


def ranks_per_replica(config: RunConfig) -> int:
    """Return the processes that hold one replica of the model."""
    return config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """Return the layout of `world_size` processes, which are a multiple of `ranks_per_replica`."""
    parallel = config.parallel
    return Layout(
        parallel.pipeline_parallel_size, world_size // ranks_per_replica(config), parallel.tensor_parallel_size
    )


def reads_data(config: RunConfig, layout: Layout, rank: int) -> bool:
    """Return whether a rank needs the corpus: the first stage takes inputs, the one with the loss takes labels.

    The V of DualPipeV ends on the rank where it begins. Held-out prompts are answered by all ranks.
    """
    if config.evaluation.answers:
        return True
    loss = 0 if config.parallel.pipeline_schedule == "dualpipev" else layout.pipeline - 1
    return layout.coordinate(rank).pipeline in (0, loss)


def num_pipeline_layers(model: ModelConfig) -> int:
    """Return the entries of the layer list: embedding, encoder layers, bridge, decoder layers, head, output.

    A decoder-only model has no bridge.
    """
    return model.decoder_layers + 3 if model.is_decoder_only else model.encoder_layers + model.decoder_layers + 4


def num_stages(config: RunConfig) -> int:
    """Return the pieces the layer list is cut into: two for each rank of a V, as set when interleaved, or one."""
    parallel = config.parallel
    each = {"1f1b": 1, "interleaved": parallel.virtual_stages, "dualpipev": 2}[parallel.pipeline_schedule]
    return each * parallel.pipeline_parallel_size
