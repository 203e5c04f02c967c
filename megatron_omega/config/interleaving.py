"""The order of interleaved pipeline stages: which pass of which stage a rank computes when. Pure arithmetic.

The layer list is cut into ranks x chunks stages; rank r holds stages r, r + P, r + 2P, ... Micro-batches go in rounds
of about P: a rank takes a round through its first chunk, then through its second, and so on, so that the pipeline fills
after one chunk instead of one whole share of the layers (Megatron-LM, arXiv 2104.04473). One chunk is plain 1F1B.

Torch's own rule (torch.distributed.pipelining) wants rounds of equal size. Here they may differ by one, the larger
first: any number of micro-batches can be run, and where torch has an order it is the same.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

Direction = Literal["F", "B"]


class Pass(NamedTuple):
    """One forward ("F") or backward ("B") pass of one micro-batch through one stage."""

    direction: Direction
    stage: int
    micro_batch: int


class Interleaving(NamedTuple):
    """How many ranks share a pipeline, how many stages each of them holds, how many micro-batches go through."""

    ranks: int
    chunks: int
    micro_batches: int

    @property
    def num_stages(self) -> int:
        return self.ranks * self.chunks

    @property
    def rounds(self) -> list[range]:
        """Micro-batches of each round; sizes differ by at most one, the larger first."""
        count = max(1, self.micro_batches // self.ranks)
        size, larger = divmod(self.micro_batches, count)
        starts = [index * size + min(index, larger) for index in range(count + 1)]
        return [range(first, last) for first, last in pairwise(starts)]

    def warm_up(self, rank: int) -> int:
        """Return the forward passes of `rank` before its first pair of a forward and a backward pass."""
        behind = self.ranks - 1 - rank
        if self.chunks == 1:
            return min(behind, self.micro_batches)
        return min((self.chunks - 1) * len(self.rounds[0]) + 2 * behind, self.chunks * self.micro_batches)


def forward_order(shape: Interleaving, rank: int) -> list[Pass]:
    """Return the forward passes of `rank` in order: all there is to evaluation."""
    return [Pass("F", stage, one) for each in shape.rounds for stage in _stages(shape, rank) for one in each]


@lru_cache(maxsize=256)
def training_order(shape: Interleaving, rank: int) -> tuple[Pass, ...]:
    """Return all passes of `rank` in one optimizer step, in order.

    >>> [f"{p.direction}{p.stage}.{p.micro_batch}" for p in training_order(Interleaving(2, 2, 2), 1)]
    ['F1.0', 'F1.1', 'F3.0', 'B3.0', 'F3.1', 'B3.1', 'B1.0', 'B1.1']
    """
    forward = forward_order(shape, rank)
    backward = [Pass("B", stage, one) for each in shape.rounds for stage in _stages(shape, rank)[::-1] for one in each]
    ahead = shape.warm_up(rank)
    pairs = zip(forward[ahead:], backward, strict=False)
    return (*forward[:ahead], *(one for pair in pairs for one in pair), *backward[len(forward) - ahead :])


def _stages(shape: Interleaving, rank: int) -> range:
    return range(rank, shape.num_stages, shape.ranks)


def source(shape: Interleaving, task: Pass) -> Pass | None:
    """Return the pass whose result `task` takes in; None if it starts from data or from its own rank's loss."""
    stage = task.stage - 1 if task.direction == "F" else task.stage + 1
    return task._replace(stage=stage) if 0 <= stage < shape.num_stages else None


def target(shape: Interleaving, task: Pass) -> Pass | None:
    """Return the pass that takes in the result of `task`; None if nothing does."""
    stage = task.stage + 1 if task.direction == "F" else task.stage - 1
    return task._replace(stage=stage) if 0 <= stage < shape.num_stages else None


def fullest_moment(shape: Interleaving, rank: int) -> list[int]:
    """Return how many micro-batches each stage of `rank` holds between their two passes when it first holds most.

    That is after the forward pass behind the warm-up; from there on each forward pass follows a backward pass.
    """
    left = min(shape.warm_up(rank) + 1, shape.chunks * shape.micro_batches)
    held = [0] * shape.chunks
    for each in shape.rounds:
        for chunk in range(shape.chunks):
            taken = min(left, len(each))
            held[chunk] += taken
            left -= taken
    return held
