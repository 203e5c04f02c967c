"""How well a model answers: what it writes, or chooses by likelihood, beside what was wanted and beside two guesses.

The guesses know no prompt, or no target: the answer that was most frequent in training, and the first words of the
prompt, as many as answers have on average.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_omega.export.loading import TextModel
from megatron_omega.generation.decoding import limits_for
from megatron_omega.generation.prompts import prompt_ids
from megatron_omega.generation.requests import Finished, Request
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.log import get_logger
from megatron_omega.tasks.likelihood import Asked, Ids, Likelihood, is_cut, likelihoods, room_of
from megatron_omega.tasks.metrics import CORPUS, METRICS, Mean, mean_of, means_of, measure, ratio_of
from megatron_omega.tasks.questions import Exam, Question
from megatron_omega.tasks.sharing import ALONE, Share

logger = get_logger(__name__)
GREEDY = Sampling(temperature=0.0)
_TOGETHER = 64
"""Texts that are written at the same time."""
_CHUNK = 4096
"""Tokens of prompts that are read between two steps: many, since nobody waits for a first token."""
MOST_FREQUENT, FIRST_WORDS = "most frequent answer", "first words"
WRITTEN = {*METRICS, "rouge", *CORPUS}
"""Metrics of what a model writes."""
ACCURACIES = ("accuracy", "accuracy_token", "accuracy_byte", "accuracy_character")
"""Of the choice with the highest log p: as it is, by its tokens, by its UTF-8 bytes, by its characters."""


@dataclass(frozen=True)
class Answered:
    """One question and what became of it."""

    source: str
    """File and record."""
    prompt: str
    wanted: str
    answer: str
    """What was written or chosen; empty if neither was asked for."""
    log_probability: float = math.nan
    """Of the wanted answer, nats."""


@dataclass(frozen=True)
class Score:
    """A model, or a guess, on one task."""

    task: str
    model: str
    shots: int
    metrics: dict[str, Mean]
    loss: float
    """Mean cross-entropy of target tokens, nats; not a number for a guess."""
    answers: tuple[Answered, ...]
    is_guess: bool = False


def score(model: TextModel, exam: Exam, *, name: str, share: Share = ALONE, seed: int = 0) -> Score:
    """Let `model` take an exam: write answers greedily, choose by likelihood, say how probable the right answer is."""
    questions = exam.questions
    _tell_cuts(model, exam)
    metrics: dict[str, Mean] = {}
    answers = [""] * len(questions)
    if written := [name for name in exam.metrics if name in WRITTEN]:
        answers = write(model, exam, share)
        metrics |= measure(written, answers, [one.wanted for one in questions], seed)
    if "accuracy" in exam.metrics:
        picked = choose(model, questions, share)
        metrics |= accuracies(questions, picked, seed)
        if not written:
            answers = [one.choices[best[0]].text for one, best in zip(questions, picked, strict=True)]
    known = likelihoods(model, [one.asked for one in questions], share)
    metrics |= of_targets(exam, known, seed)
    loss = -sum(one.nats for one in known) / max(1, sum(len(one.target) for one in questions))
    found = tuple(
        Answered(one.source, one.prompt, one.wanted, answer, likelihood.nats)
        for one, answer, likelihood in zip(questions, answers, known, strict=True)
    )
    return Score(exam.name, name, exam.shots, metrics, loss, found)


def guesses(exam: Exam, *, seed: int = 0) -> list[Score]:
    """Return what the two guesses reach on the same questions; none where nothing is written or known of training."""
    names = [name for name in exam.metrics if name in WRITTEN]
    if not exam.train:
        return []
    words = max(1, round(float(np.mean([len(answer.split()) for answer in exam.train]))))
    frequent = Counter(exam.train).most_common(1)[0][0]
    made: dict[str, Callable[[str], str]] = {
        MOST_FREQUENT: lambda _: frequent,
        FIRST_WORDS: lambda prompt: " ".join(prompt.split()[:words]),
    }
    scores = []
    for name, guess in made.items():
        found = tuple(Answered(one.source, one.prompt, one.wanted, guess(one.prompt)) for one in exam.questions)
        metrics = measure(names, [one.answer for one in found], [one.wanted for one in found], seed)
        if "accuracy" in exam.metrics and name == MOST_FREQUENT:
            metrics["accuracy"] = mean_of([float(one.answer.strip() == one.wanted.strip()) for one in found], seed)
        if metrics:
            scores.append(Score(exam.name, name, 0, metrics, math.nan, found, is_guess=True))
    return scores


def choose(model: TextModel, questions: Sequence[Question], share: Share = ALONE) -> list[tuple[int, ...]]:
    """Return the most probable choice of each question by each of `ACCURACIES`; the first one, of equal ones."""
    asked = [Asked(one.context, choice.ids, one.before) for one in questions for choice in one.choices]
    known = iter(likelihoods(model, asked, share))
    found = []
    for one in questions:
        nats, tokens = [next(known).nats for _ in one.choices], [len(choice.ids) for choice in one.choices]
        found.append(most_probable(nats, tokens, [choice.text for choice in one.choices]))
    return found


def most_probable(nats: Sequence[float], tokens: Sequence[int], texts: Sequence[str]) -> tuple[int, ...]:
    """Return the number of the choice with the highest log p by each of `ACCURACIES`."""
    sizes = ([1] * len(texts), tokens, [len(text.encode()) for text in texts], [len(text) for text in texts])
    return tuple(int((np.array(nats) / np.array(size)).argmax()) for size in sizes)


def accuracies(questions: Sequence[Question], picked: Sequence[Sequence[int]], seed: int) -> dict[str, Mean]:
    """Return the share of questions of which the right choice is the most probable, by each measure."""
    rows: list[Mapping[str, float]] = [
        {name: float(number == one.right) for name, number in zip(ACCURACIES, numbers, strict=True)}
        for one, numbers in zip(questions, picked, strict=True)
    ]
    return means_of(rows, ACCURACIES, seed)


def of_targets(exam: Exam, known: Sequence[Likelihood], seed: int) -> dict[str, Mean]:
    """Return the metrics that follow from how probable the right answers, or whole texts, are."""
    losses = [-one.nats for one in known]
    texts = [one.wanted for one in exam.questions]
    num_bytes = [float(len(text.encode())) for text in texts]
    words = [float(len(re.split(r"\s+", text))) for text in texts]
    made: dict[str, Callable[[], Mean]] = {
        "greedy": lambda: mean_of([float(one.is_greedy) for one in known], seed),
        "perplexity": lambda: ratio_of(losses, [1.0] * len(losses), seed, then=_exp),
        "word_perplexity": lambda: ratio_of(losses, words, seed, then=_exp),
        "byte_perplexity": lambda: ratio_of(losses, num_bytes, seed, then=_exp),
        "bits_per_byte": lambda: ratio_of(losses, num_bytes, seed, then=lambda nats: nats / math.log(2)),
    }
    return {name: make() for name, make in made.items() if name in exam.metrics}


def write(model: TextModel, exam: Exam, share: Share = ALONE) -> list[str]:
    """Answer all questions greedily, many at a time, those with the longest prompts first."""
    order = sorted(range(len(exam.questions)), key=lambda at: -len(exam.questions[at].context))
    found = share.collect([exam.questions[at] for at in order], lambda mine: _write(model, mine, exam))
    answers = [""] * len(order)
    for at, answer in zip(order, found, strict=True):
        answers[at] = answer
    return answers


def _write(model: TextModel, questions: Sequence[Question], exam: Exam) -> list[str]:
    return answered(
        model,
        [request_of(model, one.context, exam.max_new_tokens, before=one.before, stop=exam.stop) for one in questions],
    )


def answered(model: TextModel, requests: Sequence[Request]) -> list[str]:
    """Return the texts that answer requests, all of them together."""
    if not requests:
        return []
    limits = limits_for(requests, min(_TOGETHER, len(requests)))
    scheduler = Scheduler(model, replace(limits, chunk_tokens=_CHUNK))
    places = {scheduler.submit(request): place for place, request in enumerate(requests)}
    answers = [""] * len(requests)
    while not scheduler.idle:
        for event in scheduler.step():
            if isinstance(event, Finished):
                answers[places[event.request]] = event.text
    return answers


def request_of(
    model: TextModel, context: Ids, max_new_tokens: int, *, before: Ids = (), sampling: Sampling = GREEDY,
    stop: tuple[str, ...] = (), seed: int = 0,
) -> Request:  # fmt: skip
    """Return the request that continues `context`, of which the start is left out if it is too long."""
    room = room_of(model)
    most = room.encoder or max(1, room.decoder - max_new_tokens - len(before))
    encoder, decoder = prompt_ids(model, context[max(0, len(context) - most) :])
    return Request(encoder, (*decoder, *before), max_new_tokens, sampling, stop=stop, seed=seed)


def _tell_cuts(model: TextModel, exam: Exam) -> None:
    room = room_of(model)
    cut = sum(is_cut(one.asked, room) for one in exam.questions if one.context)
    if cut:
        logger.warning(
            "%s: %d of %d prompts are longer than the model reads at once and lose their start",
            exam.name, cut, len(exam.questions),
        )  # fmt: skip


def _exp(nats: float) -> float:
    return math.exp(min(700.0, nats))
