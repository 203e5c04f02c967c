"""`python -m faults.hangs` (from tests/): stop a random rank at a random moment, and see whether the diagnosis names it.

The judge of the frame is py-spy, which reads the memory of the stopped process and knows nothing of ours.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from faults.laboratory import Laboratory, after_step, last_words
from faults.ranks import Ending


def true_frame(pid: int) -> tuple[str, int, str]:
    """Return (file name, line, function) of the innermost Python frame of a stopped process's main thread."""
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--json", "--pid", str(pid)]
    threads: list[dict[str, Any]] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    main = next(thread for thread in threads if thread["os_thread_id"] == pid)
    frame = main["frames"][0]
    return Path(frame["filename"]).name, frame["line"], frame["name"].rpartition(".")[2]


def trial(lab: Laboratory, number: int) -> tuple[bool, str]:
    """Return whether one stopped rank was named with its frame, and what was said."""
    run = lab.run("--training.train_steps", "60", "--checkpoint.interval_steps", "5", name=f"hang-{number}")
    rank = lab.random.randrange(run.world_size)
    attempt = run.start()
    after_step(attempt, 4, jitter=lab.random.random() * 3)
    attempt.send(rank, signal.SIGSTOP)
    now = time.monotonic()
    file, line, function = true_frame(attempt.pid(rank))
    ending: Ending = attempt.wait(since=now)
    named = re.search(r"hang: rank (\d+) .*\n  at (?:\S*/)?([^/:\s]+):(\d+) in (\w+|<\w+>)", ending.log)
    found = named and (int(named[1]), named[2], int(named[3]), named[4])
    is_right = found == (rank, file, line, function) and set(ending.codes) == {76}
    truth = f"rank {rank} at {file}:{line} in {function}, {ending.seconds:.1f} s"
    return is_right, f"{truth}: {'named' if is_right else f'the diagnosis was {found}: {last_words(ending.log)}'}"


def main() -> int:
    """Return 0 where every diagnosis was right."""
    parser = argparse.ArgumentParser(prog="faults.hangs", description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument(
        "--layout", default="2x2x2", choices=["2x2x2", "4x1x2", "1x2x1"], help="pipeline x data x tensor"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of ranks and moments (default: the time)")
    options = parser.parse_args()
    right = 0
    with Laboratory(layout=options.layout, seed=options.seed) as lab:
        for number in tqdm(range(options.trials), desc="hangs", disable=not sys.stderr.isatty()):
            is_right, said = trial(lab, number)
            right += is_right
            print(f"{'PASS' if is_right else 'FAIL'}  {said}", flush=True)
    print(f"{right} of {options.trials} diagnoses name the right rank and frame, seed {options.seed}")
    return 0 if right == options.trials else 1


if __name__ == "__main__":
    sys.exit(main())
