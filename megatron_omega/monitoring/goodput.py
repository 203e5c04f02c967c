"""Goodput: how much of a run's wall time went into steps that count, and where the rest went.

Pure over the two files of a run folder, metrics.jsonl and events.jsonl, over all its restarts. A life is one start of
the run up to its end or its death; the last sign of a life that died is the last line it wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_omega.host.json_lines import read_objects
from megatron_omega.host.run_folder import EVENTS, METRICS
from megatron_omega.log import get_logger
from megatron_omega.monitoring.files import last_sign
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import RunContext

log = get_logger(__name__)


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went, seconds, and what interrupted it."""

    wall_seconds: float
    """From the first start of a process to the last sign of life."""
    effective_seconds: float
    """Steps that count: neither skipped nor done again."""
    skipped_seconds: float
    """Steps that were skipped as bad."""
    lost_seconds: float
    """Steps done again after a restart or a rollback."""
    validation_seconds: float
    stall_seconds: float
    """Training stood still for a save."""
    startup_seconds: float
    """From the start of the process to the first step, loading of the checkpoint included."""
    away_seconds: float
    """Nothing ran after a failure, until the next start."""
    paused_seconds: float
    """Nothing ran after a stop on request; no part of the wall time."""
    other_seconds: float
    """The rest: hooks, waiting at the end, what a dying process did after its last line."""
    steps: int
    skipped_steps: int
    lost_steps: int
    starts: int
    failures: int
    """Lives that ended by an error or without a word; requested stops do not count."""
    pauses: int
    """Lives that ended by a stop on request."""
    rollbacks: int
    saves: int

    @property
    def effective_fraction(self) -> float:
        """Effective training time: steps that count over wall time."""
        return self.effective_seconds / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def mean_seconds_between_failures(self) -> float | None:
        """Mean time a run lives before a failure; None without any."""
        return (self.wall_seconds - self.away_seconds) / self.failures if self.failures else None

    @property
    def mean_save_stall_seconds(self) -> float | None:
        """Mean stall of one save."""
        return self.stall_seconds / self.saves if self.saves else None

    @property
    def mean_restart_seconds(self) -> float | None:
        """Mean time from the last sign of a life to the first step of the next; None without a restart."""
        first = self.startup_seconds / self.starts if self.starts else 0.0
        return (self.startup_seconds + self.away_seconds - first) / (self.starts - 1) if self.starts > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return every figure under its name."""
        derived = (
            "effective_fraction", "mean_seconds_between_failures", "mean_save_stall_seconds", "mean_restart_seconds",
        )  # fmt: skip
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True)
class _Life:
    began: float
    ended: float
    is_failure: bool
    is_pause: bool = False
    """It stopped on request."""


def measure(events: Iterable[dict[str, Any]], steps: Iterable[dict[str, Any]], seen_at: float | None = None) -> Goodput:
    """Return the goodput of the run that wrote `events` and `steps` (rows of metrics.jsonl).

    `seen_at` is the last sign of its last life, seconds since the epoch, where that has not ended. Earlier runs in the
    same folder, that this one did not go on from, are left out.
    """
    events = _since_fresh_start(list(events))
    rows = list(steps)
    lives = _lives(events, seen_at)
    total = _Sums(events)
    effective = sum(row["step_seconds"] for row in rows if not row["skipped"])
    skipped = sum(row["step_seconds"] for row in rows if row["skipped"])
    lost = total.of("lost_seconds", "start", "rollback")
    named = {
        "effective_seconds": effective,
        "skipped_seconds": skipped,
        "lost_seconds": lost,
        "validation_seconds": total.of("seconds", "evaluate"),
        "stall_seconds": total.of("stall_seconds", "save"),
        "startup_seconds": total.of("startup_seconds", "start"),
        "away_seconds": _between(lives, after_pause=False),
    }
    wall = sum(life.ended - life.began for life in lives) + named["away_seconds"]
    return Goodput(
        wall_seconds=wall,
        **named,
        other_seconds=max(0.0, wall - sum(named.values())),
        steps=len(rows),
        skipped_steps=sum(row["skipped"] for row in rows),
        lost_steps=int(total.of("lost_steps", "start", "rollback")),
        starts=len(lives),
        failures=sum(life.is_failure for life in lives),
        pauses=sum(life.is_pause for life in lives),
        paused_seconds=_between(lives, after_pause=True),
        rollbacks=total.count("rollback"),
        saves=total.count("save"),
    )


def _between(lives: Sequence[_Life], *, after_pause: bool) -> float:
    """Return the seconds between lives, of those that ended on request or of the others."""
    gaps = ((old, new.began - old.ended) for old, new in pairwise(lives))
    return sum(max(0.0, gap) for old, gap in gaps if old.is_pause == after_pause)


class _Sums:
    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        self._events = events

    def of(self, field: str, *names: str) -> float:
        return sum(event.get(field) or 0.0 for event in self._events if event["event"] in names)

    def count(self, name: str) -> int:
        return sum(event["event"] == name for event in self._events)


def _since_fresh_start(events: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    fresh = [index for index, event in enumerate(events) if event["event"] == "start" and event.get("is_fresh")]
    return events[fresh[-1] :] if fresh else events


def _lives(events: Sequence[dict[str, Any]], seen_at: float | None) -> list[_Life]:
    starts = [index for index, event in enumerate(events) if event["event"] == "start"]
    lives = []
    for place, index in enumerate(starts):
        is_last = place + 1 == len(starts)
        inside = events[index:] if is_last else events[index : starts[place + 1]]
        began = _time(inside[0]) - (inside[0].get("startup_seconds") or 0.0)
        ended = began + (inside[-1].get("uptime_seconds") or 0.0)
        is_closed = inside[-1]["event"] == "close"
        if not is_closed:
            sign = seen_at if is_last else events[starts[place + 1]].get("last_sign")
            ended = max(ended, sign or 0.0)
        has_failed = any(event["event"] == "error" for event in inside) or not (is_closed or is_last)
        is_pause = not has_failed and any(event["event"] == "stop_requested" for event in inside)
        lives.append(_Life(began, ended, has_failed, is_pause))
    return lives


def _time(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def goodput_of(run_directory: Path) -> Goodput:
    """Return the goodput of the run in this folder."""
    steps = read_objects(run_directory / METRICS)
    return measure(read_objects(run_directory / EVENTS), steps, last_sign(run_directory))


def describe(goodput: Goodput) -> list[str]:
    """Return a few lines for people."""
    parts = {
        "start-ups": goodput.startup_seconds, "down after failures": goodput.away_seconds,
        "lost steps": goodput.lost_seconds,
        "skipped steps": goodput.skipped_seconds, "validation": goodput.validation_seconds,
        "saves": goodput.stall_seconds, "other": goodput.other_seconds,
    }  # fmt: skip
    wall = max(goodput.wall_seconds, 1e-9)
    told = ", ".join(f"{name} {seconds:,.1f} s ({seconds / wall:.1%})" for name, seconds in parts.items() if seconds)
    counted = {"failures": goodput.failures, "pauses on request": goodput.pauses, "rollbacks": goodput.rollbacks,
               "steps done again": goodput.lost_steps, "skipped steps": goodput.skipped_steps}  # fmt: skip
    events = "".join(f", {name} {number:,}" for name, number in counted.items() if number)
    paused = f"; paused on request {goodput.paused_seconds:,.1f} s, not counted" if goodput.paused_seconds else ""
    lines = [
        f"goodput {goodput.effective_fraction:.1%}: {goodput.steps - goodput.skipped_steps:,} steps that count took "
        f"{goodput.effective_seconds:,.1f} s of {goodput.wall_seconds:,.1f} s",
        f"the rest: {told or 'nothing'}{paused}",
        f"starts {goodput.starts}{events or ', no failure'}",
    ]
    means = {
        "mean time between failures": goodput.mean_seconds_between_failures,
        "stall of a save": goodput.mean_save_stall_seconds, "restart": goodput.mean_restart_seconds,
    }  # fmt: skip
    known = [f"{name} {seconds:,.2f} s" for name, seconds in means.items() if seconds is not None]
    return [*lines, ", ".join(known)] if known else lines


class GoodputLog(Hook):
    """Says at the end of a run how much of its time counted. Stands behind the hook that writes the events."""

    def __init__(self) -> None:
        self._run_directory: Path | None = None

    def on_start(self, context: RunContext) -> None:
        self._run_directory = context.run_directory

    def on_close(self) -> None:
        if self._run_directory is None:
            return
        for line in describe(goodput_of(self._run_directory)):
            log.info(line)
