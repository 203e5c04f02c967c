"""Beam search over log-probabilities. Knows no model and no cache: it is told what may follow each of its texts.

    score     sum of log-probabilities / length ** length_penalty, an end token counted
    step      of all texts with one token more, the 2 * width most probable (more, if several ids end a text): ended
              ones among the first `width` are put aside, the best of the others go on
    end       when `width` texts have ended and the best that goes on scores, at its present length, no higher than
              the worst of them; or at the longest length, where all count as ended

As Transformers does it (early_stopping=False).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hypothesis:
    """A text, and how probable it is."""

    ids: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    total: float = 0.0

    def followed_by(self, token: int, log_probability: float) -> Hypothesis:
        """Return the text with one token more."""
        return Hypothesis((*self.ids, token), (*self.log_probabilities, log_probability), self.total + log_probability)

    def score(self, length_penalty: float) -> float:
        """Return what texts of different lengths are compared by."""
        return self.total / len(self.ids) ** length_penalty


class Candidate(NamedTuple):
    """A text that may go on, and the place of the one it comes from."""

    parent: int
    hypothesis: Hypothesis


class BeamSearch:
    """The texts of one prompt."""

    def __init__(
        self, width: int, longest: int, length_penalty: float, ends: Callable[[tuple[int, ...]], bool], end_ids: int = 1
    ) -> None:
        self.running = [Hypothesis()]
        self.ended: list[Hypothesis] = []
        self._width, self._longest, self._length_penalty = width, longest, length_penalty
        self._ends = ends
        self._looked_at = max(2, 1 + end_ids) * width

    def advance(self, log_probabilities: Tensor) -> list[int]:
        """Give each running text, of which [running, v] says what follows, one token more; return their parents.

        An empty list: the search is over, and `best` holds what it found.
        """
        candidates = self._candidates(log_probabilities)
        is_last = len(candidates[0].hypothesis.ids) >= self._longest
        has_ended = [is_last or self._ends(found.hypothesis.ids) for found in candidates]
        first = candidates[: self._width]
        self._put_aside([found.hypothesis for found, ended in zip(first, has_ended, strict=False) if ended])
        going = [found for found, ended in zip(candidates, has_ended, strict=True) if not ended][: self._width]
        self.running = [found.hypothesis for found in going]
        return [found.parent for found in going] if going and self._can_improve() else []

    def best(self, count: int) -> list[Hypothesis]:
        """Return the best texts, the best one first."""
        return self.ended[:count]

    def _candidates(self, log_probabilities: Tensor) -> list[Candidate]:
        totals = torch.tensor([found.total for found in self.running], device=log_probabilities.device)
        scores = (log_probabilities + totals.unsqueeze(1)).flatten()
        best = scores.topk(min(self._looked_at, len(scores)))
        found = []
        for place in best.indices[best.values > float("-inf")].tolist():
            parent, token = divmod(place, log_probabilities.shape[1])
            following = self.running[parent].followed_by(token, float(log_probabilities[parent, token]))
            found.append(Candidate(parent, following))
        return found

    def _put_aside(self, found: list[Hypothesis]) -> None:
        both = [*self.ended, *found]
        self.ended = sorted(both, key=lambda text: text.score(self._length_penalty), reverse=True)[: self._width]

    def _can_improve(self) -> bool:
        if len(self.ended) < self._width:
            return True
        return self.running[0].score(self._length_penalty) > self.ended[-1].score(self._length_penalty)
