"""The planner's word in the log: what a run is expected to take at its start, and beside it what it took at its end."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from megatron_omega.log import get_logger
from megatron_omega.planner.forecast import RunForecast, forecast_lines
from megatron_omega.planner.hardware import GIB
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import RunContext, StepReport

log = get_logger(__name__)
WARM_UP_STEPS = 2
NOTEWORTHY = 0.2
"""Relative gap from which the last line says why."""


class Forecast(Hook):
    """Logs the forecast when the run starts; when it ends, what was measured beside it, and the reason of a gap."""

    def __init__(self, run: RunForecast) -> None:
        self._run = run
        self._seconds: list[float] = []
        self._load = CoreLoad()

    def on_start(self, context: RunContext) -> None:
        for line in forecast_lines(self._run):
            log.info(line)
        self._load = CoreLoad()

    def on_step_end(self, report: StepReport) -> None:
        self._seconds.append(report.step_seconds)

    def on_close(self) -> None:
        if steady := self._seconds[WARM_UP_STEPS:]:
            others = self._load.share_of_others() if self._run.machine.hardware.facts.is_cpu else 0.0
            log.info(comparison(self._run, statistics.median(steady), peak_bytes(), others))


def comparison(run: RunForecast, step_seconds: float, memory_bytes: int, others: float) -> str:
    """Return forecast beside measured in a line, with the reason of what is far off; `others`: their share of cores."""
    time_gap = step_seconds / run.estimate.step_seconds - 1
    memory_gap = memory_bytes / run.memory_bytes - 1
    line = (
        f"median step {step_seconds:.3g} s (forecast {run.estimate.step_seconds:.3g}, {time_gap:+.0%}); peak memory of "
        f"rank 0 {memory_bytes / GIB:.3g} GiB (forecast {run.memory_bytes / GIB:.3g}, {memory_gap:+.0%})"
    )
    reasons = [*_time_reasons(run, time_gap, others)] if abs(time_gap) > NOTEWORTHY else []
    if abs(memory_gap) > NOTEWORTHY:
        reasons.append("memory: the allocator's fragments and libraries differ from what was measured before")
    return ". ".join([line, *reasons])


def _time_reasons(run: RunForecast, gap: float, others: float) -> Iterator[str]:
    """Yield what may explain a step that takes longer, or shorter, than forecast."""
    if gap > 0 and others > 0.1:
        yield f"time: other programs took {others:.0%} of the cores meanwhile"
    elif not run.machine.is_calibrated:
        yield f"time: {run.machine.origin}"
    else:
        yield f"time: the machine was {run.machine.origin}, and may run at another speed now (megatron-omega calibrate)"


class CoreLoad:
    """How much of this machine's cores went to programs other than this run, since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy = _busy_seconds()
        self._own = _own_seconds()

    def share_of_others(self) -> float:
        """Return the share of all cores, 0 to 1; 0 if too short a time went by to say."""
        seconds = (time.monotonic() - self._began) * (psutil.cpu_count() or 1)
        taken = _busy_seconds() - self._busy - max(0.0, _own_seconds() - self._own)
        return min(1.0, max(0.0, taken / seconds)) if seconds > 1 else 0.0


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _own_seconds() -> float:
    """Return the CPU time of this rank and of what its launcher started beside it."""
    parent = psutil.Process().parent()
    total = 0.0
    for process in parent.children(recursive=True) if parent is not None else [psutil.Process()]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # it ended meanwhile
        total += times.user + times.system
    return total


def peak_bytes() -> int:
    """Return the most memory that this process has held so far: of its GPU where it uses one, else of its own.

    Of a process's memory, pages of files (libraries) are left out: processes share them, and the kernel may drop them.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return _own_bytes("VmHWM")


def held_bytes() -> int:
    """Return the memory that this process holds now, as `peak_bytes` counts it."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_reserved()
    return _own_bytes("VmRSS")


def _own_bytes(field: str) -> int:
    """Return a figure of the kernel's, in bytes, without the pages of files."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    whole, files = (int(fields[name].split()[0]) for name in (field, "RssFile"))
    return (whole - files) * 1024
