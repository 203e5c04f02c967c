"""The planner's word in the log: what a run is expected to take at its start, and what it took at its end."""

from __future__ import annotations

import resource
import statistics

from megatron_omega.log import get_logger
from megatron_omega.planner.estimate import Estimate
from megatron_omega.planner.forecast import forecast_lines
from megatron_omega.planner.hardware import GIB
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import RunContext, StepReport

log = get_logger(__name__)
WARM_UP_STEPS = 2


class Forecast(Hook):
    """Logs the forecast when the run starts, and beside it what was measured when the run ends."""

    def __init__(self, estimate: Estimate) -> None:
        self._estimate = estimate
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
            "median step %.3g s (forecast %.3g); peak memory of this rank %.2f GiB, libraries included (forecast %.2f "
            "on the fullest rank, without them)",
            statistics.median(steady),
            self._estimate.step_seconds,
            _peak_bytes(self._estimate) / GIB,
            self._estimate.peak_memory / GIB,
        )


def _peak_bytes(estimate: Estimate) -> int:
    """Return the most memory this rank has held so far: of the GPU where there is one, else of the process."""
    if not estimate.hardware.facts.is_cpu:
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
