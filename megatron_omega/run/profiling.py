"""`training.profile_steps`: a trace of some steps of chosen ranks, for chrome://tracing or perfetto.dev."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from megatron_omega.config.schema import RunConfig
from megatron_omega.engine.engine import Engine
from megatron_omega.host import run_folder
from megatron_omega.log import get_logger
from megatron_omega.run.ranges import named_ranges
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import StepReport

log = get_logger(__name__)


def profiling_hooks(config: RunConfig, engine: Engine) -> list[Hook]:
    """Return what traces this rank; nothing if it is not among those that are."""
    steps, rank = config.training.profile_steps, engine.topology.rank
    if steps is None or rank not in config.training.profile_ranks:
        return []
    return [Profiling(config, engine, steps)]


class Profiling(Hook):
    """Traces from the beginning of the first step to the end of the last, and writes the trace."""

    def __init__(self, config: RunConfig, engine: Engine, steps: tuple[int, int]) -> None:
        self._first, self._last = steps
        self._engine, self._is_compiled = engine, config.training.compile == "layers"
        folder = Path(config.logging.run_directory) / run_folder.TRACES
        self._path = folder / f"steps-{self._first}-{self._last}-rank-{engine.topology.rank}.json.gz"
        self._tracing: ExitStack | None = None
        self._profiler: Any = None

    def on_step_begin(self, step: int) -> None:
        if self._first <= step <= self._last and self._tracing is None:
            activities = [ProfilerActivity.CPU]
            if self._engine.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._tracing = ExitStack()
            self._profiler = self._tracing.enter_context(profile(activities=activities))
            self._tracing.enter_context(named_ranges(self._engine, is_compiled=self._is_compiled))

    def on_step_end(self, report: StepReport) -> None:
        if report.step >= self._last:
            self._write()

    def on_close(self) -> None:
        self._write()

    def _write(self) -> None:
        if self._tracing is None:
            return
        self._tracing.close()
        self._tracing = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._path))
        except OSError as error:
            log.warning("the trace %s could not be written: %s", self._path, error.strerror)
            return
        log.info("wrote %s; open it in https://ui.perfetto.dev", self._path)
