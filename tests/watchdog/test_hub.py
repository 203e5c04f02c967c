"""The hub's judgement over real sockets, with monitors that have no rank."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from watchdog.fake_monitors import IDLE, WAITING, FakeRank, FakeRun


def test_whoever_is_in_a_longer_phase_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    drawing = FakeRank(IDLE, count=6, age=1.0, allowed=4.0, phase="recording a validation")
    run = FakeRun(tmp_path, [FakeRank(WAITING), drawing, FakeRank(WAITING)])
    began = time.monotonic()
    assert not run.serve(2.5), "the others are overdue, but they wait for one that still has time"
    assert run.asked_at, "the hub looked"
    drawing.age = 5.0
    assert run.serve(20.0) and time.monotonic() - began < 12.0
    run.close()
    said = capfd.readouterr().err
    assert set(run.codes.values()) == {76} and "hang: rank 1" in said and "while recording a validation" in said
    assert "it has not come to allreduce, in which ranks 0, 2 wait" in said
