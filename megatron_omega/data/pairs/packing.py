"""Which pairs share a row. Arithmetic on lengths; sees no token.

Pairs stay whole and start at multiples of the width in both streams. They come in a keyed random order; each goes into
the open row that it fills best, so that rows are full and any row is a fair sample. The grouping is made once: epochs
take the rows in other orders, and segments keep the pairs of a row apart, so that it does not matter who shares one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_omega.data.packing import Budget

Lengths = NDArray[np.int64]
_OPEN_ROWS = 64


@dataclass(frozen=True)
class Grouping:
    """Rows of pairs: `members[bounds[r] : bounds[r + 1]]` are those of row r, in the order in which they stand."""

    members: NDArray[np.int64]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, number: int) -> NDArray[np.int64]:
        """Return the pairs of a row."""
        return self.members[self.bounds[number] : self.bounds[number + 1]]


def group_pairs(encoder: Lengths, decoder: Lengths, budget: Budget, order: NDArray[np.int64]) -> Grouping:
    """Put pairs of these lengths, none longer than its stream, into rows, best fit first, in the given order."""
    costs = np.stack([-(-lengths // budget.width) * budget.width for lengths in (encoder, decoder)], axis=1)
    exact = np.stack([encoder, decoder], axis=1)
    room = np.array([budget.encoder, budget.decoder])
    used = np.zeros((_OPEN_ROWS, 2), dtype=np.int64)
    rows: list[list[int]] = [[] for _ in range(_OPEN_ROWS)]
    done: list[list[int]] = []
    for pair in order.tolist():
        fits = np.all(used + exact[pair] <= room, axis=1)
        best = int(np.where(fits, used.sum(axis=1), -1).argmax())
        if not bool(fits[best]):
            best = int(used.sum(axis=1).argmax())
            done.append(rows[best])
            rows[best], used[best] = [], 0
        rows[best].append(pair)
        used[best] += costs[pair]
    done += filter(None, rows)
    members = np.array([pair for row in done for pair in row], dtype=np.int64)
    return Grouping(members, np.cumsum([0, *map(len, done)]))
