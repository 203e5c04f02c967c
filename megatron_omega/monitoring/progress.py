"""A bar on a terminal; lines in a log elsewhere."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta
from typing import Any, TextIO

from tqdm import tqdm

from megatron_omega.config.schema import LoggingConfig
from megatron_omega.log import get_logger
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import BadStep, EvaluationReport, Fault, Rollback, RunContext, StepReport

log = get_logger(__name__)


def describe_losses(report: StepReport | EvaluationReport) -> str:
    """Return `loss 5.2103 (lm 5.1020, mlm 6.2001)`; the parts only if there are two."""
    if math.isnan(report.mlm_loss):
        return f"loss {report.loss:.4f} (lm {report.lm_loss:.4f})"
    return f"loss {report.loss:.4f} (lm {report.lm_loss:.4f}, mlm {report.mlm_loss:.4f})"


def describe_answers(report: EvaluationReport) -> str:
    """Return `; answers: qa exact_match 0.812`, or nothing without any."""
    told = ", ".join(f"{name} {value:.3f}" for name, value in report.answers.items())
    return f"; answers: {told}" if told else ""


class RunningLosses:
    """Losses of steps as a line shows them: the MLM loss as a running mean, since few steps have many masked tokens."""

    DECAY = 0.9

    def __init__(self) -> None:
        self._masked: float | None = None

    def describe(self, report: StepReport) -> str:
        """Return `lm 5.1020, mlm 6.2001`, or `mlm -` before the first masked token."""
        if not math.isnan(report.mlm_loss):
            last = report.mlm_loss if self._masked is None else self._masked
            self._masked = self.DECAY * last + (1 - self.DECAY) * report.mlm_loss
        return f"lm {report.lm_loss:.4f}, mlm {'-' if self._masked is None else f'{self._masked:.4f}'}"


def describe_speed(report: StepReport) -> str:
    """Return `12,345 tokens/s, MFU 31.2%`; MFU only where it is known."""
    known = math.isfinite(report.mfu) and report.mfu > 0
    return f"{report.tokens_per_second:,.0f} tokens/s" + (f", MFU {report.mfu:.1%}" if known else "")


def describe_step(report: StepReport, losses: str, train_steps: int, seconds_left: float) -> str:
    """Return the log line of one step; `losses` as `RunningLosses` tells them."""
    skipped = ", SKIPPED" if report.skipped else ""
    return (
        f"step {report.step:,}/{train_steps:,}: {losses}, grad norm {report.grad_norm:.4g}, "
        f"learning rate {report.learning_rate:.3g}, {describe_speed(report)}, {report.step_seconds:.3g} s, "
        f"{timedelta(seconds=round(seconds_left))} left{skipped}"
    )


def describe_badness(report: BadStep) -> str:
    """Return `loss spike: LM loss 9.1234, 12.3 robust deviations above ...`, or what is not finite."""
    if report.cause != "loss spike":
        return f"{report.cause}, loss {report.loss:.4f}"
    height = f"{report.z_score:.1f} robust deviations above the last accepted ones"
    return f"{report.cause}: LM loss {report.lm_loss:.4f}, {height}"


class ProgressBar(Hook):
    """Shows loss, speed, MFU and the time left."""

    def __init__(self, config: LoggingConfig, stream: TextIO | None = None) -> None:
        self._config = config
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._train_steps = 0
        self._first_step = 0
        self._started = 0.0
        self._losses = RunningLosses()

    def on_start(self, context: RunContext) -> None:
        self._train_steps = context.config.training.train_steps
        self._first_step, self._started = context.state.step, time.monotonic()
        if self._config.progress_bar and self._stream.isatty():
            self._bar = tqdm(
                total=self._train_steps, initial=self._first_step, file=self._stream, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, report: StepReport) -> None:
        losses = self._losses.describe(report)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{losses}, {describe_speed(report)}", refresh=False)
            self._bar.update()
        elif report.step % self._config.interval_steps == 0 or report.step == self._train_steps:
            log.info("%s", describe_step(report, losses, self._train_steps, self._seconds_left(report.step)))

    def on_bad_step(self, report: BadStep) -> None:
        self._warn(
            f"step {report.step:,} was skipped: {describe_badness(report)} (bad step {report.in_a_row} in a row; "
            "its documents are in events.jsonl)"
        )

    def on_fault(self, fault: Fault) -> None:
        self._warn(fault.message)

    def on_rollback(self, rollback: Rollback) -> None:
        where = (
            f"back to the checkpoint of step {rollback.to_step:,}"
            if rollback.to_step < rollback.from_step
            else "no checkpoint to go back to, and skipped steps changed nothing: going on behind them"
        )
        self._warn(f"{rollback.reason}: {where} (rollback {rollback.number})")
        if self._bar is not None:
            self._bar.n = rollback.to_step

    def on_evaluate(self, report: EvaluationReport) -> None:
        self._say(f"validation after step {report.step:,}: {describe_losses(report)}{describe_answers(report)}")

    def on_stop_requested(self, reason: str) -> None:
        self._say(f"stopping: {reason}")

    def on_close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            log.info("%s", line)

    def _warn(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        log.warning("%s", line)

    def _seconds_left(self, step: int) -> float:
        done = max(1, step - self._first_step)
        return (time.monotonic() - self._started) / done * (self._train_steps - step)
