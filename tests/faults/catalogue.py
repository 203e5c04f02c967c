"""The faults: how each is done to a run, and what has to come of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from watchdog.attacks import WITH_SECRET, WITHOUT_SECRET

from faults.laboratory import STEPS, Laboratory, Outcome, after_step, demand, last_words
from faults.ranks import weights_digest
from megatron_omega.host.json_lines import read_objects
from megatron_omega.host.run_folder import METRICS, MONITOR
from megatron_omega.watchdog.meeting import Address

Fault = Callable[[Laboratory], Outcome]
DETECTION_SECONDS = 10.0


def kill(kind: str) -> Fault:
    """SIGKILL a rank of the first, a middle or the last stage at a random step."""

    def fault(lab: Laboratory) -> Outcome:
        layout = "4x1x2" if kind == "middle" else None
        run = lab.run(layout=layout)
        rank = {"first": 0, "middle": 3, "last": run.world_size - 1}[kind]
        attempt = run.start()
        now = after_step(attempt, lab.random.randrange(2, STEPS - 2), jitter=lab.random.random() * 0.5)
        attempt.send(rank, signal.SIGKILL)
        ending = attempt.wait(since=now)
        problems = demand(
            ending, code=137, pattern=rf"error: rank {rank} \(pp .*\) on .* is gone", within=DETECTION_SECONDS
        )
        return lab.compare(run, layout=layout, detected=ending.seconds, problems=problems, said=last_words(ending.log))

    return fault


def stop(lab: Laboratory) -> Outcome:
    """SIGSTOP a random rank."""
    run = lab.run()
    rank = lab.random.randrange(run.world_size)
    attempt = run.start()
    now = after_step(attempt, lab.random.randrange(4, STEPS - 2), jitter=lab.random.random() * 0.5)
    attempt.send(rank, signal.SIGSTOP)
    ending = attempt.wait(since=now)
    problems = demand(ending, code=76, pattern=rf"hang: rank {rank} \(.*it is stopped.*\n  at .+:\d+ in \w+")
    return lab.compare(run, detected=ending.seconds, problems=problems, said=last_words(ending.log))


def held(lab: Laboratory) -> Outcome:
    """A rank stands still outside of every message: it is named, with the message that the others wait in."""
    rank = lab.random.randrange(lab.world_size)
    run = lab.run(faults=[{"kind": "held", "rank": rank, "step": lab.random.randrange(4, STEPS - 2)}])
    attempt = run.start()
    attempt.wait_until(lambda: any(run.directory.glob("fired-*")))
    ending = attempt.wait()
    pattern = rf"hang: rank {rank} \(.*\n  at .*\n  it has not come to \w+, in which ranks? [\d, -]+ waits?\n"
    problems = demand(ending, code=76, pattern=pattern)
    return lab.compare(run, detected=ending.seconds, problems=problems, said=last_words(ending.log))


def ask(number: int) -> Fault:
    """Send a signal twice, the second during the save: all ranks save and end with 75, and continue."""

    def fault(lab: Laboratory) -> Outcome:
        run = lab.run()
        attempt = run.start()
        now = after_step(attempt, lab.random.randrange(2, STEPS - 3))
        rank = lab.random.randrange(run.world_size)
        attempt.send(rank, number)
        attempt.wait_until(lambda: "stopping:" in attempt.log_path.read_text())
        attempt.send(rank, number)
        ending = attempt.wait(since=now)
        name = signal.Signals(number).name
        problems = demand(ending, code=75, pattern=f"stopped after step \\d+: {name}")
        return lab.compare(run, detected=ending.seconds, problems=problems, said=last_words(ending.log, 2))

    return fault


def exception(kind: str) -> Fault:
    """Raise in the loader, a hook or the forward pass of one rank."""

    def fault(lab: Laboratory) -> Outcome:
        rank = lab.random.choice([0, 2] if kind == "loader" else [1, 3, 5]) % lab.world_size
        run = lab.run(faults=[{"kind": kind, "rank": rank, "step": lab.random.randrange(3, STEPS - 1)}])
        attempt = run.start()
        fired = run.directory.glob
        attempt.wait_until(lambda: any(fired("fired-*")))
        ending = attempt.wait()
        problems = demand(
            ending, code=1, pattern=rf"error: rank {rank} \(.*ValueError: injected", within=DETECTION_SECONDS,
            tracebacks=1,
        )  # fmt: skip
        return lab.compare(run, detected=ending.seconds, problems=problems, said=last_words(ending.log, 1))

    return fault


def absent(lab: Laboratory) -> Outcome:
    """Leave out one rank at the start."""
    run = lab.run("--resilience.start_timeout_seconds", "20")
    missing = lab.random.randrange(1, run.world_size)
    ending = run.start(leave_out=[missing]).wait()
    problems = demand(ending, code=76, pattern=rf"error: rank {missing} of {run.world_size} did not arrive within 20 s")
    return lab.compare(run, detected=ending.seconds, problems=problems, said=last_words(ending.log, 1))


def port_in_use(lab: Laboratory) -> Outcome:
    """Somebody else listens on the meeting port."""
    run = lab.run()
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        port = squatter.getsockname()[1]
        ending = run.start(port=port).wait()
    problems = demand(ending, code=2, pattern=rf"error: MASTER_PORT={port} .* cannot be opened")
    return lab.compare(run, detected=ending.seconds, problems=problems, said=last_words(ending.log, 1))


def read_only(lab: Laboratory) -> Outcome:
    """The run folder cannot be written: a small file system mounted read-only (needs root), else a file in its place."""
    place = lab.folder / "read-only"
    place.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro,size=1g", "none", str(place)], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        place.rmdir()
        place.write_text("")
    run = lab.run(directory=place / "run")
    try:
        ending = run.start().wait()
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)
    problems = demand(ending, code=2, pattern=r"error: logging.run_directory=.* cannot be written")
    place.rmdir() if mounted else place.unlink()
    return lab.compare(run, detected=ending.seconds, problems=problems, said=last_words(ending.log, 1))


def not_a_number(lab: Laboratory) -> Outcome:
    """A gradient of one rank is not a number: all ranks skip that step."""
    run = lab.run(faults=[{"kind": "nan", "rank": 2 % lab.world_size, "step": 6}])
    ending = run.finish()
    skipped = [event["step"] for kind in ("skipped_step", "bad_step") for event in run.events(kind)]
    problems = [] if set(skipped) == {6} else [f"skipped steps {skipped}, not 6"]
    return Outcome(None, run.is_complete, None, tuple(problems), last_words(ending.log, 1))


def poisoned_window(lab: Laboratory) -> Outcome:
    """Three steps of data that teach nothing: refused, then left behind, after which the run passes."""
    steps = ["--training.train_steps", "24", "--resilience.spike_window", "8", "--resilience.spike_limit", "3"]
    first, last = 8 * 16, 8 * 19  # the samples of steps 17 to 19
    run = lab.run(*steps, faults=[{"kind": "poison", "samples": [first, last]}])
    ending = run.finish(most_starts=1)
    refused = [event["step"] for event in run.events("bad_step")]
    problems = [] if refused == [17, 18, 19] else [f"refused steps {refused}, not 17 to 19"]
    problems += [] if len(run.events("rollback")) == 1 else [f"{len(run.events('rollback'))} rollbacks, not one"]
    problems += [] if any(event.get("documents") for event in run.events("bad_step")) else ["no documents are named"]
    return Outcome(None, run.is_complete, None, tuple(problems), last_words(ending.log, 1))


def flipped_bit(lab: Laboratory) -> Outcome:
    """A bit of one replica's weights flips: the rank is named, and the run goes back to where all was well."""
    run = lab.run("--resilience.integrity_interval_steps", "2", faults=[{"kind": "flip", "rank": 3, "step": 6}])
    ending = run.finish(most_starts=1)
    named = [event["ranks"] for event in run.events("silent_fault")]
    problems = [] if named == [[3]] else [f"ranks {named} are named, not 3"]
    return lab.compare(run, problems=problems, said=last_words(ending.log, 1))


def straggler(lab: Laboratory) -> Outcome:
    """A rank is 200 ms late in each step: it is named, and nothing else changes."""
    steps = ("--training.train_steps", "28", "--resilience.straggler_window", "16")
    rank = lab.random.randrange(8)
    run = lab.run(*steps, faults=[{"kind": "late", "rank": rank, "step": 3, "seconds": 0.2}])
    run.finish(most_starts=1)
    named = [event["ranks"] for event in run.events("straggler")]
    problems = [] if [rank] in named and len(named) == 1 else [f"ranks {named} are named, not {rank}"]
    return lab.compare(run, *steps, problems=problems)


def clock(lab: Laboratory) -> Outcome:
    """The clock of every rank goes back by an hour."""
    run = lab.run(faults=[{"kind": "clock", "step": 3}])
    run.finish(most_starts=1)
    return lab.compare(run)


def loader_worker(lab: Laboratory) -> Outcome:
    """A loader's worker process is killed."""
    overrides = ("--data.num_workers", "1")
    run = lab.run(*overrides, faults=[{"kind": "loader_worker", "rank": 0, "step": 5}])
    ending = run.finish(most_starts=1)
    problems = [] if "was killed" in ending.log or "ended by signal 9" in ending.log else ["nobody mentions the worker"]
    return lab.compare(run, problems=problems)


def tracker(lab: Laboratory) -> Outcome:
    """Weights & Biases cannot be reached."""
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"}
    run = lab.run("--logging.wandb", "online", environment=environment)
    ending = run.finish(most_starts=1)
    problems = [] if "Weights & Biases (logging.wandb) failed" in ending.log else ["no warning about the tracker"]
    return lab.compare(run, problems=problems, said=last_words(ending.log, 1))


def strangers(lab: Laboratory) -> Outcome:
    """Everybody talks to the hub, with and without the secret, while a rank is late and while the run trains."""
    run = lab.run()
    attempt = run.start()
    late = run.world_size - 1
    attempt.send(late, signal.SIGSTOP)
    found: list[Path] = []

    def is_published() -> bool:
        found[:] = [path for path in (run.directory / MONITOR).glob("*.json") if path.stat().st_size]
        return bool(found)

    attempt.wait_until(is_published)
    address = Address(**json.loads(found[0].read_text()))
    place, held = (address.host, address.port), []
    for attack in WITHOUT_SECRET.values():
        held += attack(place)
    for nonsense in WITH_SECRET.values():
        held += nonsense(place, address.secret)
    attempt.send(late, signal.SIGCONT)
    after_step(attempt, STEPS // 2)
    problems = []
    for name, attack in WITHOUT_SECRET.items():
        with contextlib.suppress(ConnectionRefusedError):
            held += attack(place)
            problems.append(f"{name}: the hub still takes connections when all ranks have come")
    ending = attempt.wait()
    for connection in held:
        connection.close()
    if set(ending.codes) != {0} or "error" in ending.log:
        problems.append(f"exit codes {ending.codes}: {last_words(ending.log)}")
    return lab.compare(run, problems=problems, said=last_words(ending.log, 1))


def two_starts(lab: Laboratory) -> Outcome:
    """Two starts in one folder at random offsets, ten times; the one that has the folder is killed each time."""
    run, problems = lab.run(layout="1x2x1"), []
    for _ in range(10):
        first = run.start()
        time.sleep(lab.random.random() * 2.0)
        attempts = [first, run.start()]
        while all(attempt.is_alive for attempt in attempts):
            time.sleep(0.05)
        refused = next(attempt for attempt in attempts if not attempt.is_alive)
        holder = next(attempt for attempt in attempts if attempt is not refused)
        ending = refused.wait()
        problems += demand(ending, code=2, pattern=r"in use by another start of the run \(process \d+ on ")
        after_step(holder, holder.steps() + 1, jitter=lab.random.random())
        for rank in range(run.world_size):
            holder.send(rank, signal.SIGKILL)
        holder.wait()
        rows = [row["step"] for row in read_objects(run.directory / METRICS)]
        if rows != list(range(1, len(rows) + 1)):
            problems.append(f"two have written: steps {rows}")
    return lab.compare(run, layout="1x2x1", problems=problems)


def full_disk(lab: Laboratory) -> Outcome:
    """The run's file system is full from step 20 to step 40."""
    overrides = ("--training.train_steps", "50", "--checkpoint.interval_steps", "8", "--evaluation.interval_steps", "10",
                 "--evaluation.num_batches", "1", "--logging.tensorboard", "true")  # fmt: skip
    disk = lab.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", disk], check=False).returncode == 0
    if not mounted:
        return Outcome(None, True, None, said="no file system of one's own can be mounted here")
    try:
        run = lab.run(*overrides, layout="1x2x1", directory=disk / "run",
                      faults=[{"kind": "full", "rank": 0, "step": 20, "until": 40}])  # fmt: skip
        ending = run.finish(most_starts=1)
        steps = [row["step"] for row in read_objects(run.directory / METRICS)]
        problems = [] if set(ending.codes) == {0} else [f"exit codes {ending.codes}: {last_words(ending.log)}"]
        missing = sorted(set(range(1, 51)) - set(steps))  # the last block of the file had room for some lines more
        if not missing or missing != list(range(missing[0], 40)) or not 20 <= missing[0] < 35:
            problems.append(f"metrics.jsonl lacks steps {missing}")
        elif f"missing: {len(missing)} lines, step {missing[0]} to step 39" not in ending.log:
            problems.append("the log does not name the missing lines")
        problems += ["a traceback"] if "Traceback" in ending.log else []
        reference = lab.reference(*overrides, layout="1x2x1")
        ours, theirs = (max((each.directory / "checkpoints").glob("step-*")) for each in (run, reference))
        is_equal = weights_digest(ours) == weights_digest(theirs)
        return Outcome(None, run.is_complete, is_equal, tuple(problems), last_words(ending.log))
    finally:
        subprocess.run(["umount", disk], check=False)


FAULTS: dict[str, Fault] = {
    "SIGKILL of a rank of the first stage": kill("first"),
    "SIGKILL of a rank of a middle stage": kill("middle"),
    "SIGKILL of a rank of the last stage": kill("last"),
    "SIGSTOP of a rank": stop,
    "a rank that stands still": held,
    "SIGTERM, twice": ask(signal.SIGTERM),
    "SIGUSR1, twice": ask(signal.SIGUSR1),
    "exception in the loader": exception("loader"),
    "exception in a hook": exception("hook"),
    "exception in the forward pass": exception("forward"),
    "a rank that never arrives": absent,
    "port in use": port_in_use,
    "run folder read-only": read_only,
    "not-a-number in one rank's gradient": not_a_number,
    "a poisoned data window": poisoned_window,
    "a flipped bit in one replica's weights": flipped_bit,
    "a rank 200 ms late in each step": straggler,
    "clock set back by an hour": clock,
    "loader worker killed": loader_worker,
    "wandb unreachable": tracker,
    "strangers at the hub": strangers,
    "two starts in one folder": two_starts,
    "disk full from step 20 to 40": full_disk,
}
