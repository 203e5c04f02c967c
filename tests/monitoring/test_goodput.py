"""Where the time of a run went: from its two files alone, over restarts, crashes and rollbacks."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import run_python

from megatron_omega.config.schema import RunConfig
from megatron_omega.monitoring.files import EventsFile, MetricsFile
from megatron_omega.monitoring.goodput import describe, goodput_of, measure
from megatron_omega.training.state import Rollback, RunContext, StepReport, TrainState


def event(at: float, name: str, uptime: float, **fields: Any) -> dict[str, Any]:
    time = datetime.fromtimestamp(at, timezone.utc).isoformat()
    return {"time": time, "event": name, "uptime_seconds": uptime, **fields}


def rows(*seconds: float, skipped: int = 0) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; the last `skipped` of them skipped."""
    return [{"step_seconds": s, "skipped": index >= len(seconds) - skipped} for index, s in enumerate(seconds)]


CRASHED_AND_DONE = [
    event(1010, "start", 10, startup_seconds=10.0),
    event(1040, "save", 40, stall_seconds=2.0),
    event(1120, "start", 20, startup_seconds=20.0, last_sign=1060.0, lost_steps=2, lost_seconds=8.0),
    event(1130, "evaluate", 30, seconds=5.0),
    event(1140, "rollback", 40, lost_steps=1, lost_seconds=4.0),
    event(1190, "save", 90, stall_seconds=4.0),
    event(1200, "close", 100),
]


def test_a_pause_on_request_is_no_failure_and_no_loss() -> None:
    paused = [
        event(1010, "start", 10, startup_seconds=10.0),
        event(1090, "stop_requested", 90),
        event(1100, "close", 100),
        event(5010, "start", 10, startup_seconds=10.0, last_sign=1100.0),
        event(5100, "close", 100),
    ]
    found = measure(paused, rows(80.0, 80.0))
    assert (found.wall_seconds, found.away_seconds, found.paused_seconds) == (200, 0, 3900)
    assert (found.failures, found.pauses, found.effective_fraction) == (0, 1, 0.8)
    text = " ".join(describe(found))
    assert "paused on request 3,900.0 s, not counted" in text and "failures" not in text


def test_a_run_that_crashed_once() -> None:
    found = measure(CRASHED_AND_DONE, rows(30.0, 30.0, 30.0, 5.0, skipped=1))
    assert found.wall_seconds == 200 and found.away_seconds == 40  # dead at 1060, started again at 1100
    assert (found.effective_seconds, found.skipped_seconds, found.lost_seconds) == (90, 5, 12)
    assert (found.startup_seconds, found.stall_seconds, found.validation_seconds) == (30, 6, 5)
    assert found.other_seconds == 200 - 40 - 90 - 5 - 12 - 30 - 6 - 5
    assert (found.starts, found.failures, found.rollbacks, found.lost_steps, found.skipped_steps) == (2, 1, 1, 3, 1)
    assert found.effective_fraction == 0.45
    assert found.mean_seconds_between_failures == 160 and found.mean_save_stall_seconds == 3
    assert found.mean_restart_seconds == 40 + 30 - 15
    assert "goodput 45.0%: 3 steps that count took 90.0 s of 200.0 s" in describe(found)[0]


def test_a_request_to_stop_is_no_failure_and_an_error_is_one() -> None:
    stopped = [event(10, "start", 0), event(20, "stop_requested", 10), event(21, "close", 11), event(30, "start", 0)]
    assert measure(stopped, []).failures == 0
    failed = [event(10, "start", 0), event(20, "error", 10), event(21, "close", 11), event(30, "start", 0)]
    assert measure(failed, []).failures == 1
    assert measure(failed, []).mean_save_stall_seconds is None


def test_a_life_that_has_not_ended_lasts_to_its_last_sign() -> None:
    assert measure([event(10, "start", 5, startup_seconds=5.0)], [], seen_at=25.0).wall_seconds == 20
    assert measure([], []).effective_fraction == 0


def test_an_older_run_in_the_folder_does_not_count() -> None:
    again = [*CRASHED_AND_DONE, event(5000, "start", 1, startup_seconds=1.0, is_fresh=True), event(5009, "close", 10)]
    assert measure(again, rows(6.0)).wall_seconds == 10


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 20), st.floats(0, 5)), min_size=1, max_size=6))
def test_the_parts_make_up_the_whole(lives: list[tuple[float, float, float]]) -> None:
    events, now, busy = [], 0.0, []
    for length, away, startup in lives:
        events.append(event(now + startup, "start", startup, startup_seconds=startup))
        events.append(event(now + startup + length, "close", startup + length))
        busy.append(length)
        now += startup + length + away
    found = measure(events, rows(*busy))
    parts = found.effective_seconds + found.startup_seconds + found.away_seconds + found.other_seconds
    assert parts == pytest.approx(found.wall_seconds, abs=1e-3)
    assert found.other_seconds == pytest.approx(0, abs=1e-3)


REPORT = StepReport(
    step=1, loss=5.5, lm_loss=5.0, mlm_loss=6.0, grad_norm=0.75, learning_rate=1e-3, consumed_samples=8,
    consumed_tokens=4096, tokens_per_second=12345.6, step_seconds=2.0, mfu=0.312, skipped=False,
)  # fmt: skip


def live(folder: Path, first: int, last: int, rollback_to: int | None = None) -> None:
    """Write what a run writes from step `first` to `last`, and then die without a word."""
    hooks = (EventsFile(), MetricsFile())
    state = TrainState(step=first - 1)
    for hook in hooks:
        hook.on_start(RunContext(RunConfig(), folder, state))
    for step in range(first, last + 1):
        for hook in hooks:
            hook.on_step_end(replace(REPORT, step=step))
    for hook in hooks if rollback_to is not None else ():
        hook.on_rollback(Rollback("why", last, rollback_to or 0, 1, TrainState(step=rollback_to or 0)))


def test_what_the_hooks_write_is_what_is_read(tmp_path: Path) -> None:
    live(tmp_path, 1, 9)
    os.utime(tmp_path / "metrics.jsonl", (1e9, 1e9))
    live(tmp_path, 7, 12, rollback_to=10)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["lost_steps"], e["lost_seconds"]) for e in events] == [
        ("start", 0, 0), ("start", 3, 6.0), ("rollback", 2, 4.0),
    ]  # fmt: skip
    assert events[1]["startup_seconds"] > 0 and events[1]["uptime_seconds"] >= events[1]["startup_seconds"]
    found = goodput_of(tmp_path)
    assert (found.steps, found.lost_steps, found.lost_seconds, found.failures) == (10, 5, 10.0, 1)
    done = run_python("tools/goodput.py", "--run", tmp_path, "--json")
    assert json.loads(done.stdout)["lost_steps"] == 5, done.stderr
    nothing = run_python("tools/goodput.py", tmp_path / "nowhere")
    assert nothing.returncode == 3 and "give the folder of a run" in nothing.stderr
