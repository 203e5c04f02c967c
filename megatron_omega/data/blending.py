"""Blends computed, not stored: which corpus gives sample i, and how many it gave before.

Corpora are the leaves of a binary tree; at every node the left side has given round(i · share) of the first i samples.
Shares are exact fractions, so the proportions hold at every prefix (each corpus within two samples of its due, two
corpora within one half) and never drift. A change of weights starts a new phase where the old one stopped: no corpus
repeats or loses a sample.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class _Leaf:
    corpus: int
    weight: Fraction


@dataclass(frozen=True)
class _Node:
    left: _Leaf | _Node
    right: _Leaf | _Node
    weight: Fraction
    left_parts: int
    """The left share is left_parts / all_parts, exactly."""
    all_parts: int

    def given_left(self, samples: int) -> int:
        return (2 * samples * self.left_parts + self.all_parts) // (2 * self.all_parts)


_Tree = _Leaf | _Node


def _join(left: _Tree, right: _Tree) -> _Node:
    weight = left.weight + right.weight
    share = left.weight / weight
    return _Node(left, right, weight, share.numerator, share.denominator)


def _grow(weights: Sequence[float]) -> _Tree:
    heap: list[tuple[Fraction, int, _Tree]] = [
        (Fraction(weight), corpus, _Leaf(corpus, Fraction(weight)))
        for corpus, weight in enumerate(weights)
        if weight > 0
    ]
    heapq.heapify(heap)
    number = len(weights)
    while len(heap) > 1:
        smaller, larger = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        node = _join(smaller, larger)
        heapq.heappush(heap, (node.weight, number, node))
        number += 1
    return heap[0][2]


def _locate(tree: _Tree, sample: int) -> tuple[int, int]:
    while isinstance(tree, _Node):
        before = tree.given_left(sample)
        if tree.given_left(sample + 1) > before:
            tree, sample = tree.left, before
        else:
            tree, sample = tree.right, sample - before
    return tree.corpus, sample


def _count(tree: _Tree, samples: int, counts: list[int]) -> None:
    if isinstance(tree, _Leaf):
        counts[tree.corpus] += samples
        return
    left = tree.given_left(samples)
    _count(tree.left, left, counts)
    _count(tree.right, samples - left, counts)


class Blend:
    """Which corpus, and which of its samples, stands at each place of the blend.

    `weights` hold from sample 0; each of `changes` is (first sample, weights from there on), ascending.
    """

    def __init__(self, weights: Sequence[float], changes: Sequence[tuple[int, Sequence[float]]] = ()) -> None:
        phases = [(0, weights), *changes]
        if any(len(each) != len(weights) or not any(weight > 0 for weight in each) for _, each in phases):
            raise ValueError(f"every phase needs {len(weights)} weights, at least one above zero")
        self._starts = [start for start, _ in phases]
        if sorted(set(self._starts)) != self._starts:
            raise ValueError(f"phases must start at ascending samples, not at {self._starts}")
        self._trees = [_grow(each) for _, each in phases]
        self._bases: list[list[int]] = [[0] * len(weights)]
        for number in range(1, len(phases)):
            counts = list(self._bases[-1])
            _count(self._trees[number - 1], self._starts[number] - self._starts[number - 1], counts)
            self._bases.append(counts)

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (corpus, number of the sample inside that corpus) of global `sample`."""
        phase = bisect_right(self._starts, sample) - 1
        corpus, inner = _locate(self._trees[phase], sample - self._starts[phase])
        return corpus, self._bases[phase][corpus] + inner

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` each corpus gives."""
        phase = max(0, bisect_right(self._starts, samples - 1) - 1)
        counts = list(self._bases[phase])
        _count(self._trees[phase], samples - self._starts[phase], counts)
        return counts

    def sample_of(self, corpus: int, number: int, limit: int) -> int | None:
        """Return the global sample that is the `number`-th of `corpus`; None if it is not below `limit`."""
        if self.counts(limit)[corpus] <= number:
            return None
        return bisect_right(range(limit), number, key=lambda sample: self.counts(sample + 1)[corpus])
