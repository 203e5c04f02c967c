"""Runs that get stuck, simulated: programs of messages, hosts and devices that follow them, and one fault.

    gloo    a host waits in each message until the others have come; what it sends leaves it at once
    nccl    a host hands messages to its device and goes on, up to a number of them; it waits for the device at the end
            of a step. A device does one after the other; a message is done when the devices of all its ranks are there

Stacks are what a real dump shows of such a host. Knows nothing of how a verdict is found.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron_omega.config.layout import Layout
from megatron_omega.watchdog.diagnosis import Member, Standing
from megatron_omega.watchdog.ledger import UNKNOWN, Row
from megatron_omega.watchdog.stacks import Frame
from megatron_omega.watchdog.waits import ends

Kind = Literal["host", "stopped", "device"]
QUEUE = 24
"""Messages that a host may be ahead of its device."""
IN_MESSAGE = Frame("/x/torch/distributed/distributed_c10d.py", 3000, "all_reduce")
IN_DATA = Frame("/repo/megatron_omega/data/loader.py", 90, "take")
IN_A_LAYER = Frame("/repo/megatron_omega/model/feed_forward.py", 41, "forward")
BEFORE_DEVICE = Frame("/repo/megatron_omega/engine/engine.py", 120, "train_step")


@dataclass(frozen=True)
class Act:
    """One message of a program; the name "item" stands for waiting for the device."""

    name: str
    operation: str
    members: tuple[int, ...]


@dataclass
class Rank:
    """How far a rank has come."""

    program: list[Act]
    fault: Kind | None = None
    at: int = -1
    """Place of the fault in the program."""
    host: int = 0
    device: int = 0


def programs(layout: Layout, steps: int, micro_batches: int) -> list[list[Act]]:
    """Return what every rank does: pipeline transfers, sums in each layer, gradients, a norm."""
    return [list(_program(layout, rank, steps, micro_batches)) for rank in range(layout.world_size)]


def _program(layout: Layout, rank: int, steps: int, micro_batches: int) -> Iterator[Act]:
    tensor, data, pipeline = (layout.group_of(rank, axis) for axis in ("tensor", "data", "pipeline"))
    stage = pipeline.index(rank)
    before = pipeline[stage - 1] if stage else None
    after = pipeline[stage + 1] if stage + 1 < len(pipeline) else None

    def transfer(sender: int | None, receiver: int | None) -> Iterator[Act]:
        if sender is not None and receiver is not None:
            yield Act(f"0:{sender}>{receiver}", "send" if sender == rank else "recv", (sender, receiver))

    for _ in range(steps):
        for source, target in [(before, after)] * micro_batches + [(after, before)] * micro_batches:
            yield from transfer(source, rank)
            for _ in range(3 if len(tensor) > 1 else 0):
                yield Act(f"tensor {min(tensor)}", "allreduce", tensor)
            yield from transfer(rank, target)
        if len(data) > 1:
            yield Act(f"data {min(data)}", "reduce_scatter", data)
            yield Act(f"data {min(data)}", "allgather", data)
        yield Act("world", "allreduce", tuple(range(layout.world_size)))
        yield Act("item", "", (rank,))


@dataclass
class StuckRun:
    """A run of `layout` in which one rank has a fault at a random place; `standings` is what is found then."""

    layout: Layout
    backend: Literal["gloo", "nccl"]
    kind: Kind
    seed: int
    is_timed: bool = False
    """Whether a recorder says how far the devices are with messages of groups."""
    culprit: int = field(init=False)
    ranks: list[Rank] = field(init=False)

    def __post_init__(self) -> None:
        chance = random.Random(self.seed)
        self.ranks = [Rank(program) for program in programs(self.layout, 3, 4)]
        self.culprit = chance.randrange(self.layout.world_size)
        sick = self.ranks[self.culprit]
        sick.fault, sick.at = self.kind, chance.randrange(len(sick.program) // 3, len(sick.program) - 1)
        while any([self._advance(number, rank) for number, rank in enumerate(self.ranks)]):  # noqa: C419 - all of them
            pass

    def _advance(self, number: int, rank: Rank) -> bool:
        before = rank.host, rank.device
        self._advance_device(rank)
        is_held = rank.fault in ("host", "stopped") and rank.host >= rank.at
        if rank.host < len(rank.program) and not is_held:
            act = rank.program[rank.host]
            is_at_gate = act.name == "item" or self.backend == "gloo"
            has_room = rank.host - rank.device < (1 if is_at_gate else QUEUE)
            # a gloo host stands in its message: it has entered it, and leaves it when its "device" has done it
            if (act.name == "item" and rank.device == rank.host) or (act.name != "item" and has_room):
                rank.host += 1
                if act.name == "item":
                    rank.device += 1
        return (rank.host, rank.device) != before

    def _advance_device(self, rank: Rank) -> None:
        while rank.device < rank.host and not (rank.fault == "device" and rank.device >= rank.at):
            act = rank.program[rank.device]
            if act.name != "item" and not (self._leaves_at_once(act) or self._have_come(act, rank)):
                return
            rank.device += 1

    def _leaves_at_once(self, act: Act) -> bool:
        return self.backend == "gloo" and act.operation == "send"

    def _have_come(self, act: Act, rank: Rank) -> bool:
        number = _count(rank, act.name, rank.device + 1)
        return all(self._reached(self.ranks[other], act.name) >= number for other in act.members)

    def _reached(self, rank: Rank, name: str) -> int:
        """Return the messages of a name that a rank has begun."""
        is_ill = rank.fault == "device" and rank.device >= rank.at
        return _count(rank, name, min(rank.host, rank.device + (0 if is_ill else 1)))

    def standings(self) -> list[Standing]:
        """Return where all ranks stand."""
        return [self._standing(number, rank) for number, rank in enumerate(self.ranks)]

    def _standing(self, number: int, rank: Rank) -> Standing:
        member = Member(number, str(self.layout.coordinate(number)), f"n{number // 4}", 100 + number)
        is_sick = rank.fault in ("host", "stopped") and rank.host >= rank.at
        upcoming = rank.program[min(rank.host, len(rank.program) - 1)]
        frame = IN_DATA if is_sick else IN_MESSAGE
        at_device = self.backend == "nccl" and rank.device < rank.host and rank.fault != "stopped"
        if self.backend == "nccl" and not is_sick:
            frame = BEFORE_DEVICE if upcoming.name == "item" else IN_A_LAYER
        state = "T" if rank.fault == "stopped" and is_sick else "S"
        return Standing(member, "in a step", 3, 9.0, state, [frame], self._rows(rank), at_device)

    def _rows(self, rank: Rank) -> list[Row]:
        names = Counter(act.name for act in rank.program if act.name != "item")
        rows = []
        for name in names:
            count, done = _count(rank, name, rank.host), _count(rank, name, rank.device)
            operation = next((act.operation for act in reversed(rank.program[: rank.host]) if act.name == name), "")
            numbers = (self._reached(rank, name), done) if self.is_timed and not ends(name) else (UNKNOWN, UNKNOWN)
            rows.append(Row(name, operation, count, *numbers))
        upcoming = rank.program[rank.device] if rank.device < rank.host else None
        if self.is_timed and upcoming is not None and ends(upcoming.name):
            rows.append(Row("transfers", "", 0, 1, 0))
        return rows


def _count(rank: Rank, name: str, end: int) -> int:
    return sum(act.name == name for act in rank.program[:end])
