"""metrics.jsonl (one object for each step) and events.jsonl (one for everything else), readable while a run writes."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import chain, count
from pathlib import Path
from typing import Any

import psutil

from megatron_omega.errors import OmegaError
from megatron_omega.host.events import append_event
from megatron_omega.host.json_lines import append_line, encode_line, read_objects, read_places
from megatron_omega.host.run_folder import EVENTS, METRICS, SUCCESS
from megatron_omega.monitoring.epochs import EpochsAt
from megatron_omega.monitoring.history import reading
from megatron_omega.monitoring.lasting import Lasting
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import BadStep, EvaluationReport, Fault, Rollback, RunContext, StepReport, TrainState


def mark_success(run_directory: Path, step: int) -> None:
    """Say that the run is complete: everything else is on disk by now. Raises OmegaError if that cannot be written."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    unfinished = run_directory / f".{SUCCESS}"
    try:
        unfinished.write_bytes(encode_line({"step": step, "time": now}))
        unfinished.replace(run_directory / SUCCESS)
    except OSError as error:
        raise OmegaError(
            f"the run is complete and saved, but {run_directory / SUCCESS} cannot be written: {error.strerror}; mend "
            "the file system and start it again: it has nothing left to do"
        ) from None


DocumentsOf = Callable[[Sequence[range]], list[dict[str, Any]]]
"""From sample numbers to a few words on each document they hold text of."""


def last_sign(run_directory: Path) -> float | None:
    """Return when a run last wrote one of its files, seconds since the epoch; None where it never did."""
    files = [run_directory / name for name in (METRICS, EVENTS)]
    return max((path.stat().st_mtime for path in files if path.exists()), default=None)


class MetricsFile(Hook):
    """Writes a line of metrics.jsonl for each step. A resumed run continues it; steps done again replace the old."""

    def __init__(self, epochs_at: EpochsAt | None = None) -> None:
        """`epochs_at` adds passes through the text to every line."""
        self._path: Path | None = None
        self._lasting = Lasting(METRICS)
        self._epochs_at = epochs_at

    def on_start(self, context: RunContext) -> None:
        path = context.run_directory / METRICS
        self._lasting.attempt(lambda: keep_steps(path, context.state.step), "the cut of steps that are done again")
        self._path = path

    def on_step_end(self, report: StepReport) -> None:
        if self._path is not None:
            path, line = self._path, encode_line(asdict(report) | self._epochs(report.consumed_samples))
            self._lasting.attempt(lambda: append_line(path, line), f"step {report.step}")

    def _epochs(self, samples: int) -> dict[str, Any]:
        if self._epochs_at is None:
            return {}
        epochs = self._epochs_at(samples)
        return {"epoch": round(epochs.blend, 6), "corpus_epochs": {k: round(v, 6) for k, v in epochs.corpora.items()}}

    def on_rollback(self, rollback: Rollback) -> None:
        if self._path is not None:
            path = self._path
            self._lasting.attempt(lambda: keep_steps(path, rollback.to_step), "the cut of steps that are done again")

    def on_close(self) -> None:
        self._lasting.close()
        self._path = None


def keep_steps(path: Path, last_step: int) -> None:
    """Cut a metrics file behind `last_step`. A run that starts at 0 sets an older file aside: `*.previous.jsonl`."""
    if not path.exists():
        return
    if last_step == 0 and path.stat().st_size:
        path.replace(_free_name(path))
        return
    end = 0
    for line_end, value in read_places(path):
        if value.get("step", 0) > last_step:
            break
        end = line_end
    with path.open("r+b") as file:
        file.truncate(end)


def _free_name(path: Path) -> Path:
    """Return a name beside `path` for what it holds: nothing that was set aside before is overwritten."""
    names = chain([".previous.jsonl"], (f".previous-{number}.jsonl" for number in count(2)))
    return next(name for name in map(path.with_suffix, names) if not name.exists())


def _passed_over(state: TrainState) -> dict[str, Any]:
    return {"left_out": state.left_out} if state.left_out else {}


class EventsFile(Hook):
    """Appends to events.jsonl. Nothing is ever taken out of it: a run that was started five times says so.

    Stands before the hook that writes metrics.jsonl, to count the steps which that is going to replace.
    """

    def __init__(self, documents_of: DocumentsOf | None = None) -> None:
        """`documents_of` names the documents of a bad batch."""
        self._path: Path | None = None
        self._lasting = Lasting(EVENTS)
        self._step = 0
        self._born = time.monotonic()
        self._documents_of = documents_of

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time and the step."""
        if self._path is None:
            return
        uptime = round(time.monotonic() - self._born, 3)
        directory, values = self._path.parent, {"uptime_seconds": uptime, **fields}
        self._lasting.attempt(
            lambda: append_event(directory, event, self._step, values), f"{event} after step {self._step}"
        )

    def on_start(self, context: RunContext) -> None:
        directory = context.run_directory
        self._path, self._step = directory / EVENTS, context.state.step
        startup = max(0.0, datetime.now().timestamp() - psutil.Process().create_time())
        self._born = time.monotonic() - startup
        self.write(
            "start", **(context.details or {}), startup_seconds=round(startup, 3), last_sign=last_sign(directory),
            is_fresh=not context.config.checkpoint.resume, **self._lost(context.state.step),
            **_passed_over(context.state), **reading(context.config, context.state),
        )  # fmt: skip

    def _lost(self, step: int) -> dict[str, Any]:
        """Count the steps behind `step`, which are going to be done again; before metrics.jsonl forgets them."""
        assert self._path is not None
        seconds = [
            r.get("step_seconds") or 0.0 for r in read_objects(self._path.with_name(METRICS)) if r["step"] > step
        ]
        return {"lost_steps": len(seconds), "lost_seconds": round(sum(seconds), 3)}

    def on_step_end(self, report: StepReport) -> None:
        self._step = report.step
        if report.skipped:
            self.write("skipped_step", grad_norm=report.grad_norm)

    def on_bad_step(self, report: BadStep) -> None:
        values = asdict(report)
        if self._documents_of is not None:
            values["documents"] = self._documents_of([range(*interval) for interval in report.samples])
        self.write("bad_step", **values)

    def on_fault(self, fault: Fault) -> None:
        self.write(fault.kind, message=fault.message, ranks=fault.ranks, **fault.details)

    def on_rollback(self, rollback: Rollback) -> None:
        self.write(
            "rollback", reason=rollback.reason, to_step=rollback.to_step, number=rollback.number,
            **self._lost(rollback.to_step), **_passed_over(rollback.state),
            consumed_samples=rollback.state.consumed_samples,
        )  # fmt: skip
        self._step = rollback.to_step

    def on_evaluate(self, report: EvaluationReport) -> None:
        self.write("evaluate", **asdict(report))

    def on_save(self, step: int, stall_seconds: float) -> None:
        self.write("save", saved_step=step, stall_seconds=stall_seconds)

    def on_checkpoint(self, path: Path, step: int) -> None:
        self.write("checkpoint", path=str(path), saved_step=step)

    def on_stop_requested(self, reason: str) -> None:
        self.write("stop_requested", reason=reason)

    def on_error(self, error: BaseException) -> None:
        trace = None if isinstance(error, OmegaError) else "".join(traceback.format_exception(error))
        self.write("error", kind=type(error).__name__, message=str(error), traceback=trace)

    def on_close(self) -> None:
        self.write("close")
        self._lasting.close()
        self._path = None
