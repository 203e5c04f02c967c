"""Agreement between ranks about checkpoints, over connections of its own so that a background thread may use them.

Values travel as JSON, a few kilobytes at a time; tensors never do. They go up a tree and come down it together:

    16 ranks        0 1 2 3 4 5 6 7   8 9 ... 15        circles of FAMILY neighbours, as a rule one host's ranks
                    0                 8                 their first ones, and so on

so a rank has no more connections in a run of thousands than in one of eight; its first one has a few more. A rank that
died makes an exchange raise: whoever notices closes its own connections, and so everybody notices, one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import orjson
import torch
import torch.distributed as dist
from pydantic import JsonValue
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroupGloo

FAMILY = 8
"""Ranks that are connected with each other directly."""


@dataclass(frozen=True)
class Circle:
    """Ranks that are connected with each other; the first of them speaks for all in the next circle."""

    ranks: range
    """In ascending order."""

    @property
    def first(self) -> int:
        return self.ranks[0]

    @property
    def name(self) -> str:
        return f"{self.first}-{self.ranks[-1]}"


def circles_of(rank: int, size: int) -> Iterator[Circle]:
    """Yield the circles of a rank among `size`, from the lowest to the highest; those of one rank are left out.

    >>> [list(circle.ranks) for circle in circles_of(0, 20)], [list(circle.ranks) for circle in circles_of(17, 20)]
    ([[0, 1, 2, 3, 4, 5, 6, 7], [0, 8, 16]], [[16, 17, 18, 19]])
    """
    step = 1
    while step < size and rank % step == 0:
        first = rank - rank % (step * FAMILY)
        ranks = range(first, min(first + step * FAMILY, size), step)
        if len(ranks) > 1:
            yield Circle(ranks)
        step *= FAMILY


class _Connected:
    """One circle with its connections. Messages are bytes, preceded by their number."""

    def __init__(self, circle: Circle, rank: int, store: Store, timeout: timedelta) -> None:
        self._others = range(1, len(circle.ranks))
        self.is_first = circle.first == rank
        place = circle.ranks.index(rank)
        self._group: Any = ProcessGroupGloo(store, place, len(circle.ranks), timeout)

    def gather(self, message: bytes) -> list[bytes]:
        """Return the messages of all, on the first rank; send it this rank's on another."""
        if not self.is_first:
            self._send(message, [0])
            return []
        return [message, *map(self._receive, self._others)]

    def spread(self, message: bytes) -> bytes:
        """Return the first rank's message."""
        if not self.is_first:
            return self._receive(0)
        self._send(message, self._others)
        return message

    def close(self) -> None:
        self._group = None

    def _send(self, message: bytes, places: Sequence[int]) -> None:
        assert self._group is not None
        parts = torch.tensor([len(message)]), torch.frombuffer(bytearray(message), dtype=torch.uint8)
        works = [self._group.send([part], place, tag) for place in places for tag, part in enumerate(parts)]
        for work in works:
            work.wait()

    def _receive(self, place: int) -> bytes:
        size = self._take(torch.empty(1, dtype=torch.int64), place, 0)
        return self._take(torch.empty(int(size), dtype=torch.uint8), place, 1).numpy().tobytes()

    def _take(self, into: Tensor, place: int, tag: int) -> Tensor:
        assert self._group is not None
        self._group.recv([into], place, tag).wait()
        return into


class Tree:
    """The connections of one rank. Creating it is collective among `size` ranks that share `store`."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        number = store.add(f"omega/trees/{rank}", 1)  # every rank counts alike: a second tree gets names of its own
        self._circles = [
            _Connected(circle, rank, PrefixStore(f"omega/tree-{number}/{circle.name}", store), timeout)
            for circle in circles_of(rank, size)
        ]

    def gather(self, value: bytes) -> bytes:
        """Return what all ranks said, in their order and joined by commas. Collective.

        Raises RuntimeError where a rank is gone, or did not come within the timeout: now and ever after.
        """
        reason = "the connections between ranks are closed"
        if self._circles:
            try:
                return self._gather(value)
            except RuntimeError as error:
                reason = str(error)
        self._close()  # outside the handler: a traceback would keep the connections open
        raise RuntimeError(reason)

    def _gather(self, message: bytes) -> bytes:
        for circle in self._circles:
            message = b",".join(circle.gather(message))
        for circle in reversed(self._circles):
            message = circle.spread(message)
        return message

    def _close(self) -> None:
        for circle in self._circles:
            circle.close()
        self._circles.clear()


class Peers:
    """The ranks of the run. Creating it is collective where torch.distributed is initialised."""

    def __init__(self, *, timeout: timedelta) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        store = dist.distributed_c10d._get_default_store() if self.size > 1 else None
        self._tree = Tree(store, self.rank, self.size, timeout) if store is not None else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def exchange(self, value: JsonValue) -> list[JsonValue]:
        """Return the values of all ranks, in their order. Collective; raises RuntimeError where a rank is gone."""
        if self._tree is None:
            return [value]
        return orjson.loads(b"[" + self._tree.gather(orjson.dumps(value)) + b"]")

    def agree(self, value: JsonValue) -> JsonValue:
        """Return the value of the first rank. Collective."""
        return self.exchange(value if self.is_first else None)[0]
