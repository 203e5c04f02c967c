"""The virtual clock against DeepSpeed's own schedule classes, and against what is known of the schedules."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.planner.pipeline_schedule import (
    Compute,
    Schedule,
    bubble_fraction,
    execute,
    in_flight,
    instructions,
)


def _deepspeed_makespan(
    schedule: Schedule, stages: int, micro_batches: int, forward: Sequence[float], backward: Sequence[float]
) -> float:
    """Run DeepSpeed's instruction streams on a clock of the test's own: sends and receives meet, the later one decides.

    Under 1F1B every send and receive blocks by itself; under DualPipeV they are queued until CommitP2P.
    """
    from deepspeed.runtime.pipe import schedule as deepspeed_schedule

    is_v = schedule == "dualpipev"
    kind = deepspeed_schedule.DualPipeVSchedule if is_v else deepspeed_schedule.TrainSchedule
    streams = [deque(c for step in kind(micro_batches, stages, rank) for c in step) for rank in range(stages)]
    clocks = [0.0] * stages
    queues: list[list[tuple[Any, ...]]] = [[] for _ in range(stages)]
    posted: dict[tuple[Any, ...], dict[str, float]] = {}
    counters: dict[tuple[Any, ...], int] = {}

    def key(rank: int, command: Any) -> tuple[tuple[Any, ...], str]:
        name, phase = command.name, getattr(command, "phase", 0)
        way = "F" if name.endswith("Activation") else "B"
        downstream = (way == "F") == (phase == 0)
        side = "send" if name.startswith("Send") else "receive"
        other = rank + (1 if (side == "send") == downstream else -1)
        edge = (rank, other) if side == "send" else (other, rank)
        number = counters.get((rank, side, way, phase), 0)
        counters[rank, side, way, phase] = number + 1
        return (way, phase, edge, number), side

    def advance(rank: int) -> bool:
        moved = False
        while streams[rank]:
            command = streams[rank][0]
            if command.name in ("ForwardPass", "BackwardPass"):
                stage = rank if getattr(command, "phase", 0) == 0 else 2 * stages - 1 - rank
                clocks[rank] += (forward if command.name == "ForwardPass" else backward)[stage]
            elif command.name[:4] in ("Send", "Recv"):
                queues[rank].append(key(rank, command))
                if not is_v:
                    streams[rank][0] = deepspeed_schedule.CommitP2P()
                    moved = True
                    continue
            elif command.name == "CommitP2P" and queues[rank]:
                for message, side in queues[rank]:
                    posted.setdefault(message, {}).setdefault(side, clocks[rank])
                if any(len(posted[message]) < 2 for message, _ in queues[rank]):
                    return moved
                clocks[rank] = max(max(posted[message].values()) for message, _ in queues[rank])
                queues[rank].clear()
            streams[rank].popleft()
            moved = True
        return moved

    while any(streams):
        progress = [advance(rank) for rank in range(stages)]
        assert any(progress), "DeepSpeed's schedule does not end on this clock"
    return max(clocks)


@pytest.mark.parametrize("stages", range(1, 17))
def test_1f1b_takes_as_long_as_deepspeeds_own_schedule(stages: int) -> None:
    for micro_batches in (1, 2, 3, 5, 8, 16, 31, 64):
        ones, twos = [1.0] * stages, [2.0] * stages
        ours = execute(instructions("1f1b", stages, micro_batches), ones, twos)
        assert ours.makespan == _deepspeed_makespan("1f1b", stages, micro_batches, ones, twos)
        assert ours.makespan == 3 * (micro_batches + stages - 1)
        assert ours.idle_fraction == pytest.approx(bubble_fraction("1f1b", stages, micro_batches))


@pytest.mark.parametrize("stages", [2, 3, 4, 7, 8, 16])
def test_dualpipev_takes_as_long_as_deepspeeds_own_schedule(stages: int) -> None:
    for micro_batches in {2 * stages, 2 * stages + 1, 64} if stages < 16 else {2 * stages, 64}:
        forward, backward = [1.0] * (2 * stages), [2.0] * (2 * stages)
        ours = execute(instructions("dualpipev", stages, micro_batches), forward, backward)
        assert ours.makespan == _deepspeed_makespan("dualpipev", stages, micro_batches, forward, backward)


@given(data=st.data(), schedule=st.sampled_from(["1f1b", "dualpipev"]), stages=st.integers(2, 5))
@settings(max_examples=25)
def test_unequal_stages_too(data: st.DataObject, schedule: Schedule, stages: int) -> None:
    """DeepSpeed's 1F1B waits for its sends, too: ours is as fast or faster."""
    micro_batches = data.draw(st.integers(2 * stages, 3 * stages))
    pieces = 2 * stages if schedule == "dualpipev" else stages
    durations = st.lists(st.integers(1, 9).map(float), min_size=pieces, max_size=pieces)
    forward, backward = data.draw(durations), data.draw(durations)
    ours = execute(instructions(schedule, stages, micro_batches), forward, backward)
    theirs = _deepspeed_makespan(schedule, stages, micro_batches, forward, backward)
    assert ours.makespan <= theirs if schedule == "1f1b" else ours.makespan == theirs
    work = [forward[s] + backward[s] for s in range(pieces)]
    per_rank = work if schedule == "1f1b" else [work[r] + work[pieces - 1 - r] for r in range(stages)]
    assert ours.makespan >= micro_batches * max(per_rank)


@pytest.mark.parametrize(("schedule", "stages", "micro_batches"), [("1f1b", 4, 6), ("1f1b", 5, 2), ("dualpipev", 3, 7)])
def test_every_micro_batch_goes_forward_and_backward_once_through_every_stage(
    schedule: Schedule, stages: int, micro_batches: int
) -> None:
    pieces = 2 * stages if schedule == "dualpipev" else stages
    tasks = [i for rank in instructions(schedule, stages, micro_batches) for i in rank if isinstance(i, Compute)]
    assert sorted(tasks) == sorted(
        Compute(direction, s, m) for direction in ("F", "B") for s in range(pieces) for m in range(micro_batches)
    )


@pytest.mark.parametrize(("stages", "micro_batches"), [(4, 16), (8, 32), (8, 64)])
def test_the_v_wastes_less_than_1f1b(stages: int, micro_batches: int) -> None:
    assert bubble_fraction("dualpipev", stages, micro_batches) < bubble_fraction("1f1b", stages, micro_batches)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (4, 4), (8, 8), (8, 16), (8, 13), (16, 16)])
def test_more_stages_a_rank_waste_less(stages: int, micro_batches: int) -> None:
    idle = []
    for chunks in (1, 2, 4, 8):
        seconds = [1.0 / chunks] * (stages * chunks)
        schedule = instructions("interleaved", stages, micro_batches, chunks)
        idle.append(execute(schedule, seconds, [2 * each for each in seconds]).idle_fraction)
    assert idle[0] == pytest.approx(bubble_fraction("1f1b", stages, micro_batches))
    assert idle == sorted(idle, reverse=True)
    if micro_batches % stages == 0:  # Narayanan et al. 2021: the ramp is one chunk long instead of one rank's share
        for chunks, found in zip((1, 2, 4, 8), idle, strict=True):
            ramp = (stages - 1) / chunks
            assert found == pytest.approx(ramp / (micro_batches + ramp))


def test_interleaved_messages_travel_while_ranks_compute() -> None:
    """A transfer that is shorter than a pass costs something while the pipeline fills and empties only."""
    stages, chunks, micro_batches = 4, 2, 16
    forward, backward = [1.0] * (stages * chunks), [2.0] * (stages * chunks)
    schedule = instructions("interleaved", stages, micro_batches, chunks)
    fast = execute(schedule, forward, backward)
    slow = execute(schedule, forward, backward, transfer_seconds=[0.5] * (stages * chunks - 1))
    assert fast.makespan < slow.makespan < fast.makespan + 0.5 * 4 * stages * chunks


def test_activations_in_flight() -> None:
    assert [in_flight("1f1b", 4, 16, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight("1f1b", 4, 2, 0) == 2
    assert [in_flight("dualpipev", 4, 16, stage) for stage in range(8)] == [8, 7, 6, 5, 4, 3, 2, 1]


def test_transfers_lengthen_the_step() -> None:
    schedule = instructions("1f1b", 4, 8)
    fast = execute(schedule, [1.0] * 4, [2.0] * 4)
    slow = execute(schedule, [1.0] * 4, [2.0] * 4, transfer_seconds=[0.1, 0.1, 0.1])
    assert fast.makespan < slow.makespan < fast.makespan + 4 * 0.1 * (8 + 4)
    assert slow.idle_fraction > fast.idle_fraction


def test_ranks_that_wait_in_a_circle_are_an_error() -> None:
    schedule = list(instructions("1f1b", 2, 1))
    schedule[1] = schedule[1][:-1]  # stage 1 never sends its gradient
    with pytest.raises(ValueError, match="circle"):
        execute(schedule, [1.0, 1.0], [1.0, 1.0])


def test_dualpipev_needs_two_micro_batches_for_each_rank() -> None:
    with pytest.raises(ValueError, match="at least 8"):
        instructions("dualpipev", 4, 7)
