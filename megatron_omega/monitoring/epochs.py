"""How often a run has been through its text: of the blend and of each corpus, and when one begins again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_omega.log import get_logger
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import RunContext, StepReport

log = get_logger(__name__)


@dataclass(frozen=True)
class Epochs:
    """Passes through the text so far."""

    blend: float
    """Samples drawn over the samples of one epoch of all corpora."""
    corpora: dict[str, float]
    """The same of each corpus."""


EpochsAt = Callable[[int], Epochs]
"""From samples drawn to passes through the text."""


class EpochLog(Hook):
    """Says once when a corpus, or a task, begins again."""

    def __init__(self, epochs_at: EpochsAt) -> None:
        self._epochs_at = epochs_at
        self._seen: dict[str, int] = {}

    def on_start(self, context: RunContext) -> None:
        self._seen = self._whole(context.state.consumed_samples)

    def on_step_end(self, report: StepReport) -> None:
        now = self._whole(report.consumed_samples)
        for corpus, passes in now.items():
            if passes > self._seen.get(corpus, 0):
                times = "once" if passes == 1 else f"{passes} times"
                what = corpus if corpus.startswith("task ") else f"corpus {corpus}"
                log.info("step %d: %s has been read %s and begins again", report.step, what, times)
        self._seen = now

    def _whole(self, samples: int) -> dict[str, int]:
        return {corpus: int(passes) for corpus, passes in self._epochs_at(samples).corpora.items()}
