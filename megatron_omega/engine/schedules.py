"""Interleaved pipeline stages as one rank carries them out: its passes, and what comes from and goes to which rank.

Pure data, from the order in config/interleaving.py, for the engine in engine/pipeline.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_omega.config.interleaving import Interleaving, Pass, forward_order, source, target, training_order


class Kind(NamedTuple):
    """What all micro-batches send alike: what the passes of one direction through one stage take in."""

    direction: str
    stage: int


def kind_of(task: Pass) -> Kind:
    return Kind(task.direction, task.stage)


@dataclass(frozen=True)
class Delivery:
    """A message: what one rank's pass gives to another's."""

    rank: int
    """The rank at the other end."""
    task: Pass
    """The pass that takes it in; the name of the message."""
    place: int
    """Place of the other end's pass among the passes of its rank."""


@dataclass(frozen=True)
class RankSchedule:
    """All of one rank for one optimizer step, or for an evaluation."""

    shape: Interleaving
    rank: int
    is_training: bool
    passes: tuple[Pass, ...]
    arrivals: Mapping[Pass, Delivery]
    """By the pass that takes it in."""
    departures: Mapping[Pass, Delivery]
    """By the pass that gives it."""

    def expected(self, sender: int) -> list[Pass]:
        """Return what `sender` sends, in the order in which it does."""
        found = [each for each in self.arrivals.values() if each.rank == sender]
        return [each.task for each in sorted(found, key=lambda each: each.place)]

    @property
    def senders(self) -> list[int]:
        return sorted({each.rank for each in self.arrivals.values()})

    def chunk(self, task: Pass) -> int:
        """Return which of this rank's stages `task` runs through."""
        return task.stage // self.shape.ranks

    def buffer(self, task: Pass) -> int:
        """Return where the engine keeps what forward and backward pass of a micro-batch share."""
        return self.chunk(task) * self.shape.micro_batches + task.micro_batch

    @property
    def num_buffers(self) -> int:
        return self.shape.chunks * self.shape.micro_batches

    @property
    def most_on_their_way(self) -> int:
        """Messages to one rank that may be under way in an evaluation: more than a round, so that none waits for it."""
        return 2 * len(self.shape.rounds[0])


def rank_schedule(shape: Interleaving, rank: int, *, is_training: bool) -> RankSchedule:
    """Return what `rank` does in a step (`is_training`) or an evaluation over `shape`."""

    def order(of: int) -> Sequence[Pass]:
        return training_order(shape, of) if is_training else forward_order(shape, of)

    mine = tuple(order(rank))
    neighbours = {(rank - 1) % shape.ranks, (rank + 1) % shape.ranks} - {rank}
    places = {(each, task): place for each in neighbours for place, task in enumerate(order(each))}
    arrivals, departures = {}, {}
    for task in mine:
        origin, goal = source(shape, task), target(shape, task)
        if origin is not None:
            sender = origin.stage % shape.ranks
            arrivals[task] = Delivery(sender, task, places[sender, origin])
        if goal is not None:
            receiver = goal.stage % shape.ranks
            departures[task] = Delivery(receiver, goal, places[receiver, goal])
    return RankSchedule(shape, rank, is_training, mine, arrivals, departures)
