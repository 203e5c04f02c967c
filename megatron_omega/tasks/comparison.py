"""Scores of several models beside each other: rows, Markdown, JSON; and the curves by which they learned."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson

from megatron_omega.accounting.counts import training_flops_per_token
from megatron_omega.config.schema import RunConfig
from megatron_omega.host import run_folder
from megatron_omega.host.json_lines import read_objects
from megatron_omega.tasks.metrics import Mean, each, mean_of
from megatron_omega.tasks.scoring import Score

SMALLER_IS_BETTER = ("loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "masked_loss")
LEADS = "Question by question, above the best guess; certain where the brackets leave out 0:"
_MOST_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """How a run learned: loss by tokens, what a token cost, and what its answers were worth."""

    model: str
    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    flops_per_token: float
    answers: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    """By task and metric: tokens, and what held-out answers were worth in the validation then."""

    @property
    def flops(self) -> tuple[float, ...]:
        return tuple(self.flops_per_token * count for count in self.tokens)


@dataclass(frozen=True)
class Lead:
    """By how much a model's answers are better than the best guess's to the same questions."""

    task: str
    column: str
    model: str
    guess: str
    difference: Mean
    """Mean over questions of the model's figure less the guess's."""

    def __str__(self) -> str:
        return f"{self.model}: {self.column} {self.difference} above {self.guess}"


@dataclass(frozen=True)
class Comparison:
    """All scores, in the order of models and tasks."""

    scores: tuple[Score, ...]
    curves: tuple[Curve, ...] = ()

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(one.task for one in self.scores))

    @property
    def models(self) -> list[str]:
        """Models in their order, guesses last."""
        ordered = sorted(self.scores, key=lambda one: one.is_guess)
        return list(dict.fromkeys(one.model for one in ordered))

    def of(self, task: str, model: str) -> Score | None:
        """Return a model's score on a task."""
        return next((one for one in self.scores if (one.task, one.model) == (task, model)), None)

    def columns(self, task: str) -> list[str]:
        """Return the figures that any model has on a task; `loss` last."""
        names = dict.fromkeys(name for one in self.scores if one.task == task for name in one.metrics)
        has_loss = any(one.loss == one.loss for one in self.scores if one.task == task)
        return [*names, *(["loss"] if has_loss else [])]

    def value(self, task: str, model: str, column: str) -> Mean | None:
        """Return a figure; None where the model has none."""
        found = self.of(task, model)
        if found is None:
            return None
        if column == "loss":
            return Mean(found.loss, float("nan"), float("nan")) if found.loss == found.loss else None
        return found.metrics.get(column)

    def guesses(self, task: str, column: str) -> list[tuple[str, Mean]]:
        """Return what each guess reaches in a column of a task."""
        found = [one for one in self.scores if one.task == task and one.is_guess and column in one.metrics]
        return [(one.model, one.metrics[column]) for one in found]

    def leads(self, task: str) -> list[Lead]:
        """Return how far each model is above the best guess of each column, paired by question.

        Intervals of two models say little of their difference: both have the same hard questions.
        """
        found = []
        for column in self.columns(task):
            if not (guesses := self.guesses(task, column)):
                continue
            guess = max(guesses, key=lambda pair: pair[1].value)[0]
            for model in self.models:
                score = self.of(task, model)
                if score is not None and not score.is_guess and (paired := self._differences(score, guess, column)):
                    found.append(Lead(task, column, model, guess, mean_of(paired)))
        return found

    def _differences(self, score: Score, guess: str, column: str) -> list[float]:
        """Return what each answer is worth less the guess's; nothing where they were asked other questions."""
        other = self.of(score.task, guess)
        wanted = [one.wanted for one in score.answers]
        if other is None or column not in score.metrics or wanted != [one.wanted for one in other.answers]:
            return []
        ours, theirs = (each(column, [one.answer for one in of.answers], wanted) for of in (score, other))
        return [mine - its for mine, its in zip(ours, theirs, strict=True)]

    def best(self, task: str, column: str) -> float | None:
        """Return the best value of a column among models that are no guesses."""
        means = [self.value(task, one.model, column) for one in self.scores if one.task == task and not one.is_guess]
        values = [mean.value for mean in means if mean is not None and mean.value == mean.value]
        if not values:
            return None
        return min(values) if column in SMALLER_IS_BETTER else max(values)


def markdown(found: Comparison) -> str:
    """Return a table for each task; the best of each column is bold."""
    lines = ["# Comparison", ""]
    for task in found.tasks:
        columns = found.columns(task)
        count = max(len(one.answers) for one in found.scores if one.task == task)
        lines += [f"## {task}", "", f"{count:,} questions; in brackets 95% of the values of resampled ones.", ""]
        lines += [f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for model in found.models:
            if found.of(task, model) is not None:
                cells = [_cell(found, task, model, column) for column in columns]
                lines.append(f"| {_plain(model)} | {' | '.join(cells)} |")
        if leads := found.leads(task):
            lines += ["", LEADS, "", *(f"- {_plain(str(lead))}" for lead in leads)]
        lines.append("")
    return "\n".join(lines)


def _cell(found: Comparison, task: str, model: str, column: str) -> str:
    mean = found.value(task, model, column)
    if mean is None:
        return "-"
    is_best = mean.value == found.best(task, column)
    return f"**{mean}**" if is_best else str(mean)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_json(found: Comparison) -> str:
    """Return everything as JSON; what is not a number is null."""
    leads = [lead for task in found.tasks for lead in found.leads(task)]
    parts = {"scores": found.scores, "leads": leads, "curves": found.curves}
    values = {name: [asdict(one) for one in part] for name, part in parts.items()}
    return json.dumps(json.loads(orjson.dumps(values)), indent=1) + "\n"


def curve_of(model: str, run: Path, config: RunConfig) -> Curve | None:
    """Return the curve of a run folder; None where no step was recorded."""
    recorded = [step for step in read_objects(run / run_folder.METRICS) if step.get("consumed_tokens")]
    steps = [step for step in recorded if step.get("lm_loss") is not None]
    if not steps:
        return None
    kept = steps[:: -(-len(steps) // _MOST_POINTS)]
    return Curve(
        model,
        tuple(int(step["consumed_tokens"]) for step in kept),
        tuple(float(step["lm_loss"]) for step in kept),
        training_flops_per_token(config),
        _answers_of(run, [(int(step["step"]), int(step["consumed_tokens"])) for step in recorded]),
    )


def _answers_of(run: Path, steps: Sequence[tuple[int, int]]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return what answers were worth in validations, the last of each step; `steps` are steps with their tokens."""
    last = {one["step"]: one for one in read_objects(run / run_folder.EVENTS) if one.get("event") == "evaluate"}
    found: dict[str, list[tuple[int, float]]] = {}
    for step, report in sorted(last.items()):
        done = bisect_right(steps, step, key=lambda one: one[0])
        tokens = steps[done - 1][1] if done else 0
        for name, value in (report.get("answers") or {}).items():
            found.setdefault(name, []).append((tokens, float(value)))
    return {name: tuple(points) for name, points in found.items()}
