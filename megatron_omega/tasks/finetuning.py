"""What a fine-tuning takes from its checkpoint, from its data and from its own defaults, where nothing is said.

The outcome is a command line of an ordinary run, with every setting in it: a fine-tuning is trained, resumed and
inspected like any other run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_omega.config import yaml_text
from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.layout import ranks_per_replica
from megatron_omega.config.load import load_config, read_values
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.pairs.source import PairRows
from megatron_omega.data.sources import Sources, open_sources
from megatron_omega.errors import CheckpointError, ConfigError
from megatron_omega.host import run_folder
from megatron_omega.host.regular_files import read_text

EPOCHS = 3.0
RATE_OF_PRETRAINING = 0.3
LORA_RATE = 1e-2
STEPS_OF_AN_EPOCH = 8
"""Steps that an epoch should have at least; the batch is made smaller for it."""
ROOM = 1.1
"""How much longer than the pairs ask for a decoder stream is made, since rows are never quite full."""

INHERITED = ("model", "data", "objective", "precision", "parallel", "lora")
"""Sections that are as in the checkpoint."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "optimizer": {"weight_decay": 0.0},
    "schedule": {"decay": "linear", "min_learning_rate_fraction": 0.0},
    "checkpoint": {"keep_last": 1},
    "resilience": {"spike_z_score": 0.0},  # losses of few pairs jump
    "evaluation": {"answers": 100, "patience": 3},
    "data": {"text_fraction": 0.0, "num_workers": 0, "order": "flat", "split": (95, 5, 0)},
}
"""Settings of every fine-tuning."""
_WHOLE_MODEL = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "pipeline_schedule": "1f1b",
    "virtual_stages": 1,
    "stage_boundaries": None,
    "sequence_parallel": False,
}


@dataclass(frozen=True)
class FineTuning:
    """A run's command line, and a sentence for each setting that was filled in."""

    arguments: Arguments
    told: tuple[str, ...]


def as_finetuning(arguments: Arguments, world_size: int) -> FineTuning:
    """Return the command line of the run that fine-tunes, from what a user said.

    Raises:
        ConfigError: no checkpoint, or no tasks are named, or a setting is wrong.
        CheckpointError: the checkpoint cannot be read.
        DataError: every fault of the tasks.
    """
    given = _given(arguments)
    load, tasks = _named(given, "checkpoint.load"), _named(given, "data.tasks")
    missing = [] if load else ["no checkpoint to start from; give --load (a run, or a step-... folder)"]
    missing += [] if tasks else ["no tasks to fine-tune on; give --tasks (records, or a YAML list of tasks)"]
    if missing:
        raise ConfigError(*missing)
    run = _named(given, "logging.run_directory") or _folder(str(load))
    start = _start(Path(str(load)), Path(str(run)))
    base = _base(start, world_size)
    own = _joined(DEFAULTS, _rates(base, given), {"checkpoint": {"load_weights_only": True}})
    own = _joined(own, {"logging": {"run_directory": str(run)}})
    settings = _joined({name: base[name] for name in INHERITED if name in base}, own, read_values(arguments.config))
    pinned = (*arguments.overrides, Override("checkpoint.load", str(start)))
    return with_lengths(replace(arguments, config=settings, overrides=pinned), given, world_size)


def with_lengths(arguments: Arguments, given: Mapping[str, Any], world_size: int) -> FineTuning:
    """Fill in what follows from the pairs: streams, batch, steps, validations. `given` stays as it is."""
    told: list[str] = []
    for derive in (_decoder_length, _batch, _steps):
        config = load_config(arguments.config, arguments.overrides)
        sources = open_sources(config)
        found = {
            name: value
            for name, value in derive(config, sources, world_size).items()
            if _named(given, name) is None and value is not None
        }
        told += [f"{name}={value}" for name, value in found.items()]
        more = tuple(Override(name, json.dumps(value)) for name, value in found.items())
        arguments = replace(arguments, overrides=(*arguments.overrides, *more))
    return FineTuning(arguments, tuple(told))


def with_epochs(arguments: Arguments, world_size: int) -> FineTuning:
    """Fill in training.train_steps where only training.epochs is given."""
    given = _given(arguments)
    if _named(given, "training.epochs") is None or _named(given, "training.train_steps") is not None:
        return FineTuning(arguments, ())
    config = load_config(arguments.config, arguments.overrides)
    if not config.data.tasks:
        return FineTuning(arguments, ())
    steps = _steps(config, open_sources(config), world_size)["training.train_steps"]
    more = Override("training.train_steps", str(steps))
    return FineTuning(replace(arguments, overrides=(*arguments.overrides, more)), (f"{more.name}={steps}",))


def read_tasks(text: str) -> Override:
    """Return `--tasks`: a YAML list, a YAML file with one, or the path of records with the fields prompt and target.

    Raises ConfigError if a file cannot be read.
    """
    if text.startswith(("[", "{")):
        return Override("data.tasks", text if text.startswith("[") else f"[{text}]")
    if not text.endswith((".yaml", ".yml")):
        return Override("data.tasks", json.dumps([{"path": text}]))
    try:
        values = yaml_text.parse(read_text(text), text)
    except OSError as error:
        raise ConfigError(f"--tasks {text} cannot be read: {error.strerror}; give a YAML file or records") from None
    found = values.get("tasks") if isinstance(values, Mapping) else values
    if not isinstance(found, list):
        raise ConfigError(f"--tasks {text} holds no list of tasks; begin it with `- path: ...`")
    return Override("data.tasks", json.dumps(found))


def _given(arguments: Arguments) -> dict[str, Any]:
    """Return everything the user said, by its dotted name."""
    values = read_values(arguments.config)
    found = dict(_leaves(values))
    return found | {override.name: override.text for override in arguments.overrides}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")


def _named(given: Mapping[str, Any], name: str) -> Any:
    value = given.get(name)
    return None if value in ("null", "") else value


def _joined(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections joined; later layers win, setting by setting."""
    joined: dict[str, Any] = {}
    for layer in layers:
        for section, fields in layer.items():
            is_section = isinstance(fields, Mapping) and isinstance(joined.get(section, {}), Mapping)
            joined[section] = {**joined.get(section, {}), **fields} if is_section else fields
    return joined


def _start(load: Path, run: Path) -> Path:
    """Return the checkpoint to start from: the newest at `load`, or the one that this run has started from before.

    So a fine-tuning that is started again stays with its base, also if that run has trained on meanwhile.

    Raises CheckpointError if there is none.
    """
    from megatron_omega.checkpoint.catalogue import checkpoints_at, newest_whole
    from megatron_omega.export.native import is_export  # brings in torch, which a plain run does later

    if is_export(load):
        raise CheckpointError(
            f"{load} is an export; make a checkpoint of it (import-hf --folder {load} --output FOLDER) and load that"
        )
    try:
        before = read_values(run / run_folder.CONFIG)["checkpoint"]["load"]
    except (ConfigError, KeyError, TypeError):
        before = None
    known = [path.absolute() for path in checkpoints_at(load)]
    return next((path for path in known if str(path) == before), None) or newest_whole(load).absolute()


def _base(folder: Path, world_size: int) -> dict[str, Any]:
    """Return the settings of the model to start from, with its own copy of the tokenizer."""
    from megatron_omega.export.adapted import AdaptedReader  # brings in torch, which a plain run does later
    from megatron_omega.export.loading import open_weights

    weights = open_weights(folder)
    try:
        settings = json.loads(json.dumps(weights.config))
        if isinstance(weights, AdaptedReader):
            settings["lora"] = weights.lora.model_dump(mode="json")
    finally:
        weights.close()
    own = folder / run_folder.TOKENIZER
    if own.exists():
        settings.setdefault("data", {})["tokenizer"] = str(own)
    config = RunConfig.model_validate({"parallel": settings.get("parallel", {})})
    if world_size % ranks_per_replica(config):
        settings["parallel"] = settings.get("parallel", {}) | _WHOLE_MODEL
    return settings


def _rates(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the learning rate: a share of pretraining's, or the adapters' own."""
    rank = _named(given, "lora.rank") or base.get("lora", {}).get("rank")
    if rank not in (None, 0, "0"):
        return {"optimizer": {"learning_rate": LORA_RATE}, "training": {"epochs": EPOCHS}}
    rate = base.get("optimizer", {}).get("learning_rate", RunConfig().optimizer.learning_rate)
    return {"optimizer": {"learning_rate": RATE_OF_PRETRAINING * rate}, "training": {"epochs": EPOCHS}}


def _folder(load: str) -> str:
    """Return a run folder beside the one of the checkpoint."""
    path = Path(load).absolute()
    if path.parent.name == run_folder.CHECKPOINTS:
        path = path.parent
    if path.name == run_folder.CHECKPOINTS:
        path = path.parent
    return str(path.with_name(f"{path.name}-finetuned"))


def _replicas(config: RunConfig, world_size: int) -> int:
    return max(1, world_size // ranks_per_replica(config))


def _decoder_length(config: RunConfig, sources: Sources, world_size: int) -> dict[str, Any]:
    """Shorten the decoder stream so that both streams of a row fill up together: targets are short, prompts long."""
    tasks = [each for each in sources.train.corpora if isinstance(each, PairRows)]
    if config.model.is_decoder_only or config.model.positions == "learned":
        return {}
    sums, longest = np.zeros(2), 0
    for rows in tasks:
        lengths = rows.fit.lengths(*rows.shard.lengths())
        sums += [float((-(-side // rows.fit.budget.width) * rows.fit.budget.width).sum()) for side in lengths]
        longest = max(longest, int(lengths[1].max()))
    wanted = max(longest, config.data.encoder_seq_length * sums[1] / sums[0] * ROOM)
    unit = math.lcm(config.model.axial_width, config.parallel.tensor_parallel_size)
    length = math.ceil(wanted / unit) * unit
    return {"data.decoder_seq_length": length} if length < config.data.decoder_seq_length else {}


def _batch(config: RunConfig, sources: Sources, world_size: int) -> dict[str, Any]:
    """Make the batch small enough for an epoch to have some steps."""
    unit = config.batch.micro_batch_size * _replicas(config, world_size)
    size = max(unit, min(config.batch.global_batch_size, len(sources.train) // STEPS_OF_AN_EPOCH) // unit * unit)
    if config.parallel.pipeline_schedule == "dualpipev":
        size = max(size, 2 * config.parallel.pipeline_parallel_size * unit)
    return {"batch.global_batch_size": size}


def _steps(config: RunConfig, sources: Sources, world_size: int) -> dict[str, Any]:
    """Count the steps of the epochs; validate and save after each, on every held-out pair."""
    size = config.batch.global_batch_size
    rows = len(sources.train) / max(1e-9, 1 - config.data.text_fraction)
    epochs = config.training.epochs or EPOCHS
    held = math.ceil(len(sources.validation) / size)
    each = max(1, math.ceil(rows / size))
    return {
        "training.train_steps": max(1, math.ceil(epochs * rows / size)),
        "evaluation.interval_steps": each if held else 0,
        "evaluation.num_batches": held or None,
        "checkpoint.interval_steps": each,
    }


def settings_of(found: Sequence[str]) -> str:
    """Return in a line what was filled in."""
    return f"from the pairs: {', '.join(found)}"
