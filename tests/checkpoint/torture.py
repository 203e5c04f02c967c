# ruff: noqa: E402, T201
"""Kill saves at random moments: every time the next start resumes from the newest complete checkpoint and ends bitwise
where an undisturbed run ends. Prints one line for each kill; exit code 1 if one ends elsewhere.

    python tests/checkpoint/torture.py [--kills 20] [--seed 0]

Two ranks (ZeRO-1) train 6 steps and save after each, in the background on every other kill. A kill is SIGKILL to both
ranks or to one, from the inside, at a random one of the system calls that a save makes (write, fsync, rename, and every
byte of progress in between), so that all moments of a save are hit, not only the long ones.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
import torch.distributed as dist
from launch import Ranks, run_ranks
from scenarios import Case, Run, start, state_on_disk

from megatron_omega.checkpoint.catalogue import check_structure, list_checkpoints

STEPS = 6
CASE = Case(data=2)


@dataclass(frozen=True)
class Kill:
    """When and whom."""

    call: int
    """Number of the call, counted on each victim over the whole run."""
    victims: tuple[int, ...]
    asynchronous: bool


def train_to_the_end(directory: Path, kill: Kill | None) -> dict[str, int]:
    """Resume if there is something to resume from, train to the last step, save after each; return where it began."""
    run = start(CASE)
    store = run.store(directory, keep_last=2, keep_best=False, asynchronous=kill is not None and kill.asynchronous)
    state = store.load_latest(run.engine)
    run.consumed = 0 if state is None else int(state["consumed_samples"])  # type: ignore[arg-type]
    first = run.consumed // run.config.batch.global_batch_size
    newest = list_checkpoints(directory)
    counter = arm(kill)
    for step in range(first + 1, STEPS + 1):
        run.train(1)
        save(run, store, step)
    store.wait()
    dist.barrier()
    return {"first": first, "newest": int(newest[0].name.rpartition("-")[2]) if newest else 0, "calls": counter[0]}


def save(run: Run, store: Any, step: int) -> None:
    store.save(run.engine, run.state, step=step)
    error = None if store._thread is not None else store.wait()
    assert error is None, error


def arm(kill: Kill | None) -> list[int]:
    """Count the calls a save makes; at the chosen one, die. A write is split, so that it can be cut in the middle."""
    counter = [0]
    is_victim = kill is not None and dist.get_rank() in kill.victims

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counter[0] += 1
            if is_victim and kill is not None and counter[0] >= kill.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    write = os.write
    os.write = counted(lambda descriptor, data: write(descriptor, data[: max(1, len(data) // 2)]))
    os.fsync = counted(os.fsync)
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    Path.mkdir = counted(Path.mkdir)  # type: ignore[method-assign]
    return counter


def end_state(directory: Path) -> dict[str, torch.Tensor]:
    return state_on_disk(directory / f"step-{STEPS:08d}")


def survives(kill: Kill, directory: Path, undisturbed: dict[str, torch.Tensor]) -> tuple[bool, str]:
    """Run, die, run again; return whether it ended where it should, and a line about it."""
    killed = Ranks(CASE.size, train_to_the_end, directory, kill)
    try:
        killed.results(timeout=120)
        return False, "nobody died"
    except AssertionError:
        pass
    whole = [path for path in list_checkpoints(directory) if is_whole(path)]
    newest = int(whole[0].name.rpartition("-")[2]) if whole else 0
    litter = len(list(directory.glob(".unfinished-*"))) if directory.exists() else 0
    result = run_ranks(CASE.size, train_to_the_end, directory, None)[0]
    final = end_state(directory)
    same = all(torch.equal(final[key], value) for key, value in undisturbed.items())
    clean = not list(directory.glob(".unfinished-*"))
    text = (
        f"left steps {[int(path.name[-8:]) for path in whole]} and {litter} unfinished; resumed from {result['first']}"
    )
    return same and clean and result["first"] == newest, text


def is_whole(path: Path) -> bool:
    check_structure(path)  # a folder of that name is always whole: it raises here otherwise
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        calls = run_ranks(CASE.size, train_to_the_end, Path(folder) / "undisturbed", None)[0]["calls"]
        undisturbed = end_state(Path(folder) / "undisturbed")
        for number in range(options.kills):
            victims = chance.choice([(0, 1), (0,), (1,)])
            kill = Kill(chance.randint(1, calls * 9 // 10), victims, asynchronous=number % 2 == 0)
            good, text = survives(kill, Path(folder) / str(number), undisturbed)
            survived += good
            mode = "background" if kill.asynchronous else "foreground"
            print(
                f"{'ok  ' if good else 'BAD '} {mode} save, call {kill.call} of {calls}, ranks {victims}: {text}",
                flush=True,
            )
    print(f"{survived} of {options.kills} kills: resumed from the newest complete checkpoint, ended bitwise equal")
    raise SystemExit(0 if survived == options.kills else 1)


if __name__ == "__main__":
    main()
