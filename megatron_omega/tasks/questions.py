"""Held-out pairs as questions: what the model reads, with examples before it, what it has to say, and the choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from megatron_omega.config.schema import RunConfig, Task
from megatron_omega.data.pairs.records import open_records
from megatron_omega.data.pairs.source import PairRows
from megatron_omega.data.pairs.templates import FieldError, Template
from megatron_omega.data.sources import open_sources
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError
from megatron_omega.tasks.likelihood import Asked, Ids

Stream = Literal["encoder", "decoder", "both"]
STREAMS: tuple[Stream, ...] = ("encoder", "decoder", "both")
SEPARATOR = "\n\n"
MORE_THAN_LONGEST = 1.25
"""How much longer than the longest target an answer may be."""


@dataclass(frozen=True)
class Choice:
    """One answer to choose."""

    text: str
    ids: Ids


@dataclass(frozen=True)
class Question:
    """One thing to ask, and its answer."""

    source: str
    """File and record."""
    prompt: str
    """For people: without examples."""
    wanted: str
    context: Ids
    """What the encoder reads behind its mode token; a decoder-only model reads it behind the begin token."""
    target: Ids
    """Tokens of the answer, with the end token if there is one."""
    before: Ids = ()
    """What the decoder reads, and does not predict, before the answer."""
    choices: tuple[Choice, ...] = ()
    right: int = -1

    @property
    def asked(self) -> Asked:
        """The question whether the model would say the answer."""
        return Asked(self.context, self.target, self.before)


@dataclass(frozen=True)
class Exam:
    """The questions of a task, and how answers are measured."""

    name: str
    metrics: tuple[str, ...]
    """Those of a task, or of harness files: greedy, perplexity, word_perplexity, byte_perplexity, bits_per_byte."""
    questions: tuple[Question, ...]
    max_new_tokens: int = 1
    stop: tuple[str, ...] = ()
    shots: int = 0
    train: tuple[str, ...] = ()
    """Answers of training, for guesses."""


@dataclass(frozen=True)
class Asking:
    """How questions are made of pairs."""

    shots: int = 0
    """Examples from training before each."""
    stream: Stream = "encoder"
    """Where examples stand; a decoder-only model has one place."""
    limit: int | None = None
    """Questions of a task, drawn by seed; all without it."""
    seed: int = 0


def held_out(config: RunConfig, tasks: Sequence[Task]) -> tuple[tuple[PairRows, ...], tuple[PairRows, ...]]:
    """Return training and held-out pairs of `tasks`, as a run of this configuration has them.

    Raises DataError with everything that is wrong with them.
    """
    data = config.data.model_copy(update={"tasks": tuple(tasks), "text_fraction": 0.0})
    sources = open_sources(config.model_copy(update={"data": data}))
    return tuple(sources.train.corpora), tuple(sources.validation.corpora)


def exams_of(config: RunConfig, tasks: Sequence[Task], tokenizer: Tokenizer, asking: Asking) -> list[Exam]:
    """Return an exam for each task that holds out pairs. Raises DataError with what is wrong with any of them."""
    exams: list[Exam] = []
    findings: list[str] = []
    for task, train, held in zip(tasks, *held_out(config, tasks), strict=True):
        if not len(held):
            continue
        try:
            exams.append(_exam(task, train, held, tokenizer, asking))
        except DataError as error:
            findings += error.findings
    if findings:
        raise DataError(*findings)
    return exams


def _exam(task: Task, train: PairRows, held: PairRows, tokenizer: Tokenizer, asking: Asking) -> Exam:
    random = np.random.default_rng(asking.seed)
    pairs = chosen(held, asking.limit, random)
    choices = _choices(task, pairs, tokenizer) if task.choices else {}
    questions = []
    for pair in pairs:
        examples = _examples(train, tokenizer, asking.shots, random)
        questions.append(_question(held, pair, examples, choices.get(pair), tokenizer, asking))
    longest = int(held.shard.lengths()[1][pairs].max(initial=1))
    answers = tuple(tokenizer.decode(train.shard.pair(pair)[1].tolist()) for pair in train.pairs.tolist())
    return Exam(
        held.shard.name, task.measured_by, tuple(questions), round(MORE_THAN_LONGEST * longest) + 1,
        shots=asking.shots, train=answers,
    )  # fmt: skip


def chosen(held: PairRows, limit: int | None, random: np.random.Generator) -> list[int]:
    """Return the pairs to be asked, in their order."""
    pairs = held.pairs
    if limit is not None and limit < len(pairs):
        pairs = np.sort(random.choice(pairs, size=limit, replace=False))
    return pairs.tolist()


def _examples(train: PairRows, tokenizer: Tokenizer, shots: int, random: np.random.Generator) -> Ids:
    """Return `shots` pairs with their targets, each followed by an empty line."""
    separator = tokenizer.encode(SEPARATOR)
    shown = random.choice(train.pairs, size=min(shots, len(train.pairs)), replace=False).tolist() if shots else []
    return tuple(chain.from_iterable([*_whole(train, pair), *separator] for pair in shown))


def _whole(rows: PairRows, pair: int) -> list[int]:
    prompt, target = rows.shard.pair(pair)
    return [*prompt.tolist(), *target.tolist()]


def _question(
    held: PairRows, pair: int, examples: Ids, choices: tuple[int, tuple[Choice, ...]] | None, tokenizer: Tokenizer,
    asking: Asking,
) -> Question:  # fmt: skip
    prompt, target = held.shard.pair(pair)
    kept, answer, is_whole = (prompt, target, True) if examples else held.fit.cut(prompt, target)
    stream = asking.stream if held.fit.has_encoder else "encoder"
    right, options = choices or (-1, ())
    return Question(
        source=held.shard.place(pair),
        prompt=tokenizer.decode(prompt.tolist()),
        wanted=tokenizer.decode(target.tolist()),
        context=(*(examples if stream != "decoder" else ()), *kept.tolist()),
        target=(*answer.tolist(), *([tokenizer.special.eos] if is_whole else [])),
        before=examples if stream != "encoder" else (),
        choices=options,
        right=right,
    )


def _choices(task: Task, pairs: Sequence[int], tokenizer: Tokenizer) -> dict[int, tuple[int, tuple[Choice, ...]]]:
    """Return, of each pair, which choice is right, and all of them. Raises DataError if any pair has none."""
    templates, target = [_template(text) for text in task.choices], _template(task.target)
    found: dict[int, tuple[int, tuple[Choice, ...]]] = {}
    findings: dict[str, list[str]] = {}
    for pair, place, record in _records(task, pairs):
        try:
            texts = list(chain.from_iterable(template.render_each(record) for template in templates))
            found[pair] = right_choice(texts, target.render(record), tokenizer)
        except (FieldError, ValueError) as error:
            findings.setdefault(str(error), []).append(place)
    if findings:
        raise DataError(*(
            f"{places[0]} {reason}, as do {len(places) - 1:,} others; mend the records or the choices of "
            f"{task.name or task.path}" for reason, places in findings.items()
        ))  # fmt: skip
    return found


def right_choice(texts: Sequence[str], target: str, tokenizer: Tokenizer) -> tuple[int, tuple[Choice, ...]]:
    """Return which choice says `target`, and all of them. Raises ValueError, in words, if none does."""
    same = [number for number, text in enumerate(texts) if text.strip() == target.strip()]
    if len(texts) < 2 or not all(text.strip() for text in texts):
        raise ValueError(f"has {len(texts)} choices, or an empty one")
    if not same:
        raise ValueError("has a target that is none of its choices")
    return same[0], tuple(Choice(text, tuple(tokenizer.encode(text))) for text in texts)


def text_asked(tokenizer: Tokenizer, context: str, continuation: str) -> Asked:
    """Return two texts as ids: encoded apart, white space at the end of the context moved to the continuation."""
    kept = context.rstrip()
    whole = context[len(kept) :] + continuation
    return Asked(tuple(tokenizer.encode(kept)), tuple(tokenizer.encode(whole)))


def _template(text: str) -> Template:
    try:
        return Template.parse(text)
    except ValueError as error:
        raise DataError(f"{text!r} is no template: {error}; write braces that are text twice") from None


def _records(task: Task, pairs: Sequence[int]) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Yield the records that these pairs were made of, with their places."""
    path, split = (task.validation, task.validation_split) if task.validation else (task.path, task.split)
    wanted, number = set(pairs), 0
    for part in open_records(path, split):
        for place, record in enumerate(part.records, start=1):
            if number in wanted and isinstance(record, Mapping):
                yield number, f"{part.place}:{place}", record
            number += 1
