"""Work dealt to ranks: each does its share, all get the whole. Knows no model and no connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Job = TypeVar("Job")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Share:
    """This rank among those that hold the same model, and how values come together."""

    rank: int = 0
    size: int = 1
    exchange: Callable[[Any], list[Any]] = _alone
    """From a rank's value (of JSON) to those of all ranks."""

    def collect(self, jobs: Sequence[Job], work: Callable[[Sequence[Job]], list[Any]]) -> list[Any]:
        """Return what `work` makes of every job, in their order; this rank does each `size`-th of them.

        A job's result may not depend on the other jobs: then the number of ranks changes nothing.
        """
        found: list[Any] = [None] * len(jobs)
        for rank, part in enumerate(self.exchange(work(jobs[self.rank :: self.size]))):
            found[rank :: self.size] = part
        return found


ALONE = Share()
