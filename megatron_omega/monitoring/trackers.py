"""TensorBoard and Weights & Biases. Both optional; neither can stop a run."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_omega.config.schema import LoggingConfig
from megatron_omega.host.redaction import redact, redacted
from megatron_omega.log import get_logger
from megatron_omega.monitoring.lasting import is_passing
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import EvaluationReport, Rollback, RunContext, StepReport

log = get_logger(__name__)

WANDB_ID = "wandb_run_id"
_RETRY_STEPS = 10


def scalars(report: StepReport | EvaluationReport) -> dict[str, float]:
    """Return the named numbers of a report, without its step."""
    values = asdict(report)
    values |= values.pop("answers", {})
    return {name: float(value) for name, value in values.items() if name != "step" and value is not None}


class Tracker(Hook):
    """A hook whose failure is one warning, and training goes on.

    Afterwards it is silent; if a full or absent disk was the reason, it is opened again now and then.
    """

    name: str

    def __init__(self) -> None:
        self._sink: Any = None
        self._context: RunContext | None = None
        self._failed_at: int | None = None
        self._step = 0

    def _attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self._sink = None
            if not is_passing(error):
                self._context = None
                log.warning("%s failed and is off for the rest of this run: %s", self.name, error)
            elif self._failed_at is None:
                log.warning("%s cannot be written (%s): training goes on, and so do the attempts", self.name, error)
            if is_passing(error) and self._failed_at is None:
                self._failed_at = self._step
            return None

    def _open_again(self) -> None:
        """Open the tracker again behind the gap that a full disk has left, and name the gap."""
        context, step = self._context, self._step
        if self._sink is not None or context is None or self._failed_at is None or step % _RETRY_STEPS:
            return
        self._sink = self._attempt(lambda: self._open(replace(context, state=replace(context.state, step=step))))
        if self._sink is not None:
            log.warning("%s is written again; missing: steps %d to %d", self.name, self._failed_at, step)
            self._failed_at = None

    def _open(self, context: RunContext) -> Any:
        raise NotImplementedError

    def _write(self, group: str, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def on_start(self, context: RunContext) -> None:
        self._context, self._step = context, context.state.step
        self._sink = self._attempt(lambda: self._open(context))

    def on_step_end(self, report: StepReport) -> None:
        self._step = report.step
        self._open_again()
        if self._sink is not None:
            self._attempt(lambda: self._write("train", report.step, scalars(report)))

    def on_evaluate(self, report: EvaluationReport) -> None:
        if self._sink is not None:
            self._attempt(lambda: self._write("validation", report.step, scalars(report)))

    def on_close(self) -> None:
        if self._sink is not None:
            self._attempt(self._close)
            self._sink = None


class TensorBoard(Tracker):
    """Writes events under the run folder's `tensorboard/`; a resumed run hides the steps it does again."""

    name = "TensorBoard (logging.tensorboard)"

    _directory = ""

    def _open(self, context: RunContext) -> Any:
        self._directory = str(context.run_directory / "tensorboard")
        _silence_full_disks()
        return self._open_behind(context.state.step)

    def _open_behind(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(log_dir=self._directory, purge_step=step + 1 if step else None)

    def on_rollback(self, rollback: Rollback) -> None:
        if self._sink is not None:
            self._attempt(self._close)
            self._sink = self._attempt(lambda: self._open_behind(rollback.to_step))

    def _write(self, group: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._sink.add_scalar(f"{group}/{name}", value, step)

    def on_evaluate(self, report: EvaluationReport) -> None:
        super().on_evaluate(report)
        if self._sink is not None:
            self._attempt(self._sink.flush)

    def _close(self) -> None:
        self._sink.close()


def _silence_full_disks() -> None:
    """Keep the traceback of TensorBoard's writing thread out of the log; the tracker hears of the error and warns."""
    told = threading.excepthook
    if getattr(told, "is_quiet", False):
        return

    def quiet(failed: threading.ExceptHookArgs) -> None:
        is_writer = type(failed.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and failed.exc_value is not None and is_passing(failed.exc_value)):
            told(failed)

    quiet.is_quiet = True  # pyright: ignore[reportFunctionMemberAccess]
    threading.excepthook = quiet


class Wandb(Tracker):
    """Logs to Weights & Biases under one run id over all restarts, kept in the run folder."""

    name = "Weights & Biases (logging.wandb)"

    def __init__(self, config: LoggingConfig) -> None:
        super().__init__()
        self._config = config

    def _open(self, context: RunContext) -> Any:
        import wandb

        run = wandb.init(
            project=redact(self._config.wandb_project),
            name=context.run_directory.name,
            id=run_id(context.run_directory),
            resume="allow",
            mode="offline" if self._config.wandb == "offline" else "online",
            dir=str(context.run_directory),
            config=redacted(context.config.model_dump(mode="json")),
            settings=wandb.Settings(init_timeout=60, silent=True, x_disable_meta=True),
        )
        for group in ("train", "validation"):  # W&B's own step only ever grows: steps done again would be dropped
            run.define_metric(f"{group}/*", step_metric="step")
        return run

    def _write(self, group: str, step: int, values: dict[str, float]) -> None:
        self._sink.log({"step": step, **{f"{group}/{name}": value for name, value in values.items()}})

    def on_error(self, error: BaseException) -> None:
        if self._sink is not None:
            self._attempt(lambda: self._sink.finish(exit_code=1))
            self._sink = None

    def _close(self) -> None:
        self._sink.finish()


def run_id(run_directory: Path) -> str:
    """Return the run's id: the one in the run folder, made at the first start."""
    path = run_directory / WANDB_ID
    if not path.exists():
        path.write_text(f"{secrets.token_hex(6)}\n", encoding="ascii")
    return path.read_text(encoding="ascii").strip()
