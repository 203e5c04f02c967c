"""The validation loss of a checkpoint, under any layout: the run's own start and first validation, and then no step."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_omega.checkpoint.catalogue import newest_whole
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.load import ResolvedRun, load_config
from megatron_omega.data.sources import open_sources
from megatron_omega.errors import ConfigError, Preempted
from megatron_omega.host import run_folder
from megatron_omega.host.environment import ProcessPlace
from megatron_omega.run.train import train
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


@dataclass(frozen=True)
class SavedWeights:
    """A checkpoint to measure."""

    path: Path
    step: int
    config: dict[str, Any]
    """Settings of the run that wrote it."""


def weights_of(path: Path | None, arguments: Arguments) -> SavedWeights:
    """Return the newest whole checkpoint at `path`, else of checkpoint.load, else of the configured run.

    Raises:
        CheckpointError: there is none.
        ConfigError: nothing says which.
    """
    if path is None:
        if arguments.config is None:
            raise ConfigError("give --checkpoint, or --config of a run that has one")
        config = load_config(arguments.config, arguments.overrides)
        path = Path(config.checkpoint.load or config.logging.run_directory)
    folder = newest_whole(path)
    with open_checkpoint(folder) as reader:
        return SavedWeights(folder, reader.manifest.step, dict(reader.config))


def as_evaluation(
    arguments: Arguments, weights: SavedWeights, world_size: int, *, shard: str | None = None
) -> Arguments:
    """Return a run's command line turned into one that loads `weights` and validates, in a folder of its own.

    Args:
        world_size: processes; if the configured layout does not fit, each holds a whole model.
        shard: measure on all of this shard instead of the run's validation part.
    """
    base = weights.config if arguments.config is None else arguments.config
    parallel = load_config(base, arguments.overrides).parallel
    first: dict[str, str] = {}
    if world_size % (parallel.tensor_parallel_size * parallel.pipeline_parallel_size):
        first |= _WHOLE_MODEL
    last = {
        "checkpoint.load": str(weights.path),
        "checkpoint.load_weights_only": "true",
        "checkpoint.resume": "true",  # there is nothing to resume from: an evaluation saves nothing
        "evaluation.interval_steps": "1",
        "logging.run_directory": str(_folder_of(weights.path)),
        "logging.tensorboard": "false",
        "logging.wandb": "off",
    }
    first |= _carried_tokenizer(weights)
    if shard is not None:
        last |= {"data.corpora": f"[{{prefix: {json.dumps(shard)}}}]", "data.split": "[0, 1, 0]"}
    overrides = (*_overrides(first), *arguments.overrides, *_overrides(last))
    found = replace(arguments, config=base, overrides=overrides)
    return found if shard is None else _over_all_of_it(found, world_size)


def tokenizer_of(arguments: Arguments, weights: SavedWeights) -> str:
    """Return the path of the tokenizer that texts are to be encoded with: the one given, else the weights' own."""
    base = weights.config if arguments.config is None else arguments.config
    return load_config(base, (*_overrides(_carried_tokenizer(weights)), *arguments.overrides)).data.tokenizer


def _carried_tokenizer(weights: SavedWeights) -> dict[str, str]:
    carried = weights.path / run_folder.TOKENIZER
    return {"data.tokenizer": str(carried)} if carried.exists() else {}


_WHOLE_MODEL = {
    "parallel.tensor_parallel_size": "1",
    "parallel.pipeline_parallel_size": "1",
    "parallel.pipeline_schedule": "1f1b",
    "parallel.stage_boundaries": "null",
    "parallel.sequence_parallel": "false",
}


def _overrides(values: dict[str, str]) -> tuple[Override, ...]:
    return tuple(Override(name, text) for name, text in values.items())


def _folder_of(checkpoint: Path) -> Path:
    """Return where an evaluation leaves its own log: in the run's folder, else beside the checkpoint."""
    above = checkpoint.absolute().parent
    return (above.parent if above.name == run_folder.CHECKPOINTS else above) / "evaluation"


def _over_all_of_it(arguments: Arguments, world_size: int) -> Arguments:
    """Return the arguments with as many batches as the shard fills, the smallest batches there are."""
    config = load_config(arguments.config, arguments.overrides)
    replicas = world_size // (config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size)
    size = config.batch.micro_batch_size * replicas
    batches = max(1, len(open_sources(config).validation) // size)
    settings = {"batch.ramp_up": "null", "batch.global_batch_size": f"{size}", "evaluation.num_batches": f"{batches}"}
    return replace(arguments, overrides=(*arguments.overrides, *_overrides(settings)))


def evaluate(resolved: ResolvedRun, place: ProcessPlace) -> EvaluationReport:
    """Validate as process `place` of a run made by `as_evaluation`. Raises ConfigError without a validation part."""
    hook = _UntilValidated()
    try:
        train(resolved, place, [hook], log_level=logging.WARNING)
    except Preempted:
        if hook.report is not None:
            return hook.report
        raise  # asked to stop
    raise AssertionError("training ended without a step")
