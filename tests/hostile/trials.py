"""One command in a process of its own, forked from this one, and how it ended: an exit code, a traceback, or a hang."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_omega.commands.main import main

CPU_SECONDS = 20
MEMORY_BYTES = 16 << 30
TRACEBACK, HANG = "traceback", "hang"


@dataclass(frozen=True)
class Outcome:
    """How a command ended, what it said, and the processor's seconds it took."""

    end: int | str
    output: str
    seconds: float


def run_command(words: Sequence[object], folder: Path, most_seconds: float = CPU_SECONDS) -> Outcome:
    """Run `megatron-omega WORDS`; a command that computes for longer than `most_seconds`, or waits ten times so, hangs."""
    output = folder / "output.txt"
    child = os.fork()
    if child == 0:
        _become(output, [str(word) for word in words], most_seconds)
    started = time.monotonic()
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - started > 10 * most_seconds:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    text = output.read_text(errors="replace")
    seconds = used.ru_utime + used.ru_stime
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return Outcome(HANG if number in (signal.SIGKILL, signal.SIGXCPU) else f"signal {number}", text, seconds)
    code = os.WEXITSTATUS(status)
    ended_badly = re.search(r"^Traceback \(most recent call last\)", text, re.MULTILINE)  # a shown text may quote one
    return Outcome(TRACEBACK if ended_badly else code, text, seconds)


def _become(output: Path, words: Sequence[str], most_seconds: float) -> None:
    """Turn this process into the command; never returns."""
    code = 70
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, other in ((0, os.open(os.devnull, os.O_RDONLY)), (1, descriptor), (2, descriptor)):
            os.dup2(other, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        spent = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(spent.ru_utime + spent.ru_stime + most_seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        code = main(words) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
