"""Values of many ranks reach all of them over a tree; a rank that is gone is noticed everywhere. Ranks are threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from megatron_omega.parallel.exchange import FAMILY, Tree, circles_of


def in_threads(size: int, act: Callable[[int], object]) -> list[object]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(act, range(size)))


def trees(size: int) -> list[Tree]:
    store = HashStore()
    return in_threads(size, lambda rank: Tree(store, rank, size, timedelta(seconds=20)))  # pyright: ignore[reportReturnType]


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@given(st.integers(2, 1500))
@settings(max_examples=25)
def test_the_circles_are_a_tree(size: int) -> None:
    heads = [[circle for circle in circles_of(rank, size) if circle.first != rank] for rank in range(size)]
    assert [rank for rank, above in enumerate(heads) if not above] == [0], "everybody but the first has one above it"
    assert all(len(above) <= 1 for above in heads)
    circles = {circle.name: circle for rank in range(size) for circle in circles_of(rank, size)}
    assert sum(len(circle.ranks) - 1 for circle in circles.values()) == size - 1, "each is heard once"
    assert max(len(circle.ranks) for circle in circles.values()) <= FAMILY


@pytest.mark.parametrize("size", [2, 9, 20])
def test_every_rank_hears_all_in_order(size: int) -> None:
    ranks = trees(size)
    for turn in range(2):
        said = [f'"{rank} {turn}{"." * rank * 1000}"'.encode() for rank in range(size)]
        heard = in_threads(size, lambda rank: ranks[rank].gather(said[rank]))  # noqa: B023 - the pool has ended
        assert set(heard) == {b",".join(said)}


def test_connections_of_a_rank_do_not_grow_with_the_run() -> None:
    taken = {}
    for size in (16, 32):
        before = open_descriptors()
        ranks = trees(size)
        in_threads(size, lambda rank, ranks=ranks: ranks[rank].gather(b"0"))
        taken[size] = (open_descriptors() - before) / size
        del ranks
    assert taken[32] < 1.2 * taken[16], taken


def test_a_rank_that_is_gone_is_noticed_by_all_and_stays_so() -> None:
    ranks = trees(20)
    in_threads(20, lambda rank: ranks[rank].gather(b"0"))
    began = time.monotonic()
    noticed = threading.Semaphore(0)

    def act(rank: int) -> None:
        if rank == 13:  # in the middle of the tree's second circle, not its first rank
            ranks[rank]._close()  # as its end would
            return
        for _ in range(2):
            with pytest.raises(RuntimeError):
                ranks[rank].gather(b"0")
        noticed.release()

    in_threads(20, act)
    assert sum(noticed.acquire(blocking=False) for _ in range(20)) == 19
    assert time.monotonic() - began < 15, "somebody waited for the timeout"
