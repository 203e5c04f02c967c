"""The validation loss of a checkpoint, under any layout: the run's own start and first validation, and then no step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.load import ResolvedRun, load_config
from megatron_omega.errors import ConfigError, Preempted
from megatron_omega.host import run_folder
from megatron_omega.host.environment import ProcessPlace
from megatron_omega.run.assembly import train
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import EvaluationReport


class _UntilValidated(Hook):
    """Keeps the first validation and ends the run there, on all ranks."""

    report: EvaluationReport | None = None

    def on_evaluate(self, report: EvaluationReport) -> None:
        self.report = report
        raise Preempted("validated")

    def on_step_begin(self, step: int) -> None:
        raise ConfigError("data.split leaves no document for validation; give it a second part that is larger")


def as_evaluation(arguments: Arguments) -> Arguments:
    """Return a run's command line turned into one that loads its weights and validates, in a folder of its own.

    Loaded is --load, else the newest checkpoint of the run.
    """
    config = load_config(arguments.config, arguments.overrides)
    directory = Path(config.logging.run_directory)
    settings = {
        "checkpoint.load": config.checkpoint.load or str(directory / run_folder.CHECKPOINTS),
        "checkpoint.load_weights_only": "true",
        "checkpoint.resume": "false",
        "evaluation.interval_steps": "1",
        "logging.run_directory": str(directory / "evaluation"),
        "logging.tensorboard": "false",
        "logging.wandb": "off",
    }
    overrides = (Override(name, text) for name, text in settings.items())
    return replace(arguments, overrides=(*arguments.overrides, *overrides))


def evaluate(resolved: ResolvedRun, place: ProcessPlace) -> EvaluationReport:
    """Validate as process `place` of a run made by `as_evaluation`. Raises ConfigError without a validation part."""
    hook = _UntilValidated()
    try:
        train(resolved, place, [hook])
    except Preempted:
        if hook.report is not None:
            return hook.report
        raise  # asked to stop
    raise AssertionError("training ended without a step")
