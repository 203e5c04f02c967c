"""Metrics of answers against the wanted ones, by published rules, and how certain they are. Pure functions.

exact_match, f1   SQuAD's evaluation (1606.05250; an empty answer as in 2.0)     0 to 1, a mean over answers
rouge             ROUGE-1, ROUGE-2 and ROUGE-L (F) by rouge-score, unstemmed      0 to 1, a mean over answers
bleu, chrf        by sacrebleu, over all answers together                         0 to 100
accuracy          of choices by likelihood: see `choices`                         0 to 1, a mean over questions
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_omega.config.check.data import missing_packages
from megatron_omega.config.schema import Metric
from megatron_omega.errors import ConfigError

_RESAMPLES = 1000
_INTERVAL = (0.025, 0.975)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return a text as SQuAD's evaluation (1.1) compares it: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, wanted: str) -> float:
    """Return 1 if both say the same, else 0."""
    return float(normalized(answer) == normalized(wanted))


def f1(answer: str, wanted: str) -> float:
    """Return the harmonic mean of precision and recall of words, each as often as it stands there (SQuAD)."""
    found, gold = normalized(answer).split(), normalized(wanted).split()
    common = sum((Counter(found) & Counter(gold)).values())
    if not common:
        return float(found == gold)
    precision, recall = common / len(found), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def same(answer: str, wanted: str) -> float:
    """Return 1 if both are the same, letter by letter, else 0 (lm-evaluation-harness's exact_match)."""
    return float(answer == wanted)


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "f1": f1, "same": same}
"""Of one answer, in the standard library alone."""
ROUGE = ("rouge1", "rouge2", "rougeL")
CORPUS = {"bleu": "BLEU", "chrf": "CHRF"}
"""Of all answers together -> its class in sacrebleu."""


def rouge(answer: str, wanted: str) -> dict[str, float]:
    """Return F of ROUGE-1, ROUGE-2 and ROUGE-L as rouge-score computes them, without stemming (its default)."""
    return {name: float(score.fmeasure) for name, score in _rouge().score(wanted, answer).items()}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE))


def corpus_score(name: str, answers: Sequence[str], wanted: Sequence[str], seed: int = 0) -> Mean:
    """Return sacrebleu's BLEU or chrF of all answers, 0 to 100; resampled are counts of answers, as sacrebleu does."""
    from sacrebleu import metrics

    if not answers:
        return mean_of([])
    metric: Any = getattr(metrics, CORPUS[name])()
    counts = np.asarray(metric._extract_corpus_statistics(list(answers), [list(wanted)]))

    def score(rows: NDArray[Any]) -> float:
        return float(metric._compute_score_from_stats(rows.sum(axis=0).tolist()).score)

    random = np.random.default_rng(seed)
    scores = [score(counts[random.integers(len(counts), size=len(counts))]) for _ in range(_RESAMPLES)]
    return Mean(score(counts), *map(float, np.quantile(scores, _INTERVAL)))


def require_metrics(names: Iterable[Metric]) -> None:
    """Raise ConfigError, before any work, for each metric of which the package is missing."""
    findings = [*missing_packages(names)]
    if findings:
        raise ConfigError(*findings)


def measure(names: Sequence[str], answers: Sequence[str], wanted: Sequence[str], seed: int = 0) -> dict[str, Mean]:
    """Return the metrics of answers by their columns: rouge has three, accuracy none here."""
    found: dict[str, Mean] = {}
    pairs = list(zip(answers, wanted, strict=True))
    for name in names:
        if name in METRICS:
            found[name] = mean_of([METRICS[name](*pair) for pair in pairs], seed)
        elif name == "rouge":
            found |= means_of([rouge(*pair) for pair in pairs], ROUGE, seed)
        elif name in CORPUS:
            found[name] = corpus_score(name, answers, wanted, seed)
    return found


def each(column: str, answers: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """Return what each answer is worth in a column of `measure`; nothing for what only all together are worth."""
    if column in METRICS:
        return [METRICS[column](*pair) for pair in zip(answers, wanted, strict=True)]
    if column in ROUGE:
        return [rouge(*pair)[column] for pair in zip(answers, wanted, strict=True)]
    return []


def means_of(values: Sequence[Mapping[str, float]], columns: Sequence[str], seed: int = 0) -> dict[str, Mean]:
    """Return the mean of each column."""
    return {column: mean_of([row[column] for row in values], seed) for column in columns}


@dataclass(frozen=True)
class Mean:
    """A mean over examples, with the interval that holds 95% of the means of resampled examples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        is_certain = self.low == self.low
        return f"{self.value:.3f}" + (f" ({self.low:.3f} to {self.high:.3f})" if is_certain else "")


def mean_of(values: Sequence[float], seed: int = 0) -> Mean:
    """Return the mean of `values` and its bootstrap interval (percentiles of 1,000 resamples); NaN without values."""
    if not values:
        return Mean(float("nan"), float("nan"), float("nan"))
    array = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(seed)
    means = [array[random.integers(len(array), size=len(array))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, _INTERVAL)
    return Mean(float(array.mean()), float(low), float(high))


def ratio_of(
    above: Sequence[float], below: Sequence[float], seed: int = 0, *, then: Callable[[float], float] = float
) -> Mean:
    """Return `then` of sum(above) / sum(below), and the interval of resampled examples; one alone has none: NaN."""
    if not above:
        return mean_of([])
    parts = np.asarray([above, below], dtype=np.float64)
    random = np.random.default_rng(seed)
    drawn = (parts[:, random.integers(parts.shape[1], size=parts.shape[1])].sum(axis=1) for _ in range(_RESAMPLES))
    low, high = np.quantile([then(float(one / other)) for one, other in drawn], _INTERVAL)
    total = parts.sum(axis=1)
    if len(above) < 2:
        low = high = float("nan")
    return Mean(then(float(total[0] / total[1])), float(low), float(high))
