"""`python -m faults.chaos` (from tests/): many random faults in one run, which has to end as if nothing had happened.

Faults that make all ranks skip a step are done to the undisturbed run too, and to nothing else in it: what they change
is meant to be changed. A ledger that every rank keeps shows which samples each step that counts was trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from faults.laboratory import Laboratory
from faults.ranks import Attempt, Run, losses, weights_digest

SIGNALS = {
    "SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1,
}  # fmt: skip
INSIDE = ("loader", "hook", "forward", "flip", "late", "clock", "nan")
AT_START = ("absent", "port")
SKIPPING = ("nan",)
READERS = (0, 2)
"""Ranks of 2x2x2 that draw the samples: first stage, first of their tensor-parallel group."""


@dataclass
class Plan:
    """Faults by the step they wait for."""

    outside: list[tuple[int, str, int]]
    """(step, signal, rank)"""
    inside: list[dict[str, Any]]
    at_start: list[str]
    done: Counter[str] = field(default_factory=Counter)


def make_plan(count: int, steps: int, ranks: int, source: random.Random) -> Plan:
    """Return `count` random faults, at most one in a step."""
    kinds = [source.choice([*SIGNALS, *INSIDE, *AT_START]) for _ in range(count)]
    moments = iter(sorted(source.sample(range(5, steps - 5), count)))
    plan = Plan([], [], [])
    for kind in kinds:
        step, rank = next(moments), source.randrange(ranks)
        if kind in SIGNALS:
            plan.outside.append((step, kind, rank))
        elif kind in AT_START:
            plan.at_start.append(kind)
        else:
            rank = source.choice(READERS) if kind == "loader" else rank
            fault = {"kind": kind, "step": step} | ({} if kind == "clock" else {"rank": rank})
            plan.inside.append(fault | ({"seconds": 0.2, "count": 10} if kind == "late" else {}))
    return plan


def live_through(run: Run, plan: Plan, most_starts: int) -> int:
    """Start the run until it is complete, doing the planned faults; return the number of starts."""
    waiting, starts = list(plan.outside), 0
    with tqdm(total=len(plan.outside), desc="faults from outside", disable=not sys.stderr.isatty()) as bar:
        while not run.is_complete and starts < most_starts:
            attempt = start(run, plan) if starts else run.start()
            starts += 1
            while attempt.is_alive:
                if waiting and attempt.steps() >= waiting[0][0]:
                    _, name, rank = waiting.pop(0)
                    attempt.send(rank, SIGNALS[name])
                    plan.done[name] += 1
                    bar.update()
                time.sleep(0.05)
            attempt.wait()
    return starts


def start(run: Run, plan: Plan) -> Attempt:
    """Start again, badly where that is still to be done."""
    if not plan.at_start:
        return run.start()
    kind = plan.at_start.pop()
    plan.done[kind] += 1
    if kind == "absent":
        return run.start(leave_out=[1])
    squatter = socket.create_server(("127.0.0.1", 0))
    with squatter:
        attempt = run.start(port=squatter.getsockname()[1])
        attempt.wait()
    return attempt


def samples_of(run: Run, steps: int) -> list[int]:
    """Return every sample index that a step that counts was trained on, in order of steps."""
    last: dict[tuple[int, int], list[int]] = {}
    for rank in READERS:
        for line in (run.directory / f"ledger-{rank}.jsonl").read_text().splitlines():
            row = json.loads(line)
            last[row["step"], rank] = row["indices"]
    return [index for step in range(1, steps + 1) for rank in READERS for index in last[step, rank]]


def first_difference(run: Run, calm: Run) -> int | None:
    """Return the first step whose losses differ."""
    ours, theirs = losses(run), losses(calm)
    return next((step for step in sorted(theirs) if ours.get(step) != theirs[step]), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 where the run came through."""
    parser = argparse.ArgumentParser(prog="faults.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=25)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of everything random (default: the time)")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    with Laboratory(seed=options.seed) as lab:
        settings = [
            "--training.train_steps", str(options.steps), "--checkpoint.interval_steps", "10",
            "--resilience.start_timeout_seconds", "30",
        ]  # fmt: skip
        plan = make_plan(options.faults, options.steps, 8, lab.random)
        ledger = [{"kind": "ledger", "step": 0}]
        run = lab.run(*settings, faults=[*plan.inside, *ledger], name="chaos")
        starts = live_through(run, plan, most_starts=3 * options.faults)
        fired = Counter(path.name.split("-")[1] for path in run.directory.glob("fired-*"))
        plan.done += fired
        skips = [fault for fault in plan.inside if fault["kind"] in SKIPPING]
        calm = lab.run(*settings, faults=skips, name="calm")
        calm.finish()
        return report(run, calm, plan, starts, options, time.monotonic() - begin)


def report(run: Run, calm: Run, plan: Plan, starts: int, options: Any, seconds: float) -> int:
    """Print what became of the run; return the exit code."""
    complete = run.is_complete and calm.is_complete
    ends = [max((r.directory / "checkpoints").glob("step-*"), default=None) for r in (run, calm)]
    same_weights = complete and None not in ends and weights_digest(ends[0]) == weights_digest(ends[1])  # pyright: ignore[reportArgumentType]
    samples = samples_of(run, options.steps) if complete else []
    once = sorted(samples) == list(range(8 * options.steps))
    skips = [(event["step"], event["event"]) for kind in ("bad_step", "skipped_step") for event in run.events(kind)]
    rows = {
        f"{options.faults} faults done": sum(plan.done.values()) == options.faults,
        "complete": complete,
        "losses of all steps bit-equal": complete and losses(run) == losses(calm),
        "final weights and moments bit-equal": same_weights,
        "every sample trained exactly once": once,
    }
    print(
        f"{sum(plan.done.values())} faults ({dict(plan.done)}), {starts} starts, seed {options.seed}, {seconds:.0f} s"
    )
    print(f"skipped steps, in both runs: {sorted(set(skips)) or 'none'}")
    for name, holds in rows.items():
        print(f"{name:<40} {'PASS' if holds else 'FAIL'}")
    if complete and (first := first_difference(run, calm)):
        print(f"the losses differ from step {first} on")
    return 0 if all(rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
