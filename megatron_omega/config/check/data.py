"""Contradictions of streams, corpora and their blend."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from megatron_omega.config.check.architecture import branches_used
from megatron_omega.config.check.words import nearest_multiples
from megatron_omega.config.schema import METRIC_PACKAGES, Metric, RunConfig, Stack, Task


def streams(config: RunConfig) -> Iterator[str]:
    model, data, tp = config.model, config.data, config.parallel.tensor_parallel_size
    if model.is_decoder_only and data.encoder_seq_length:
        yield (
            f"data.encoder_seq_length={data.encoder_seq_length} with model.encoder_layers=0; "
            "a decoder-only model has no encoder stream: use 0"
        )
    if not model.is_decoder_only and not data.encoder_seq_length:
        yield (
            f"data.encoder_seq_length=0 with model.encoder_layers={model.encoder_layers}; give the encoder stream a "
            "length, or use model.encoder_layers=0"
        )
    if config.parallel.sequence_parallel and tp == 1:
        yield (
            "parallel.sequence_parallel=true with parallel.tensor_parallel_size=1; it shards between tensor-parallel "
            "ranks: use false, or at least 2 ranks"
        )
    stacks: tuple[Stack, ...] = ("encoder", "decoder")
    for stack in stacks:
        name, length = f"data.{stack}_seq_length", getattr(data, f"{stack}_seq_length")
        if "axial" in branches_used(model, stack) and length % model.axial_width:
            yield (
                f"{name}={length} is not a multiple of model.axial_width={model.axial_width} (the axial branch works "
                f"on whole rows); use {nearest_multiples(length, model.axial_width)}"
            )
        if config.parallel.sequence_parallel and length % tp:
            yield (
                f"{name}={length} is not divisible by parallel.tensor_parallel_size={tp}, which sequence parallelism "
                f"needs; use {nearest_multiples(length, tp)}"
            )


def corpus(config: RunConfig, *, needs_training_text: bool) -> Iterator[str]:
    data = config.data
    if not data.corpora and not data.tasks:
        yield "data.corpora is empty; name at least one: --data.corpora '[{prefix: PATH}]'"
    if not data.tokenizer:
        yield "data.tokenizer is not set; give the path of the SentencePiece model the corpus was encoded with"
    yield from _reweights(config)
    train, validation, _ = data.split
    if data.tasks:
        return
    if train == 0 and needs_training_text:
        yield f"data.split={list(data.split)} has no train part; its first number must be positive"
    if validation == 0 and config.evaluation.interval_steps:
        yield (
            f"data.split={list(data.split)} has no validation part, but evaluation.interval_steps="
            f"{config.evaluation.interval_steps}; use evaluation.interval_steps=0, or give it a share"
        )


def tasks(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.tasks:
        if config.evaluation.answers:
            yield (f"evaluation.answers={config.evaluation.answers} without data.tasks; only pairs have answers: use 0")
        if config.training.epochs is not None:
            yield (
                f"training.epochs={config.training.epochs:g} without data.tasks; epochs are passes through tasks: use "
                "training.train_steps"
            )
        if data.text_fraction:
            yield f"data.text_fraction={data.text_fraction:g} without data.tasks; text is all there is: leave it out"
        return
    weights = [task.weight for task in data.tasks]
    unweighted = weights.count(None)
    if 0 < unweighted < len(weights):
        yield f"data.tasks gives {unweighted} of {len(weights)} tasks no weight; give a weight to all or to none"
    elif not unweighted and not any(weights):
        yield "every weight of data.tasks is 0; give one task more"
    if data.text_fraction and not data.corpora:
        yield f"data.text_fraction={data.text_fraction:g} without data.corpora; name them, or use 0"
    if data.text_fraction == 1:
        yield "data.text_fraction=1 leaves nothing for data.tasks; use less"
    if data.order == "megatron":
        yield "data.order=megatron with data.tasks; that order is of text alone: use flat"
    yield from metrics(data.tasks)
    if config.evaluation.answers:
        yield from missing_packages(metric for task in data.tasks for metric in task.measured_by)


def missing_packages(metrics: Iterable[Metric]) -> Iterator[str]:
    """Yield a finding for each metric whose package is not installed."""
    wanted = set(metrics)
    for metric, (module, package) in METRIC_PACKAGES.items():
        if metric in wanted and importlib.util.find_spec(module) is None:
            yield (
                f"the metric {metric} needs the package {package}, which is not installed; "
                f"pip install 'megatron-omega[tasks]', or {package} alone"
            )


def metrics(tasks: Sequence[Task]) -> Iterator[str]:
    """Yield a finding for each task with a metric of another kind than it is."""
    for number, task in enumerate(tasks):
        if "accuracy" in task.metrics and not task.choices:
            name = task.name or task.path
            yield (
                f"data.tasks[{number}].metrics has accuracy, but {name} has no choices; give it `choices`, or measure "
                "what the model writes (exact_match, f1, rouge, bleu, chrf)"
            )


def _reweights(config: RunConfig) -> Iterator[str]:
    data = config.data
    for change in data.reweight:
        known = sum(corpus.from_sample <= change.from_sample for corpus in data.corpora)
        if not known <= len(change.weights) <= len(data.corpora):
            yield (
                f"data.reweight from sample {change.from_sample} has {len(change.weights)} weights for "
                f"{len(data.corpora)} corpora; give one for each entry of data.corpora"
            )
    if any(first.from_sample >= second.from_sample for first, second in pairwise(data.reweight)):
        yield "data.reweight is not ascending in from_sample; sort its entries"
    yield from (
        f"no corpus of data.corpora has a weight from sample {start} on; keep one above 0"
        for start, weights in data.phases
        if data.corpora and sum(weights) == 0
    )
