"""The order of interleaved stages: torch's where torch has one, complete and free of circles everywhere."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.config.interleaving import Interleaving, Pass, fullest_moment, source, target, training_order
from megatron_omega.planner.pipeline_schedule import execute, instructions

shapes = st.builds(Interleaving, st.integers(2, 16), st.integers(1, 8), st.integers(1, 70))


def _torch_order(shape: Interleaving, rank: int) -> list[Pass]:
    """Return the order of torch.distributed.pipelining, without building stages."""
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, _ComputationType

    schedule = object.__new__(ScheduleInterleaved1F1B)
    schedule.pp_group_size, schedule.n_local_stages = shape.ranks, shape.chunks
    schedule._n_microbatches = shape.micro_batches
    schedule.number_of_rounds = max(1, shape.micro_batches // shape.ranks)
    schedule.microbatches_per_round = shape.micro_batches // schedule.number_of_rounds
    actions = [action for action in schedule._calculate_single_rank_operations(rank) if action is not None]
    ways = {_ComputationType.FORWARD: "F", _ComputationType.FULL_BACKWARD: "B"}
    return [Pass(ways[a.computation_type], a.stage_index, a.microbatch_index) for a in actions]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("ranks", range(2, 17))
def test_the_order_is_torchs(ranks: int) -> None:
    for chunks in range(2, 9):
        for micro_batches in sorted({1, 2, ranks - 1, ranks, ranks + 1, 2 * ranks, 2 * ranks + 2, 3 * ranks, 64}):
            if micro_batches % max(1, micro_batches // ranks):
                continue  # torch refuses it
            shape = Interleaving(ranks, chunks, micro_batches)
            for rank in {0, 1, ranks // 2, ranks - 1}:
                assert list(training_order(shape, rank)) == _torch_order(shape, rank), (shape, rank)


@given(shape=shapes)
@settings(max_examples=60)
def test_every_pass_runs_once_forward_before_backward(shape: Interleaving) -> None:
    for rank in range(shape.ranks):
        order = training_order(shape, rank)
        assert len(order) == len(set(order)) == 2 * shape.chunks * shape.micro_batches
        places = {task: place for place, task in enumerate(order)}
        assert all(places[task] < places[task._replace(direction="B")] for task in order if task.direction == "F")


@given(shape=shapes)
@settings(max_examples=60)
def test_no_circle_when_messages_arrive_in_the_order_they_are_sent(shape: Interleaving) -> None:
    """Nobody waits for a send; a rank takes from a channel only what is at its front, in the sender's order."""
    orders = [deque(training_order(shape, rank)) for rank in range(shape.ranks)]
    channels: dict[tuple[int, int], deque[Pass]] = {}
    arrived: list[set[Pass]] = [set() for _ in orders]
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while order and _can_run(shape, rank, order[0], channels, arrived[rank]):
                task, moved = order.popleft(), True
                goal = target(shape, task)
                if goal is not None:
                    channels.setdefault((rank, goal.stage % shape.ranks), deque()).append(goal)
    assert not any(orders), f"{shape}: ranks wait for each other"
    assert not any(channels.values())


def _can_run(
    shape: Interleaving, rank: int, task: Pass, channels: dict[tuple[int, int], deque[Pass]], arrived: set[Pass]
) -> bool:
    origin = source(shape, task)
    if origin is None:
        return True
    channel = channels.get((origin.stage % shape.ranks, rank), deque())
    while channel and task not in arrived:
        arrived.add(channel.popleft())
    return task in arrived


@given(shape=shapes)
@settings(max_examples=40)
def test_the_virtual_clock_ends(shape: Interleaving) -> None:
    stages = shape.num_stages
    schedule = instructions("interleaved", shape.ranks, shape.micro_batches, shape.chunks)
    ended = execute(schedule, [1.0] * stages, [2.0] * stages, [0.1] * (stages - 1))
    assert ended.makespan >= 3 * shape.chunks * shape.micro_batches


def test_one_stage_a_rank_is_1f1b() -> None:
    for rank in range(4):
        order = training_order(Interleaving(4, 1, 8), rank)
        assert [task.direction for task in order[: 4 - rank]] == ["F"] * (4 - rank)
        assert fullest_moment(Interleaving(4, 1, 8), rank) == [4 - rank]


@given(shape=shapes)
@settings(max_examples=40)
def test_no_more_is_in_flight_than_at_the_fullest_moment(shape: Interleaving) -> None:
    for rank in {0, shape.ranks - 1}:
        held, most = 0, 0
        for task in training_order(shape, rank):
            held += 1 if task.direction == "F" else -1
            most = max(most, held)
        assert sum(fullest_moment(shape, rank)) == most


def test_what_is_in_flight_at_the_fullest_moment() -> None:
    """Rank 0 of 8 with 8 stages holds 1.11 of what it holds under 1F1B; without interleaving 8 micro-batches."""
    assert fullest_moment(Interleaving(8, 1, 16), 0) == [8]
    assert sum(fullest_moment(Interleaving(8, 8, 16), 0)) / 8 == pytest.approx(8.875)
    assert sum(fullest_moment(Interleaving(8, 8, 16), 7)) == 57
