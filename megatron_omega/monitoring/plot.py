"""loss.png: training and validation losses over steps, drawn from the run folder's own files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

from megatron_omega.host.json_lines import read_objects
from megatron_omega.host.run_folder import EVENTS, METRICS, PLOT
from megatron_omega.log import get_logger
from megatron_omega.monitoring.lasting import Lasting
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import EvaluationReport, RunContext

log = get_logger(__name__)

MOST_POINTS = 2000
SMOOTHED_SHARE = 0.05
"""Of all steps: what the running mean of the training losses covers."""
CURVES = (("lm_loss", "language modelling", "tab:blue"), ("mlm_loss", "masked tokens", "tab:orange"))


ANSWER_COLOURS = ("tab:green", "tab:red", "tab:purple", "tab:brown")


class LossPlot(Hook):
    """Draws loss.png after every validation and at the end."""

    def __init__(self) -> None:
        self._run_directory: Path | None = None
        self._lasting = Lasting(PLOT)

    def on_start(self, context: RunContext) -> None:
        self._run_directory = context.run_directory

    def on_evaluate(self, report: EvaluationReport) -> None:
        self._draw(f"as of step {report.step}")

    def on_close(self) -> None:
        self._draw("as of the end")
        self._lasting.close()

    def _draw(self, item: str) -> None:
        if self._run_directory is None:
            return
        directory = self._run_directory
        try:
            self._lasting.attempt(lambda: plot_losses(directory), item)
        except (OSError, ImportError) as error:
            self._run_directory = None
            log.warning("%s is not drawn any more: %s", PLOT, error)


def plot_losses(run_directory: Path) -> Path | None:
    """Draw the losses of a run; return the picture's path, or nothing where no loss was recorded.

    Raises:
        OSError: the picture cannot be written.
    """
    steps = list(read_objects(run_directory / METRICS))
    validations = _last_of_each_step(e for e in read_objects(run_directory / EVENTS) if e.get("event") == "evaluate")
    if not steps and not validations:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global figure, no display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for field, label, colour in CURVES:
        x, y = series(steps, field)
        axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.3)
        axes.plot(x, smoothed(y), color=colour, linewidth=1.4, label=f"{label}, training (running mean)")
        x, y = series(validations, field)
        axes.plot(x, y, color=colour, marker="o", markersize=4, linestyle="--", label=f"{label}, validation")
    _add_answers(axes, validations)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=run_directory.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_directory / PLOT
    unfinished = path.with_suffix(".tmp.png")
    figure.savefig(unfinished, dpi=110)
    return unfinished.replace(path)


def _add_answers(axes: Any, validations: Sequence[dict[str, Any]]) -> None:
    """Draw what answers are worth, task by task, on an axis of their own; nothing where none were given."""
    names = dict.fromkeys(name for row in validations for name in row.get("answers") or {})
    if not names:
        return
    beside = axes.twinx()
    beside.set(ylabel="answers", ylim=(0, 1))
    for name, colour in zip(names, cycle(ANSWER_COLOURS), strict=False):
        x, y = series([row | (row.get("answers") or {}) for row in validations], name)
        beside.plot(x, y, color=colour, marker="s", markersize=4, linestyle=":", label=name)
    beside.legend(loc="lower right")


def series(rows: Sequence[dict[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """Return steps and values of `field` where it was measured, thinned to at most about `MOST_POINTS` points."""
    measured = [(row["step"], row[field]) for row in rows if row.get(field) is not None]
    thinned = measured[:: -(-len(measured) // MOST_POINTS) or 1]
    return [step for step, _ in thinned], [value for _, value in thinned]


def smoothed(values: Sequence[float], share: float = SMOOTHED_SHARE) -> list[float]:
    """Return the running mean over the last `share` of the values, at least of a few; a line for the eye.

    >>> smoothed([4.0, 2.0, 0.0, 0.0], share=0.5)
    [4.0, 3.0, 1.0, 0.0]
    """
    width = max(2, round(share * len(values)))
    sums = list(accumulate(values, initial=0.0))
    return [(sums[end] - sums[max(0, end - width)]) / (end - max(0, end - width)) for end in range(1, len(values) + 1)]


def _last_of_each_step(rows: Any) -> list[dict[str, Any]]:
    """Return one validation for each step, ascending: a resumed run repeats some."""
    newest = {row["step"]: row for row in rows}
    return [newest[step] for step in sorted(newest)]
