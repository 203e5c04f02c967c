"""How well a model answers: what it generates for held-out prompts, compared with the targets, beside two guesses.

The guesses know no prompt, or no target: the answer that was most frequent in training, and the first words of the
prompt, as many as targets have on average.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.config.schema import Metric, RunConfig, Task
from megatron_omega.data.batch import stack
from megatron_omega.data.pairs.source import PairRows
from megatron_omega.data.sources import open_sources
from megatron_omega.export.loading import TextModel
from megatron_omega.generation.prompts import prompt_ids
from megatron_omega.generation.requests import Finished, Limits, Request
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.tasks.metrics import Mean, measure

MORE_THAN_LONGEST = 1.25
"""How much longer than the longest target an answer may be."""
_ROWS_AT_ONCE = 4
_SEPARATOR = "\n\n"
MOST_FREQUENT, FIRST_WORDS = "most frequent answer", "first words"


@dataclass(frozen=True)
class Answered:
    """One held-out pair and what became of it."""

    source: str
    """File and record."""
    prompt: str
    wanted: str
    answer: str


@dataclass(frozen=True)
class Score:
    """A model, or a guess, on one task."""

    task: str
    model: str
    shots: int
    metrics: dict[str, Mean]
    loss: float
    """Mean cross-entropy of target tokens, nats; not a number for a guess, and with examples in the prompt."""
    answers: tuple[Answered, ...]


def held_out(config: RunConfig, tasks: Sequence[Task]) -> tuple[tuple[PairRows, ...], tuple[PairRows, ...]]:
    """Return training and held-out pairs of `tasks`, as a run of this configuration has them.

    Raises DataError with everything that is wrong with them.
    """
    data = config.data.model_copy(update={"tasks": tuple(tasks), "text_fraction": 0.0})
    sources = open_sources(config.model_copy(update={"data": data}))
    return tuple(sources.train.corpora), tuple(sources.validation.corpora)


def score(
    model: TextModel, train: PairRows, held: PairRows, *, name: str, metrics: Sequence[Metric], shots: int = 0,
    limit: int | None = None, seed: int = 0,
) -> Score:  # fmt: skip
    """Let `model` answer held-out prompts, greedily, `shots` training pairs before each prompt.

    limit: how many pairs, drawn by seed; all of them without it.
    """
    random = np.random.default_rng(seed)
    pairs = chosen(held, limit, random)
    longest = int(held.shard.lengths()[1][pairs].max(initial=1))
    answers = generate(
        model, _prompts(model, train, held, pairs, shots, random), round(MORE_THAN_LONGEST * longest) + 1
    )
    found = tuple(_answered(model, held, pair, answer) for pair, answer in zip(pairs, answers, strict=True))
    loss = float("nan") if shots else target_loss(model, held)
    return Score(held.shard.name, name, shots, metrics_of(metrics, found, seed), loss, found)


def guesses(
    model: TextModel, train: PairRows, held: PairRows, *, metrics: Sequence[Metric], limit: int | None = None,
    seed: int = 0,
) -> list[Score]:  # fmt: skip
    """Return what the two guesses reach on the same pairs."""
    pairs = chosen(held, limit, np.random.default_rng(seed))
    targets = [model.tokenizer.decode(train.shard.pair(pair)[1].tolist()) for pair in train.pairs.tolist()]
    words = max(1, round(float(np.mean([len(target.split()) for target in targets]))))
    frequent = Counter(targets).most_common(1)[0][0]
    made = {MOST_FREQUENT: lambda _: frequent, FIRST_WORDS: lambda prompt: " ".join(prompt.split()[:words])}
    scores = []
    for name, guess in made.items():
        found = [_answered(model, held, pair, "") for pair in pairs]
        found = [Answered(one.source, one.prompt, one.wanted, guess(one.prompt)) for one in found]
        means = metrics_of(metrics, found, seed)
        scores.append(Score(held.shard.name, name, 0, means, float("nan"), tuple(found)))
    return scores


def chosen(held: PairRows, limit: int | None, random: np.random.Generator) -> list[int]:
    """Return the pairs to be asked, in their order."""
    pairs = held.pairs
    if limit is not None and limit < len(pairs):
        pairs = np.sort(random.choice(pairs, size=limit, replace=False))
    return pairs.tolist()


def metrics_of(names: Sequence[Metric], answers: Sequence[Answered], seed: int) -> dict[str, Mean]:
    """Return the named metrics over all answers."""
    return measure(names, [one.answer for one in answers], [one.wanted for one in answers], seed)


def generate(model: TextModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Answer all prompts, greedily and together, the longest first; return the answers in the order of the prompts."""
    longest = max(map(len, prompts), default=0) + max_new_tokens + 1
    limits = Limits(
        memory_tokens=max(Limits().memory_tokens, longest), cache_tokens=max(Limits().cache_tokens, longest)
    )
    scheduler = Scheduler(model, limits)
    places: dict[int, int] = {}
    for place in sorted(range(len(prompts)), key=lambda place: -len(prompts[place])):
        encoder, decoder = prompt_ids(model, prompts[place])
        request = Request(encoder, decoder, max_new_tokens, Sampling(temperature=0.0))
        places[scheduler.submit(request)] = place
    answers = [""] * len(prompts)
    while not scheduler.idle:
        for event in scheduler.step():
            if isinstance(event, Finished):
                answers[places[event.request]] = event.text
    return answers


@torch.inference_mode()
def target_loss(model: TextModel, held: PairRows) -> float:
    """Return the mean cross-entropy of the held-out targets' tokens, nats."""
    total = labels = 0.0
    rows = [held.build(row, 0)[0] for row in range(len(held))]
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        batch = stack(rows[first : first + _ROWS_AT_ONCE])
        streams = [batch.decoder_ids, batch.decoder_segments]
        if held.fit.has_encoder:
            streams = [batch.encoder_ids, batch.encoder_segments, *streams]
        inputs = tuple(torch.from_numpy(stream).to(model.device) for stream in streams)
        wanted = [torch.from_numpy(part).to(model.device) for part in (batch.lm_labels, batch.mlm_labels)]
        nothing = torch.empty(0, dtype=torch.long, device=model.device)
        model.model(inputs, (*wanted, torch.ones(2, device=model.device), nothing))
        total += float(model.model.loss_parts["lm_loss"])
        labels += float((batch.lm_labels != IGNORED_LABEL).sum())
    return total / labels if labels else float("nan")


def _prompts(
    model: TextModel, train: PairRows, held: PairRows, pairs: Sequence[int], shots: int, random: np.random.Generator
) -> list[list[int]]:
    """Return the ids of every prompt, `shots` other pairs with their targets before it, apart by an empty line."""
    separator = model.tokenizer.encode(_SEPARATOR)
    found = []
    for pair in pairs:
        ids: list[int] = []
        for shown in random.choice(train.pairs, size=min(shots, len(train.pairs)), replace=False).tolist():
            prompt, target = train.shard.pair(shown)
            ids += [*prompt.tolist(), *target.tolist(), *separator]
        found.append([*ids, *held.shard.pair(pair)[0].tolist()])
    return found


def _answered(model: TextModel, held: PairRows, pair: int, answer: str) -> Answered:
    prompt, target = (model.tokenizer.decode(part.tolist()) for part in held.shard.pair(pair))
    return Answered(held.shard.place(pair), prompt, target, answer)
