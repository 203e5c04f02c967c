"""Side concerns of the loop as events. A hook overrides what it cares about; the loop does not know which there are.

Every rank calls every hook at the same place, so a hook may communicate, except in `on_error` and `on_close`: there
other ranks may be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_omega.log import get_logger
from megatron_omega.training.state import BadStep, EvaluationReport, Fault, Rollback, RunContext, StepReport

log = get_logger(__name__)


class Hook:
    """Something that happens beside the mathematics. Every method may stay as it is."""

    def on_start(self, context: RunContext) -> None:
        """Run once, before the first step and after a checkpoint was loaded."""

    def on_phase(self, phase: str, step: int) -> None:
        """Run when the loop begins something else: loading, a step, validating, saving."""

    def on_step_begin(self, step: int) -> None:
        """Run before the batches of step `step` (the first is 1) are drawn."""

    def on_step_end(self, report: StepReport) -> None:
        """Run after every optimizer step, skipped ones included."""

    def on_bad_step(self, report: BadStep) -> None:
        """Run after `on_step_end` of a step that was skipped as bad."""

    def on_fault(self, fault: Fault) -> None:
        """Run when a rank is found to compute wrongly or slowly."""

    def on_rollback(self, rollback: Rollback) -> None:
        """Run when the state of an earlier checkpoint has been loaded, before its next step is done again."""

    def on_evaluate(self, report: EvaluationReport) -> None:
        """Run after every validation."""

    def on_save(self, step: int, stall_seconds: float) -> None:
        """Run when training goes on after it started a save: so long it stood still."""

    def on_checkpoint(self, path: Path, step: int) -> None:
        """Run when the checkpoint of `step` is complete on disk."""

    def on_stop_requested(self, reason: str) -> None:
        """Run once when the run is asked to end before its last step."""

    def on_error(self, error: BaseException) -> None:
        """Run when the loop ends by an exception. Must not communicate."""

    def on_close(self) -> None:
        """Run last, whatever happened. Must not communicate."""


class Hooks(Hook):
    """Several hooks as one, called in their order."""

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self._hooks = tuple(hooks)

    def on_start(self, context: RunContext) -> None:
        for hook in self._hooks:
            hook.on_start(context)

    def on_phase(self, phase: str, step: int) -> None:
        for hook in self._hooks:
            hook.on_phase(phase, step)

    def on_step_begin(self, step: int) -> None:
        for hook in self._hooks:
            hook.on_step_begin(step)

    def on_step_end(self, report: StepReport) -> None:
        for hook in self._hooks:
            hook.on_step_end(report)

    def on_bad_step(self, report: BadStep) -> None:
        for hook in self._hooks:
            hook.on_bad_step(report)

    def on_fault(self, fault: Fault) -> None:
        for hook in self._hooks:
            hook.on_fault(fault)

    def on_rollback(self, rollback: Rollback) -> None:
        for hook in self._hooks:
            hook.on_rollback(rollback)

    def on_evaluate(self, report: EvaluationReport) -> None:
        for hook in self._hooks:
            hook.on_evaluate(report)

    def on_save(self, step: int, stall_seconds: float) -> None:
        for hook in self._hooks:
            hook.on_save(step, stall_seconds)

    def on_checkpoint(self, path: Path, step: int) -> None:
        for hook in self._hooks:
            hook.on_checkpoint(path, step)

    def on_stop_requested(self, reason: str) -> None:
        for hook in self._hooks:
            hook.on_stop_requested(reason)

    def on_error(self, error: BaseException) -> None:
        for hook in self._hooks:
            _shielded(lambda hook=hook: hook.on_error(error), hook)

    def on_close(self) -> None:
        for hook in self._hooks:
            _shielded(hook.on_close, hook)


def _shielded(call: Callable[[], None], hook: Hook) -> None:
    """Let a hook that fails at the end neither hide the first error nor keep the others from closing."""
    try:
        call()
    except Exception as error:
        log.warning("%s failed while the run was ending: %s", type(hook).__name__, error)
