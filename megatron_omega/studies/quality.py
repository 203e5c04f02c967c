"""Named arms, trained over rates and seeds through the product itself, and measured on the same held-out windows.

A study is a file: a configuration, overrides for all arms, the arms with theirs, rates, seeds, and the steps at which
is measured. Every run is a real run in a process of its own with one thread. What has been measured is kept line by
line, so a study that was interrupted, or got more seeds, goes on with what is missing. Knows no tables: studies.report.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_omega import accounting
from megatron_omega.config import yaml_text
from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.load import load_config, resolve_run
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.sources import Sources, open_sources
from megatron_omega.errors import ConfigError
from megatron_omega.export.loading import load_omega
from megatron_omega.host import run_folder
from megatron_omega.host.environment import complete_environment
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.studies.held_out import HeldOut, cut_windows, measure, references
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import StepReport

MEASURES = "measures.jsonl"
REFERENCES = "references.json"
CLOCK = "clock.jsonl"
_LABEL_SAMPLES = 64
_PRELOAD = ("megatron_omega.run.train",)


class Study(BaseModel):
    """What is compared, as read from a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str
    """Configuration that everything starts from."""
    settings: dict[str, Any] = {}
    """Overrides of all arms, by dotted name."""
    arms: dict[str, dict[str, Any]]
    """Overrides of each arm, by dotted name."""
    rates: list[float] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    steps: list[int] = Field(min_length=1)
    """Steps at which is measured; the last one is the length of the run."""
    windows: int = 192
    prefix_tokens: int = 120
    continuation_tokens: int = 120


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    arm: str
    rate: float
    seed: int

    @property
    def label(self) -> str:
        return f"{self.arm}-{self.rate:g}-{self.seed}"


def read_study(path: Path) -> Study:
    """Read a study. Raises ConfigError with every finding."""
    try:
        return Study.model_validate(yaml_text.parse(path.read_text(encoding="utf-8"), str(path)))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give the path of a study (YAML)") from None
    except ValidationError as error:
        raise ConfigError(*(f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None


def trials(study: Study) -> Iterator[Trial]:
    """Yield all trials, seed by seed, so that every arm has the same ones when a study ends early."""
    for seed in study.seeds:
        for arm, settings in study.arms.items():
            given = settings.get("optimizer.learning_rate")
            yield from (Trial(arm, rate, seed) for rate in ([given] if given else study.rates))


def overrides_of(study: Study, trial: Trial, folder: Path) -> tuple[Override, ...]:
    """Return what a trial changes of the study's configuration."""
    last = max(study.steps)
    own = {
        "optimizer.learning_rate": trial.rate,
        "training.seed": trial.seed,
        "training.train_steps": last,
        "evaluation.interval_steps": 0,
        "checkpoint.interval_steps": int(np.gcd.reduce(study.steps)),
        "checkpoint.keep_last": last,
        "logging.run_directory": str(folder / trial.label),
        "logging.interval_steps": last,
        "logging.tensorboard": False,
        "logging.progress_bar": False,
        "resilience.monitor": False,
    }
    values = {**study.settings, **own, **study.arms[trial.arm]}
    return tuple(Override(name, yaml_text.dump(value).removesuffix("...\n").strip()) for name, value in values.items())


class Clock(Hook):
    """Writes the CPU time of the process and the tokens it has read at every step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin = 0.0
        self._spent = 0.0

    def on_step_begin(self, step: int) -> None:
        self._begin = time.process_time()

    def on_step_end(self, report: StepReport) -> None:
        self._spent += time.process_time() - self._begin
        with self._path.open("a") as file:
            row = {"step": report.step, "cpu": self._spent, "tokens": report.consumed_tokens, "skipped": report.skipped}
            file.write(json.dumps(row | {"lm_loss": report.lm_loss, "grad_norm": report.grad_norm}) + "\n")


def train_trial(arguments: Arguments) -> None:
    """Train as the only rank of a trial. DeepSpeed prints to stdout, which is the tool's own."""
    from megatron_omega.run.train import train

    place = complete_environment()
    resolved = resolve_run(arguments, place.world_size)
    folder = Path(resolved.config.logging.run_directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CLOCK).unlink(missing_ok=True)
    with redirect_stdout(sys.stderr):
        train(resolved, place, [Clock(folder / CLOCK)])


def run_trial(study: Study, trial: Trial, folder: Path, *, timeout_seconds: float = 1e5) -> list[dict[str, Any]]:
    """Train and measure one trial; return a row for each of the study's steps. The run's folder is removed.

    A trial that is cut off starts afresh: its clock would be wrong otherwise.
    """
    overrides = overrides_of(study, trial, folder)
    config = load_config(study.config, overrides)
    run = Path(config.logging.run_directory)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    run_ranks(
        train_trial, 1, Arguments(config=Path(study.config), overrides=overrides), timeout_seconds=timeout_seconds
    )
    sources = open_sources(config)
    windows = held_out(study, config, sources)
    clock = {row["step"]: row for row in map(json.loads, (run / CLOCK).read_text().splitlines())}
    labels = labels_per_sample(config, sources)
    rows = []
    for step in study.steps:
        model, _ = load_omega(run / run_folder.CHECKPOINTS / f"step-{step:08d}")
        row: dict[str, Any] = {"arm": trial.arm, "rate": trial.rate, "seed": trial.seed, "step": step}
        row |= {"parameters": accounting.parameter_count(config.model), "cpu": clock[step]["cpu"]}
        row |= {"tokens": clock[step]["tokens"], "labels": step * config.batch.global_batch_size * labels}
        row |= {"clipped": _clipped(clock, step, config.optimizer.gradient_clipping)}
        rows.append(row | measure(model, windows, sources.tokenizer.special))
    shutil.rmtree(run)
    return rows


def _clipped(clock: Mapping[int, Mapping[str, Any]], step: int, bound: float) -> float:
    """Return the share of steps up to `step` whose gradient was clipped."""
    return sum(clock[number]["grad_norm"] > bound > 0 for number in range(1, step + 1)) / step


def labels_per_sample(config: RunConfig, sources: Sources) -> float:
    """Return the LM labels of a sample, averaged over some."""
    rows = [sources.train[index].row.lm_labels for index in range(_LABEL_SAMPLES)]
    return float(np.mean([(row >= 0).sum() for row in rows]))


def held_out(study: Study, config: RunConfig, sources: Sources) -> HeldOut:
    """Return the windows of a study: of the validation part of its first corpus, the same for all arms."""
    corpus = sources.validation.corpora[0]
    return cut_windows(
        corpus.shard, corpus.documents, sources.tokenizer, count=study.windows, prefix=study.prefix_tokens,
        continuation=study.continuation_tokens, vocab_size=config.model.vocab_size,
    )  # fmt: skip


def run_study(study: Study, folder: Path) -> Iterator[tuple[Trial, list[dict[str, Any]]]]:
    """Run what has not been measured yet, and keep it; yield each trial with its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / REFERENCES).exists():
        (folder / REFERENCES).write_text(json.dumps(_references(study), indent=1))
    done = {(row["arm"], row["rate"], row["seed"], row["step"]) for row in measured(folder)}
    for trial in trials(study):
        if all((trial.arm, trial.rate, trial.seed, step) in done for step in study.steps):
            continue
        rows = run_trial(study, trial, folder)
        with (folder / MEASURES).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        yield trial, rows


def _references(study: Study) -> dict[str, float]:
    config = load_config(study.config, overrides_of(study, next(trials(study)), Path()))
    sources = open_sources(config)
    train = sources.train.corpora[0]
    windows = held_out(study, config, sources)
    return references(windows, train.shard, train.documents, config.model.vocab_size)


def measured(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that a study has so far."""
    path = folder / MEASURES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
