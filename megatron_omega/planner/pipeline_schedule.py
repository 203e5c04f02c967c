"""Pipeline schedules on a virtual clock: who computes what when, where ranks wait, and how much time that costs.

A schedule is, for every rank, a list of computations and exchanges in the order in which the engine issues them:
1F1B and interleaved stages as our own engine runs them (nobody waits for a send, and what is received travels
meanwhile), DualPipeV as DeepSpeed's DualPipeVSchedule (sends and receives are queued and committed together). Durations
are arguments; nothing here knows what a stage is made of.

Stages count along the model: 0 .. P-1 for 1F1B; 0 .. 2P-1 for DualPipeV, where rank r holds r and 2P-1-r; 0 .. vP-1 for
v interleaved stages a rank, where rank r holds r, r + P, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from megatron_omega.config.interleaving import Direction, Interleaving, Pass, source, target, training_order

Schedule = Literal["1f1b", "interleaved", "dualpipev"]
Compute = Pass


class Transfer(NamedTuple):
    """What `sender` computed travels one stage on: activations ("F") or gradients ("B")."""

    direction: Direction
    sender: int
    micro_batch: int


Exchange = tuple[Transfer, ...]
"""Transfers a rank starts together and waits for."""


class Send(NamedTuple):
    """A transfer its sender starts and does not wait for."""

    transfer: Transfer


class Receive(NamedTuple):
    """A transfer that travels by itself; its receiver waits until it has arrived."""

    transfer: Transfer


Instruction = Compute | Exchange | Send | Receive


class Interval(NamedTuple):
    """A computation, with its place on the clock (seconds)."""

    task: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """An executed schedule."""

    ranks: tuple[tuple[Interval, ...], ...]
    """What each rank computes, in order."""
    makespan: float
    """Seconds from the first instruction to the end of the last."""

    @property
    def idle_fraction(self) -> float:
        """Share of all ranks' time in which they compute nothing: the bubble."""
        busy = sum(interval.end - interval.start for rank in self.ranks for interval in rank)
        return 1 - busy / (len(self.ranks) * self.makespan)


def bubble_fraction(schedule: Schedule, stages: int, micro_batches: int) -> float:
    """Return the idle share with equal stages, no transfer time and a backward pass of twice the forward's length.

    1F1B in closed form, (p - 1) / (m + p - 1); DualPipeV on the virtual clock.
    """
    if schedule == "1f1b":
        return (stages - 1) / (micro_batches + stages - 1)
    pieces = 2 * stages
    return execute(instructions(schedule, stages, micro_batches), [1.0] * pieces, [2.0] * pieces).idle_fraction


def in_flight(schedule: Schedule, stages: int, micro_batches: int, stage: int) -> int:
    """Return the most micro-batches whose activations `stage` holds at once."""
    if schedule == "1f1b":
        return min(stages - stage, micro_batches)
    most = held = 0
    rank = stage if stage < stages else 2 * stages - 1 - stage
    for instruction in instructions(schedule, stages, micro_batches)[rank]:
        if isinstance(instruction, Compute) and instruction.stage == stage:
            held += 1 if instruction.direction == "F" else -1
            most = max(most, held)
    return most


@lru_cache(maxsize=64)
def instructions(
    schedule: Schedule, stages: int, micro_batches: int, virtual_stages: int = 1
) -> tuple[tuple[Instruction, ...], ...]:
    """Return every rank's instructions for one optimizer step."""
    if schedule == "dualpipev":
        if micro_batches < 2 * stages:
            raise ValueError(f"DualPipeV over {stages} ranks needs at least {2 * stages} micro-batches")
        return tuple(tuple(_DualPipeVRank(stages, micro_batches, rank).instructions()) for rank in range(stages))
    shape = Interleaving(stages, virtual_stages, micro_batches)
    return tuple(tuple(_in_turns(shape, rank)) for rank in range(stages))


def _in_turns(shape: Interleaving, rank: int) -> Iterator[Instruction]:
    for task in training_order(shape, rank):
        origin, goal = source(shape, task), target(shape, task)
        if origin is not None:
            yield Receive(Transfer(task.direction, origin.stage, task.micro_batch))
        yield task
        if goal is not None:
            yield Send(Transfer(task.direction, task.stage, task.micro_batch))


class _DualPipeVRank:
    """Generates one rank's instructions of DualPipeV (arXiv 2412.19437, the V of its authors' repository).

    Phase 0 flows from rank 0 to the last, phase 1 back. Transfers are queued; `_commit` starts them and waits.
    """

    def __init__(self, ranks: int, micro_batches: int, rank: int) -> None:
        self.ranks, self.micro_batches, self.rank = ranks, micro_batches, rank
        self._queue: list[Transfer] = []
        self._counts: dict[tuple[str, int], int] = {}

    def instructions(self) -> Iterator[Instruction]:
        ranks, rank = self.ranks, self.rank
        is_last = rank == ranks - 1
        behind = ranks - rank - 1
        for _ in range(2 * behind):  # fill phase 0
            yield from self._forward(0)
        self._receive("F", 0)
        for index in range(rank + 1):  # fill both phases
            yield from self._forward(0, receive=False, send=False)
            self._receive("F", 0)
            yield from self._forward(1, send=not is_last or index < rank)
            self._send("F", 0)
        for _ in range(behind):
            yield from self._backward(1)
            self._receive("F", 1)
            yield from self._commit()
            yield from self._forward(1, receive=False)
        for index in range(self.micro_batches - 2 * ranks + rank + 1):  # steady state
            yield from self._turn_around() if index == 0 and is_last else self._both(0, 1, receive=index > 0)
            yield from self._both(1, 0)
        for _ in range(behind):  # drain
            yield from self._backward(1)
            yield from self._both(1, 0)
        for _ in range(rank + 1):
            yield from self._backward(1)
            yield from self._backward(0)
        for _ in range(behind):
            yield from self._commit()
            yield from self._backward(0)
        yield from self._commit()

    def _turn_around(self) -> Iterator[Instruction]:
        yield from self._forward(0, receive=False, send=False)
        self._send("F", 1)
        yield from self._backward(1, send=False)
        self._send("F", 0)
        self._send("B", 1)

    def _forward(self, phase: int, *, receive: bool = True, send: bool = True) -> Iterator[Instruction]:
        if receive:
            self._receive("F", phase)
        yield from self._commit()
        yield self._task("F", phase)
        if send:
            self._send("F", phase)

    def _backward(self, phase: int, *, send: bool = True) -> Iterator[Instruction]:
        self._receive("B", phase)
        yield from self._commit()
        yield self._task("B", phase)
        if send:
            self._send("B", phase)

    def _both(self, forward: int, backward: int, *, receive: bool = True) -> Iterator[Instruction]:
        if receive:
            self._receive("F", forward)
        self._receive("B", backward)
        yield from self._commit()
        yield self._task("F", forward)
        yield self._task("B", backward)
        self._send("F", forward)
        self._send("B", backward)

    def _stage(self, phase: int) -> int:
        return self.rank if phase == 0 else 2 * self.ranks - 1 - self.rank

    def _next(self, what: str, phase: int) -> int:
        count = self._counts.get((what, phase), 0)
        self._counts[what, phase] = count + 1
        return count

    def _task(self, direction: Direction, phase: int) -> Compute:
        return Compute(direction, self._stage(phase), self._next(direction, phase))

    def _crosses_ranks(self, sender: int, receiver: int) -> bool:
        return (
            min(sender, receiver) >= 0
            and max(sender, receiver) < 2 * self.ranks
            and sender + receiver != 2 * self.ranks - 1
        )

    def _receive(self, direction: Direction, phase: int) -> None:
        stage = self._stage(phase)
        sender = stage - 1 if direction == "F" else stage + 1
        if self._crosses_ranks(sender, stage):
            self._queue.append(Transfer(direction, sender, self._next(f"receive {direction}", phase)))

    def _send(self, direction: Direction, phase: int) -> None:
        stage = self._stage(phase)
        receiver = stage + 1 if direction == "F" else stage - 1
        if self._crosses_ranks(stage, receiver):
            self._queue.append(Transfer(direction, stage, self._next(f"send {direction}", phase)))

    def _commit(self) -> Iterator[Instruction]:
        if self._queue:
            yield tuple(self._queue)
            self._queue.clear()


def execute(
    schedule: Sequence[Sequence[Instruction]],
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    transfer_seconds: Sequence[float] | None = None,
) -> Timeline:
    """Run `schedule` on a virtual clock; durations are per stage.

    An exchange begins when both sides have reached it; both wait for its end. What is sent begins when its sender has
    reached it and what was sent the same way before has arrived. `transfer_seconds[i]` is how long one between stages i
    and i + 1 lasts (default: no time). Raises ValueError if the ranks wait for each other in a circle.
    """
    clocks = _Clocks(len(schedule), {"F": forward_seconds, "B": backward_seconds}, transfer_seconds)
    places = [0] * len(schedule)
    while clocks.runnable:
        rank = clocks.runnable.pop()
        while places[rank] < len(schedule[rank]):
            awaited = clocks.advance(rank, schedule[rank][places[rank]])
            if awaited is not None:
                clocks.waiting[awaited] = rank
                break
            places[rank] += 1
    if any(place < len(mine) for place, mine in zip(places, schedule, strict=True)):
        raise ValueError("the ranks of this schedule wait for each other in a circle")
    return Timeline(tuple(map(tuple, clocks.intervals)), max(clocks.now))


class _Clocks:
    """The clock of every rank, and who waits for what."""

    def __init__(
        self, ranks: int, seconds: Mapping[Direction, Sequence[float]], transfer_seconds: Sequence[float] | None
    ) -> None:
        self.now = [0.0] * ranks
        self.intervals: list[list[Interval]] = [[] for _ in range(ranks)]
        self.runnable = list(range(ranks))
        self.waiting: dict[Transfer, int] = {}
        self._seconds, self._transfer_seconds = seconds, transfer_seconds
        self._travelling = _Travelling(ranks, transfer_seconds)
        self._sides: dict[Transfer, dict[int, float]] = {}

    def advance(self, rank: int, instruction: Instruction) -> Transfer | None:
        """Do one instruction of `rank`; return the transfer it has to wait for if it cannot be done yet."""
        if isinstance(instruction, Compute):
            start = self.now[rank]
            self.now[rank] = start + self._seconds[instruction.direction][instruction.stage]
            self.intervals[rank].append(Interval(instruction, start, self.now[rank]))
            return None
        if isinstance(instruction, Send):
            self._travelling.start(rank, instruction.transfer, self.now[rank])
            self._wake(instruction.transfer)
            return None
        if isinstance(instruction, Receive):
            arrival = self._travelling.arrivals.get(instruction.transfer)
            if arrival is None:
                return instruction.transfer
            self.now[rank] = max(self.now[rank], arrival)
            return None
        return self._exchange(rank, instruction)

    def _exchange(self, rank: int, transfers: tuple[Transfer, ...]) -> Transfer | None:
        for transfer in transfers:
            sides = self._sides.setdefault(transfer, {})
            if rank not in sides:
                sides[rank] = self.now[rank]
                self._wake(transfer)
        missing = next((transfer for transfer in transfers if len(self._sides[transfer]) < 2), None)
        if missing is None:
            lasts = max(_lasts(transfer, self._transfer_seconds) for transfer in transfers)
            self.now[rank] = max(max(self._sides[transfer].values()) for transfer in transfers) + lasts
        return missing

    def _wake(self, transfer: Transfer) -> None:
        if (partner := self.waiting.pop(transfer, None)) is not None:
            self.runnable.append(partner)


class _Travelling:
    """Transfers that nobody waits for: one after the other in each direction between two ranks."""

    def __init__(self, ranks: int, seconds: Sequence[float] | None) -> None:
        self.ranks, self.seconds = ranks, seconds
        self.arrivals: dict[Transfer, float] = {}
        self._free: dict[tuple[int, int], float] = {}

    def start(self, rank: int, transfer: Transfer, now: float) -> None:
        goal = transfer.sender + (1 if transfer.direction == "F" else -1)
        way = rank, goal % self.ranks
        self._free[way] = max(now, self._free.get(way, 0.0)) + _lasts(transfer, self.seconds)
        self.arrivals[transfer] = self._free[way]


def _lasts(transfer: Transfer, seconds: Sequence[float] | None) -> float:
    if seconds is None:
        return 0.0
    return seconds[transfer.sender if transfer.direction == "F" else transfer.sender - 1]
