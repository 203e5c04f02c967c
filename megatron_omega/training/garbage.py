"""Python's garbage collector at places of our choosing.

A full collection of what a training process holds takes some tenths of a second. Left alone, each rank does it when it
happens to be due, and all others wait for it. What exists when training begins stays, so it is never looked at again;
the rest is collected by all ranks after the same steps.
"""

from __future__ import annotations

import gc

from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import RunContext, StepReport

INTERVAL_STEPS = 100
"""A step leaves few cycles behind; all of them together take milliseconds."""


class GarbageCollection(Hook):
    """Collects after every `INTERVAL_STEPS` steps, and at no other time while training runs."""

    def on_start(self, context: RunContext) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def on_step_end(self, report: StepReport) -> None:
        if report.step % INTERVAL_STEPS == 0:
            gc.collect()

    def on_close(self) -> None:
        gc.enable()
        gc.unfreeze()
