"""The planner's word in the log: what a run is expected to take at its start, and what it took at its end."""

from __future__ import annotations

import resource
import statistics
from pathlib import Path

import torch

from megatron_omega.log import get_logger
from megatron_omega.planner.estimate import Estimate
from megatron_omega.planner.forecast import forecast_lines
from megatron_omega.planner.hardware import GIB
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import RunContext, StepReport

log = get_logger(__name__)
WARM_UP_STEPS = 2


class Forecast(Hook):
    """Logs the forecast when the run starts, and beside it what was measured when the run ends.

    `baseline` is what `peak_bytes` gave before the engine was built; the forecast does not count it.
    """

    def __init__(self, estimate: Estimate, baseline: int) -> None:
        self._estimate = estimate
        self._baseline = baseline
        self._seconds: list[float] = []

    def on_start(self, context: RunContext) -> None:
        for line in forecast_lines(self._estimate):
            log.info(line)

    def on_step_end(self, report: StepReport) -> None:
        self._seconds.append(report.step_seconds)

    def on_close(self) -> None:
        steady = self._seconds[WARM_UP_STEPS:]
        if not steady:
            return
        log.info(
            "median step %.3g s (forecast %.3g); peak memory of rank 0 %.3g GiB (forecast %.3g, the fullest rank %.3g)",
            statistics.median(steady),
            self._estimate.step_seconds,
            (peak_bytes() - self._baseline) / GIB,
            self._estimate.ranks[0].total / GIB,
            self._estimate.peak_memory / GIB,
        )


def peak_bytes() -> int:
    """Return the most memory that this process has held so far: of its GPU where it uses one, else of its own.

    Of a process's memory, pages of files (libraries) are left out: processes share them, and the kernel may drop them.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    highest, files = (int(fields[name].split()[0]) for name in ("VmHWM", "RssFile"))
    return (highest - files) * 1024
