"""Metrics of an answer against the wanted one, by published rules, and how certain their means are. Pure functions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 1000
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return a text as SQuAD's evaluation (1.1) compares it: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, wanted: str) -> float:
    """Return 1 if both say the same, else 0."""
    return float(normalized(answer) == normalized(wanted))


def f1(answer: str, wanted: str) -> float:
    """Return the harmonic mean of precision and recall of words, each as often as it stands there (SQuAD 1.1)."""
    found, gold = normalized(answer).split(), normalized(wanted).split()
    common = sum((Counter(found) & Counter(gold)).values())
    if not common:
        return float(found == gold)
    precision, recall = common / len(found), common / len(gold)
    return 2 * precision * recall / (precision + recall)


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "f1": f1}


@dataclass(frozen=True)
class Mean:
    """A mean over examples, with the interval that holds 95% of the means of resampled examples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def mean_of(values: Sequence[float], seed: int = 0) -> Mean:
    """Return the mean of `values` and its bootstrap interval (percentiles of 1,000 resamples); NaN without values."""
    if not values:
        return Mean(float("nan"), float("nan"), float("nan"))
    array = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(seed)
    means = [array[random.integers(len(array), size=len(array))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(float(array.mean()), float(low), float(high))
