"""Answers in a validation: the model as it is now, all of its layers on every tensor-parallel group, asked in shares.

The live weights become a model for generation, whatever the layout: a rank holds its tensor-parallel slice of every
layer for as long as it answers. Replicas and pipeline stages share the prompts among them. All ranks hear all answers,
so that all agree on what they are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from megatron_omega.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_omega.config.schema import Task
from megatron_omega.data.pairs.source import PairRows
from megatron_omega.export.loading import TextModel, omega_of
from megatron_omega.generation.prompts import prompt_ids
from megatron_omega.generation.requests import Finished, Limits, Request
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.model.adapters import adapter_names, merged
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.parameters import ParameterInfo
from megatron_omega.run.assembly import base_of
from megatron_omega.run.live import LiveRun
from megatron_omega.tasks.metrics import measure

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_COLUMN = {"rouge": "rougeL"}
"""Which of a metric's columns counts, if it has several."""
_PERCENT = ("bleu", "chrf")
MORE_THAN_LONGEST = 1.25
"""How much longer than the longest target an answer may be."""
KEPT_BYTES = 1 << 30
"""Of frozen weights, which a rank keeps in the host's memory from one validation to the next; more is read again."""


class Answers:
    """Answers the same held-out prompts in every validation of a run."""

    def __init__(self, run: LiveRun) -> None:
        self._run = run
        held = cast(Sequence[PairRows], run.sources.validation.corpora)
        asked = zip(run.config.data.tasks, held, strict=True)
        random = np.random.default_rng(run.config.training.seed)
        most = run.config.evaluation.answers
        self._asked = [
            (task, rows, sorted(random.permutation(rows.pairs)[:most].tolist())) for task, rows in asked if len(rows)
        ]
        self._frozen = _Frozen(base_of(run.config).weights) if run.config.lora.is_on else None

    def __call__(self, beat: Callable[[], None]) -> Mapping[str, float]:
        """Return what the answers to each task are worth, by task and metric. Collective."""
        beat()
        run = self._run
        model = TextModel(self._model(), run.config, run.sources.tokenizer, Path(run.config.logging.run_directory))
        found: dict[str, float] = {}
        for task, rows, pairs in self._asked:
            beat()
            answers = self._answered(model, rows, pairs)
            wanted = [model.tokenizer.decode(rows.shard.pair(pair)[1].tolist()) for pair in pairs]
            name, value = _worth(task, answers, wanted)
            found[f"{rows.shard.name} {name}"] = value
        return found

    @torch.no_grad()
    def _model(self) -> Omega:
        """Return the model as it is now, adapters merged in."""
        run, frozen = self._run, self._frozen
        live, lora = run.weights(), run.config.lora
        trained = {*live.names()}

        def values(info: ParameterInfo) -> Tensor:
            if info.name in trained:
                return info.local_slice(live.tensor(info.name))
            assert frozen is not None, f"{info.name} is neither trained nor frozen"
            a, b = adapter_names(info.name)
            if a not in trained:
                return frozen.slice(info)
            weight = frozen.whole(info.name).to(run.device)
            return info.local_slice(merged(weight, live.tensor(a), live.tensor(b), lora.scale))

        dtype = _DTYPES[run.config.precision.dtype]
        with frozen or nullcontext():
            return omega_of(run.config, values, run.device, dtype, run.topology.tensor_parallel())

    def _answered(self, model: TextModel, rows: PairRows, pairs: Sequence[int]) -> list[str]:
        """Return the answers to all of `pairs`, of which this rank's group gives a share."""
        layout = self._run.topology.layout
        place, groups = self._run.topology.rank // layout.tensor, layout.world_size // layout.tensor
        mine = pairs[place::groups]
        longest = int(rows.shard.lengths()[1].max(initial=1))
        limit = min(round(MORE_THAN_LONGEST * longest) + 1, rows.fit.budget.decoder)
        prompts = [rows.fit.cut(*rows.shard.pair(pair))[0].tolist() for pair in mine]
        given = cast(list[list[str]], self._run.peers.exchange([*written(model, prompts, limit)]))
        answers = [""] * len(pairs)
        for group in range(groups):
            answers[group::groups] = given[group * layout.tensor]
        return answers


class _Frozen:
    """What adapters stand beside, read once as far as it may be kept. Open within `with`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader: CheckpointReader | None = None
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def whole(self, name: str) -> Tensor:
        return self._of(name, lambda reader: reader.tensor(name))

    def slice(self, info: ParameterInfo) -> Tensor:
        """Return what this rank holds of a parameter."""
        name, axis = info.name, info.axis
        if axis is None:
            return self.whole(name)
        return self._of(name, lambda reader: reader.part(name, axis, info.start, info.stop))

    def _of(self, name: str, read: Callable[[CheckpointReader], Tensor]) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        if self._reader is None:
            self._reader = open_checkpoint(self._folder)
        found = read(self._reader)
        if self._bytes + found.nbytes <= KEPT_BYTES:
            self._kept[name] = found
            self._bytes += found.nbytes
        return found


def written(model: TextModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Return what the model writes after each prompt, greedily; all grow together."""
    longest = max(map(len, prompts), default=0) + max_new_tokens + 1
    usual = Limits()
    limits = Limits(memory_tokens=max(usual.memory_tokens, longest), cache_tokens=max(usual.cache_tokens, longest))
    scheduler = Scheduler(model, limits)
    places: dict[int, int] = {}
    for place, prompt in sorted(enumerate(prompts), key=lambda one: -len(one[1])):
        request = Request(*prompt_ids(model, prompt), max_new_tokens, Sampling(temperature=0.0))
        places[scheduler.submit(request)] = place
    found = [""] * len(prompts)
    while not scheduler.idle:
        for event in scheduler.step():
            if isinstance(event, Finished):
                found[places[event.request]] = event.text
    return found


def _worth(task: Task, answers: Sequence[str], wanted: Sequence[str]) -> tuple[str, float]:
    """Return the first metric of a task and its value, 0 to 1; what is written counts, also among choices."""
    metric = task.measured_by[0]
    metric = "exact_match" if metric == "accuracy" else metric
    column = _COLUMN.get(metric, metric)
    value = measure([metric], answers, wanted)[column].value
    return column, value / 100 if metric in _PERCENT else value
