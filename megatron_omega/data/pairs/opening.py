"""From `data.tasks` to sources: every task opened, cut, held out from, weighted, and told about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megatron_omega.config.schema import RunConfig, Task
from megatron_omega.data.batch import PARTS
from megatron_omega.data.packing import Budget
from megatron_omega.data.pairs.shard import PairShard, open_pairs, task_name
from megatron_omega.data.pairs.source import Fit, HeldOutPairs, PairRows, PairSource, TextSamples
from megatron_omega.data.permutation import Permutation, derive_key
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.data.windows import split_documents
from megatron_omega.errors import DataError


@dataclass(frozen=True)
class OpenTask:
    """One task: the shard of each part, and which of its pairs belong to it."""

    task: Task
    setting: str
    fit: Fit
    shards: tuple[PairShard, PairShard, PairShard]
    pairs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    """By part."""
    key: int

    def rows(self, part: int) -> PairRows:
        """Pack the pairs of a part."""
        return PairRows(self.shards[part], self.pairs[part], self.fit, derive_key(self.key, PARTS[part]))


@dataclass(frozen=True)
class OpenTasks:
    """All tasks of a run, packed."""

    tasks: Sequence[Task]
    rows: Sequence[PairRows]
    validation: HeldOutPairs
    test: HeldOutPairs
    notices: tuple[str, ...]
    temperature: float
    text_fraction: float

    def train(self, text: TextSamples | None) -> PairSource:
        """Return the training samples; `text` is blended in by its fraction."""
        weights = row_weights(self.tasks, self.rows, self.temperature)
        share = (1 - self.text_fraction) / sum(weights)
        return PairSource(self.rows, [weight * share for weight in weights], text, self.text_fraction)


def row_weights(tasks: Sequence[Task], rows: Sequence[PairRows], temperature: float) -> list[float]:
    """Return how many rows of each task are drawn, relative to each other: pairs by weight, or by temperature."""
    pairs = [each.num_pairs for each in rows]
    wanted = [
        float(count ** (1 / temperature)) if task.weight is None else task.weight
        for task, count in zip(tasks, pairs, strict=True)
    ]
    return [want * len(each) / count for want, each, count in zip(wanted, rows, pairs, strict=True)]


def open_tasks(config: RunConfig, tokenizer: Tokenizer) -> OpenTasks:
    """Open and pack `config.data.tasks`. Raises DataError with the findings of all tasks."""
    opened: list[OpenTask] = []
    findings: list[str] = []
    for number, task in enumerate(config.data.tasks):
        try:
            opened.append(_open(config, tokenizer, number, task))
        except DataError as error:
            findings += error.findings
    if not findings:
        findings += _nothing_held_out(config, opened)
    if findings:
        raise DataError(*findings)
    trained, validated, tested = ([task.rows(part) for task in opened] for part in range(3))
    held = partial(HeldOutPairs, fit=opened[0].fit)
    notices = [notice for task, rows in zip(opened, trained, strict=True) for notice in _notices(task, rows)]
    return OpenTasks(
        config.data.tasks, trained, held("validation", validated), held("test", tested), tuple(notices),
        config.data.task_temperature, config.data.text_fraction,
    )  # fmt: skip


def fit_of(config: RunConfig, task: Task, tokenizer: Tokenizer) -> Fit:
    """Return how pairs of a task are cut."""
    encoder = 0 if config.model.is_decoder_only else config.data.encoder_seq_length
    model = config.model
    budget = Budget(encoder, config.data.decoder_seq_length, model.axial_width, model.resolved_overlap)
    return Fit(budget, tokenizer.special, task.cut_prompts == "start")


def _open(config: RunConfig, tokenizer: Tokenizer, number: int, task: Task) -> OpenTask:
    setting, key = f"data.tasks[{number}]", derive_key(config.training.seed, "pairs", number)
    fit = fit_of(config, task, tokenizer)
    findings: list[str] = []
    shards: list[PairShard] = []
    for path, split in ((task.path, task.split), (task.validation, task.validation_split)):
        if not path:
            continue
        try:
            shards.append(open_pairs(task, tokenizer, path=path, split=split, setting=setting))
            findings += _long_targets(config, task, shards[-1], fit, setting)
        except DataError as error:
            findings += error.findings
    if findings:
        raise DataError(*findings)
    parts = _parts(config, shards, key)
    kept = [_kept(task, shard, pairs, fit) for shard, pairs in parts]
    if config.data.split[0] and not len(kept[0]):
        raise DataError(f"{setting} ({task_name(task)}) has no pair left to train on; give it more, or another split")
    train, validation, test = (shard for shard, _ in parts)
    return OpenTask(task, setting, fit, (train, validation, test), (kept[0], kept[1], kept[2]), key)


def _parts(config: RunConfig, shards: Sequence[PairShard], key: int) -> list[tuple[PairShard, NDArray[np.int64]]]:
    """Return shard and pairs of each part: held out by `validation`, else a keyed share of the pairs."""
    whole = shards[0]
    if len(shards) > 1:
        held = shards[1]
        nothing = np.arange(0)
        return [(whole, np.arange(len(whole))), (held, np.arange(len(held))), (held, nothing)]
    shuffled = Permutation(len(whole), derive_key(key, "split")).many(np.arange(len(whole)))
    cuts = split_documents(len(whole), config.data.split)
    return [(whole, np.sort(shuffled[cut.start : cut.stop])) for cut in cuts]


def _long_targets(config: RunConfig, task: Task, shard: PairShard, fit: Fit, setting: str) -> Iterator[str]:
    prompts, targets = shard.lengths()
    count = int(fit.too_long(prompts, targets).sum())
    if count and task.long_targets == "refuse":
        yield (
            f"{count:,} of {len(shard):,} targets of {setting} ({shard.name}) are longer than data.decoder_seq_length="
            f"{config.data.decoder_seq_length} with their end token (the longest has {int(targets.max()):,} tokens); "
            f"give the decoder more, or say {setting}.long_targets: cut or leave_out"
        )


def _kept(task: Task, shard: PairShard, pairs: NDArray[np.int64], fit: Fit) -> NDArray[np.int64]:
    if task.long_targets != "leave_out":
        return pairs
    prompts, targets = shard.lengths()
    return pairs[~fit.too_long(prompts[pairs], targets[pairs])]


def _nothing_held_out(config: RunConfig, opened: Sequence[OpenTask]) -> Iterator[str]:
    if config.evaluation.interval_steps and config.data.split[1] and not any(len(task.pairs[1]) for task in opened):
        yield (
            f"data.split={list(config.data.split)} holds out none of {sum(len(task.pairs[0]) for task in opened)} "
            "pairs; give the tasks a `validation`, a larger second share, or turn validation off "
            "(evaluation.interval_steps: 0)"
        )


def _notices(task: OpenTask, rows: PairRows) -> Iterator[str]:
    """Say how full the rows are, and everything that was cut or left out."""
    shard, pairs, budget = task.shards[0], task.pairs[0], task.fit.budget
    prompts, targets = (lengths[pairs] for lengths in shard.lengths())
    encoder, decoder = task.fit.lengths(prompts, targets)
    full = f"decoder rows {decoder.sum() / (len(rows) * budget.decoder):.0%} full"
    if task.fit.has_encoder:
        full = f"encoder rows {encoder.sum() / (len(rows) * budget.encoder):.0%}, {full}"
    held = f", {len(task.pairs[1]):,} held out" if len(task.pairs[1]) else ""
    yield f"task {shard.name}: {len(pairs):,} pairs in {len(rows):,} rows{held}; {full}"
    lost, where = task.fit.cut_prompts(prompts, targets), task.task.cut_prompts
    if lost.any():
        yield (
            f"task {shard.name}: {np.count_nonzero(lost):,} prompts are too long and lose their {where}, "
            f"{int(lost.sum()):,} of {int(prompts.sum()):,} tokens ({task.setting}.cut_prompts)"
        )
    leaves_out = task.task.long_targets == "leave_out"
    long = task.fit.too_long(*(shard.lengths() if leaves_out else (prompts, targets)))
    if long.any():
        what = "pairs are left out, since their targets are" if leaves_out else "targets are cut, since they are"
        yield f"task {shard.name}: {np.count_nonzero(long):,} {what} too long ({task.setting}.long_targets)"
