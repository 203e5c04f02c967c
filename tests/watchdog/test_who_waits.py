"""The one who did not come is named, never one who waits; where that cannot be told, nobody is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from watchdog.stuck_runs import Kind, StuckRun

from megatron_omega.config.layout import Layout
from megatron_omega.watchdog.diagnosis import diagnose_hang
from megatron_omega.watchdog.ledger import Ledger, Row
from megatron_omega.watchdog.waits import find_culprits

LAYOUTS = [Layout(2, 2, 2), Layout(4, 2, 1), Layout(1, 4, 2), Layout(4, 1, 2)]
CASES = [
    pytest.param(layout, backend, kind, seed, id=f"{layout}-{backend}-{kind}-{seed}")
    for layout in LAYOUTS
    for backend, kinds in {"nccl": ("host", "stopped", "device"), "gloo": ("host", "stopped")}.items()
    for kind in kinds
    for seed in range(2)
]


@pytest.mark.parametrize(("layout", "backend", "kind", "seed"), CASES)
def test_the_culprit_is_named_and_nobody_else(layout: Layout, backend: str, kind: Kind, seed: int) -> None:
    for is_timed in (False, True) if backend == "nccl" else (False,):
        run = StuckRun(layout, backend, kind, seed, is_timed)  # pyright: ignore[reportArgumentType]
        diagnosis = diagnose_hang(run.standings(), "stacks")
        named = diagnosis.event["ranks"]
        if (
            kind == "device" and not named
        ):  # all hosts have come, and between two ranks devices do not say how far they are
            assert "waits for its device" in diagnosis.lines[0]
        else:
            assert named == [run.culprit], "\n".join(diagnosis.lines)


def test_a_device_that_stands_still_is_named_where_a_recorder_tells() -> None:
    named = [
        diagnose_hang(StuckRun(layout, "nccl", "device", seed, is_timed=True).standings(), "stacks")
        for layout in LAYOUTS
        for seed in range(5)
    ]
    found = [diagnosis for diagnosis in named if diagnosis.event["ranks"]]
    assert len(found) >= 10 and all("its device has not come to" in diagnosis.lines[1] for diagnosis in found)


@pytest.mark.parametrize(("layout", "backend", "kind", "seed"), CASES[::4])
def test_without_an_answer_of_the_culprit_no_healthy_rank_is_named(
    layout: Layout, backend: str, kind: Kind, seed: int
) -> None:
    run = StuckRun(layout, backend, kind, seed)  # pyright: ignore[reportArgumentType]
    silent = [
        replace(one, has_answered=False, rows=(), frames=()) if one.member.rank == run.culprit else one
        for one in run.standings()
    ]
    named = set(diagnose_hang(silent, "stacks").event["ranks"])
    assert named <= {run.culprit}


def test_ranks_that_disagree_about_the_order_are_a_circle() -> None:
    rows = {0: [Row("a", "allreduce", 3), Row("b", "allgather", 2)],
            1: [Row("a", "allreduce", 2), Row("b", "allgather", 3)]}  # fmt: skip
    verdict = find_culprits(rows, {0, 1})
    assert not verdict.missed and set(verdict.circle) == {0, 1}


def test_what_never_began_is_behind_too() -> None:
    rows = {0: [Row("0:0>1", "send", 1)], 1: [], 2: []}
    assert set(find_culprits(rows, {0}).missed) == {1}
    assert not find_culprits(rows, ()).missed, "who sends and goes on waits for nobody"


def test_the_ledger_is_read_as_it_was_written() -> None:
    ledger = Ledger.create()
    ledger.open_row("0")
    for _ in range(3):
        ledger.count("0", "allreduce")
    ledger.count("0:3>5", "send")
    before = ledger.settled
    ledger.settle({"0": (2, 1)}, is_busy=True)
    assert ledger.settled == before + 1 and ledger.is_busy
    assert Ledger(ledger.descriptor).read() == [Row("0", "allreduce", 3, 2, 1), Row("0:3>5", "send", 1)]
    for number in range(400):
        ledger.count(f"group {number}", "send")
    assert len(ledger.read()) == 256, "what does not fit is left out"
