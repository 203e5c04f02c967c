"""A diagnosis names the cause, not its echoes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_omega.watchdog.diagnosis import (
    Failure,
    Member,
    Standing,
    diagnose_absence,
    diagnose_failure,
    diagnose_hang,
    diagnose_refusal,
    disagreements,
    rank_ranges,
)
from megatron_omega.watchdog.stacks import Frame, caller_of, collective_of, main_thread


def member(rank: int) -> Member:
    return Member(rank, f"pp {rank // 4}, dp {rank // 2 % 2}, tp {rank % 2}", "n1", 100 + rank)


ECHO = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:12345"


@given(st.permutations(range(8)), st.integers(0, 7))
def test_the_cause_is_named_wherever_it_arrives_among_its_echoes(order: Sequence[int], cause: int) -> None:
    failures = [
        Failure(member(rank), "in a step", "boom", "ValueError", "Traceback ...\nValueError: boom", 1)
        if rank == cause
        else Failure(member(rank), "in a step", ECHO, "RuntimeError", "Traceback ...", 1)
        for rank in order
    ]
    diagnosis = diagnose_failure(failures)
    assert diagnosis.lines == (f"error: {member(cause)} failed while in a step: ValueError: boom",)
    assert diagnosis.code == 1 and diagnosis.trace.count("Traceback") == 1


def test_a_rank_that_is_gone_goes_before_those_that_lost_its_connection() -> None:
    echo = Failure(member(1), "in a step", ECHO, "RuntimeError", "Traceback ...", 1)
    diagnosis = diagnose_failure([echo, Failure(member(5), "saving", code=137)])
    assert diagnosis.code == 137 and diagnosis.lines[0].startswith("error: rank 5 (pp 1, dp 0, tp 1) on n1 is gone")


def test_with_echoes_alone_the_first_is_told() -> None:
    echoes = [Failure(member(rank), "in a step", ECHO, "RuntimeError", "T", 1) for rank in (3, 1)]
    assert "rank 3" in diagnose_failure(echoes).lines[0]


def test_a_mistake_of_the_user_keeps_its_code_and_has_no_trace() -> None:
    diagnosis = diagnose_failure([Failure(member(2), "in a step", "shard x is damaged", "DataError", "", 3)])
    assert diagnosis.code == 3 and not diagnosis.trace
    assert diagnosis.lines == ("error: shard x is damaged (rank 2 (pp 0, dp 1, tp 0) on n1, while in a step)",)


WAITING = (
    Frame("/x/site-packages/torch/distributed/distributed_c10d.py", 3000, "all_reduce"),
    Frame("/x/site-packages/torch/distributed/c10d_logger.py", 81, "wrapper"),
    Frame("/repo/megatron_omega/parallel/tensor_parallel.py", 61, "_total"),
)
COMPUTING = (Frame("/repo/megatron_omega/model/feed_forward.py", 41, "forward"),)


def standing(rank: int, frames: tuple[Frame, ...], state: str = "S") -> Standing:
    return Standing(member(rank), "in a step (step 7)", 7, 8.25, state, frames)


def test_a_hang_names_who_is_not_waiting() -> None:
    diagnosis = diagnose_hang([standing(rank, COMPUTING if rank == 3 else WAITING) for rank in range(4)], "stacks")
    assert diagnosis.code == 76 and diagnosis.event["ranks"] == [3]
    assert "rank 3 (pp 0, dp 1, tp 1) on n1, process 103, has made no progress for 8.2 s" in diagnosis.lines[0]
    assert "at megatron_omega/model/feed_forward.py:41 in forward" in diagnosis.lines[0]
    assert (
        diagnosis.lines[1]
        == "  ranks 0-2 waiting in all_reduce, at megatron_omega/parallel/tensor_parallel.py:61 in _total"
    )


def test_a_stopped_rank_is_guilty_even_inside_a_collective() -> None:
    diagnosis = diagnose_hang([standing(0, WAITING, "T"), standing(1, COMPUTING), standing(2, WAITING)], "stacks")
    assert diagnosis.event["ranks"] == [0] and "it is stopped (SIGSTOP)" in diagnosis.lines[0]


def test_when_all_wait_they_disagree() -> None:
    diagnosis = diagnose_hang([standing(rank, WAITING) for rank in range(2)], "stacks")
    assert "disagree" in diagnosis.lines[0] and diagnosis.event["ranks"] == []


def test_absence_says_who_came_from_where() -> None:
    diagnosis = diagnose_absence([member(0), member(1), member(3)], 4, 20.0)
    assert diagnosis.code == 76
    assert "rank 2 of 4 did not arrive within 20 s (arrived: ranks 0-1, 3 on n1)" in diagnosis.lines[0]


def test_findings_of_all_ranks_are_one_list_without_repeats() -> None:
    diagnosis = diagnose_refusal([("corpus missing", 3), ("corpus missing", 3), ("port taken", 2)])
    assert diagnosis.code == 2 and diagnosis.lines == ("errors:", "1. corpus missing", "2. port taken")
    assert diagnose_refusal([("corpus missing", 3)]).lines == ("error: corpus missing",)


def test_ranks_that_run_something_else_are_found() -> None:
    prints = {rank: {"code": "abc", "configuration": "1" if rank != 2 else "2"} for rank in range(4)}
    found = disagreements(prints)
    assert len(found) == 1 and "configuration: ranks 0-1, 3 1, rank 2 2" in found[0]


@given(st.sets(st.integers(0, 40), min_size=1))
def test_rank_ranges_lose_nothing(ranks: set[int]) -> None:
    text = rank_ranges(ranks).split(maxsplit=1)[1]
    bounds = [part.split("-") for part in text.split(", ")]
    assert {rank for low, *high in bounds for rank in range(int(low), int((high or [low])[0]) + 1)} == ranks


DUMP = """Thread 0x00007f0000000001 (most recent call first):
  File "/usr/lib/python3.11/selectors.py", line 468 in select

Current thread 0x00007f0000000002 (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3000 in all_reduce
  File "/repo/megatron_omega/parallel/tensor_parallel.py", line 61 in forward
"""


def test_stacks_are_read_by_thread() -> None:
    frames = main_thread(DUMP, 0x7F0000000002)
    assert [frame.line for frame in frames] == [3000, 61]
    assert collective_of(frames) == "all_reduce"
    assert str(caller_of(frames)) == "megatron_omega/parallel/tensor_parallel.py:61 in forward"
    other = main_thread(DUMP, 0x7F0000000001)
    assert [frame.function for frame in other] == ["select"] and collective_of(other) is None


@pytest.mark.parametrize("text", ["", "stopped\n", "Fatal\n"])
def test_no_stack_is_no_frame(text: str) -> None:
    assert main_thread(text, 1) == []
