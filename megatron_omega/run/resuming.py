"""What a run that goes on from a checkpoint does otherwise than the one that wrote it, in sentences.

What would silently read text again, or never, is refused, with the way to do it right. All else is told, once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from megatron_omega.checkpoint.catalogue import checkpoints_at, newest_whole, require_identity
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.schema import DataConfig, RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.host import run_folder
from megatron_omega.host.regular_files import read_regular
from megatron_omega.training.learning_rate import learning_rate_fraction
from megatron_omega.training.state import TrainState

_ORDER = (
    "training.seed",
    "data.split",
    "data.order",
    "data.encoder_seq_length",
    "data.decoder_seq_length",
    "data.tasks",
    "data.task_temperature",
    "data.text_fraction",
)
"""Settings on which the order of samples depends, or what is in each."""
_TOTAL = ("training.train_steps", "batch.global_batch_size", "data.corpora", "data.reweight")
"""In Megatron's order all samples of a run are shuffled together, so that these count too."""
_QUIET = ("logging.", "checkpoint.", "resilience.", "evaluation.")
_JUMP = 0.01
_CONSEQUENCES: Mapping[str, str] = {
    "batch.": "steps take other numbers of samples from here on; none comes twice",
    "objective.": "made into examples otherwise from here on",
    "optimizer.": "from the next step on",
    "parallel.": "the same weights; last digits of losses may differ",
    "precision.": "the masters are the same; losses may differ",
    "data.corpora": "what was read stays read",
    "data.reweight": "what was read stays read",
}


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        consequence = next((text for start, text in _CONSEQUENCES.items() if self.name.startswith(start)), "")
        return f"{self.name}: {self.old} -> {self.new}" + (f" ({consequence})" if consequence else "")


def changes_on_resuming(config: RunConfig, identity: Mapping[str, Any], pairs: Sequence[str] = ()) -> list[str]:
    """Return a sentence for each thing that the checkpoint which this run goes on from had otherwise.

    Args:
        identity: what a checkpoint must share with the run.
        pairs: what tells the supervised pairs of each task from others.

    Raises:
        CheckpointError: it belongs to another model, or no checkpoint is whole.
        ConfigError: to go on from it would read text again, or never, without a word.
    """
    checkpoint, own = config.checkpoint, Path(config.logging.run_directory)
    resumes = checkpoint.resume and bool(checkpoints_at(own / run_folder.CHECKPOINTS))
    if not resumes and (checkpoint.load is None or checkpoint.load_weights_only):
        return []
    path = newest_whole(own if resumes else Path(str(checkpoint.load)))
    with open_checkpoint(path) as reader:
        manifest = reader.manifest
    require_identity(path, manifest, identity)
    if finding := _of_pairs(config, path, pairs):
        raise ConfigError(finding)
    try:
        before = RunConfig.model_validate(dict(manifest.config))
    except ValidationError:
        return [f"{path} was saved with settings that this version does not know; what differs is not listed"]
    state = TrainState.from_json(manifest.state)
    if findings := refusals(before, config, state, str(path)):
        raise ConfigError(*findings)
    return notices(before, config, state)


def _of_pairs(config: RunConfig, path: Path, pairs: Sequence[str]) -> str | None:
    """Return the sentence for records that are no longer those which the checkpoint was trained on."""
    try:
        before = json.loads(read_regular(path / run_folder.PAIRS))
    except (OSError, ValueError):  # of an earlier version, or of a run on text
        return None
    if not isinstance(before, list) or len(before) != len(pairs):
        return None  # other tasks: the settings say so
    changed = [
        task.name or task.path for task, old, new in zip(config.data.tasks, before, pairs, strict=True) if old != new
    ]
    if not changed:
        return None
    return (
        f"the records of {', '.join(changed)} are not those that {path} was trained on: pairs would come again, and "
        "others never; bring the old records back, or begin anew in another run folder (--logging.run_directory)"
    )


def changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """Return every setting that differs, in the order of the schema."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return [
        Change(f"{section}.{name}", before[section][name], value)
        for section, fields in after.items()
        for name, value in fields.items()
        if before[section][name] != value
    ]


def notices(old: RunConfig, new: RunConfig, state: TrainState) -> list[str]:
    """Return a sentence for each thing that is not as it was, and one if the learning rate jumps by it."""
    told = [str(change) for change in changes(old, new) if not change.name.startswith(_QUIET)]
    before, after = (_learning_rate(config, state.step) for config in (old, new))
    if abs(after - before) > _JUMP * max(before, after):
        told.append(f"the learning rate of step {state.step + 1} is {after:.4g}; it would have been {before:.4g}")
    return told


def refusals(old: RunConfig, new: RunConfig, state: TrainState, place: str) -> list[str]:
    """Return what speaks against going on: text that would be read again, or never, without a word.

    place: the checkpoint, for what to do about it.
    """
    if state.consumed_samples == 0:
        return []
    found = {change.name: change for change in changes(old, new)}
    fixed = _ORDER + (_TOTAL if "megatron" in (old.data.order, new.data.order) else ())
    told = [
        f"{change.name} is {change.new}; the checkpoint has {change.old}, and with another one the samples are others: "
        "text would be read again, and other text never"
        for name, change in found.items()
        if name in fixed
    ]
    if "data.corpora" not in fixed:
        told += _of_corpora(old.data, new.data, state.consumed_samples)
    return [
        f"{finding}; keep it, or begin the data anew in another run folder with --checkpoint.load {place} "
        "--checkpoint.load_weights_only true"
        for finding in told
    ]


def _of_corpora(old: DataConfig, new: DataConfig, consumed: int) -> Iterator[str]:
    """Compare the blend up to the samples that were read: later it may be anything."""
    names = [[PurePath(corpus.prefix).name for corpus in data.corpora] for data in (old, new)]
    if names[0] != names[1][: len(names[0])]:
        yield (
            f"data.corpora begins with {names[1][: len(names[0])]}, and the checkpoint's is {names[0]}; corpora that "
            "were read keep their places, new ones follow behind them"
        )
        return
    early = [
        name
        for name, corpus in zip(names[1][len(names[0]) :], new.corpora[len(names[0]) :], strict=True)
        if corpus.from_sample < consumed
    ]
    for name in early:
        yield (
            f"data.corpora adds {name} in the middle of {consumed} samples that were read; let it join later, with "
            f"from_sample: {consumed} or more"
        )
    if not early and _read(old, consumed) != _read(new, consumed):
        yield (
            f"the weights of data.corpora are not those by which {consumed} samples were read; leave them as they "
            f"were, and change them from there on: data.reweight [{{from_sample: {consumed}, weights: [...]}}]"
        )


def _read(data: DataConfig, consumed: int) -> list[tuple[int, tuple[float, ...]]]:
    """Return the phases of the blend that began before `consumed`, without trailing corpora that gave nothing."""
    found: list[tuple[int, tuple[float, ...]]] = []
    for start, weights in data.phases:
        while weights and weights[-1] == 0:
            weights = weights[:-1]
        if start < consumed:
            found.append((start, weights))
    return found


def _learning_rate(config: RunConfig, step: int) -> float:
    fraction = learning_rate_fraction(config.schedule, step, config.training.train_steps)
    return config.optimizer.learning_rate * fraction
