"""The hook that tells the monitor what the loop is doing, and how long that may take before it counts as a hang."""

from __future__ import annotations

from collections import deque

from megatron_omega.config.schema import RunConfig
from megatron_omega.host.environment import has_gpu
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import EvaluationReport, RunContext, StepReport
from megatron_omega.watchdog.guard import Guard

_REMEMBERED_STEPS = 50
_MEASURED_STEPS = 2
_FACTOR = 3.0
_FLOOR_SECONDS = {"device": 60.0, "cpu": 15.0}
"""A step that waits for a file system is slow, not stuck: on a GPU, whose steps are short, nothing sooner is a hang."""
_STEP_LIKE = ("in a step", "validating")


class Patience:
    """How long a step may make no progress: measured, unless configured.

    Three times the slowest of the last steps, and no less than a floor.
    """

    def __init__(self, configured_seconds: float | None, unknown_seconds: float, floor_seconds: float) -> None:
        """`unknown_seconds` counts until some steps are measured: the first ones compile and allocate."""
        self._configured = configured_seconds
        self._unknown = unknown_seconds
        self._floor = floor_seconds
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._is_warm = False

    def observe(self, step_seconds: float) -> None:
        """Take a finished step into account; the first one, which warms up, is not like the others."""
        if self._is_warm:
            self._seconds.append(step_seconds)
        self._is_warm = True

    @property
    def allowed_seconds(self) -> float:
        """How long the next step may take."""
        if len(self._seconds) < _MEASURED_STEPS:
            return self._unknown
        return self._configured or max(_FACTOR * max(self._seconds), self._floor)


class Watch(Hook):
    """Beats at every phase of the loop."""

    def __init__(self, guard: Guard, config: RunConfig) -> None:
        resilience = config.resilience
        self._guard = guard
        self._unknown = resilience.start_timeout_seconds
        floor = resilience.hang_floor_seconds or _FLOOR_SECONDS["device" if has_gpu() else "cpu"]
        self._patience = Patience(resilience.hang_timeout_seconds, self._unknown, floor)
        self._long = float(config.parallel.timeout_seconds)
        self._validates_first = config.training.compile == "layers"

    def on_start(self, context: RunContext) -> None:
        self._guard.arm()

    def on_phase(self, phase: str, step: int) -> None:
        allowed = self._patience.allowed_seconds if phase in _STEP_LIKE else self._long
        if phase == "validating" and self._validates_first:  # it compiles, which is no hang
            allowed, self._validates_first = max(allowed, self._unknown), False
        self._guard.beacon.beat(phase, step=step, allowed_seconds=allowed)

    def on_step_end(self, report: StepReport) -> None:
        self._patience.observe(report.step_seconds)
        self._guard.beacon.beat("between two steps", step=report.step)

    def on_evaluate(self, report: EvaluationReport) -> None:
        """Let the other hooks write and draw: a slow file system is no hang."""
        self._guard.beacon.beat("recording a validation", step=report.step, allowed_seconds=self._long)

    def on_close(self) -> None:
        self._guard.beacon.beat("ending", allowed_seconds=self._long)
