"""A rank that is slow in most steps is named, once; noise is not."""

from __future__ import annotations

import random
import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, ProcessGroup, Work  # pyright: ignore[reportPrivateImportUsage]

from megatron_omega.config.layout import Layout
from megatron_omega.health.stragglers import BusyClock, Stragglers, StragglerWatch, factors
from megatron_omega.parallel.places import Places

GRID = Layout(pipeline=2, data=2, tensor=2)


def test_factors_compare_peers_of_one_stage() -> None:
    busy = [1.0, 1.0, 1.5, 1.0, 4.0, 4.0, 4.0, 8.0]
    assert factors(busy, GRID) == [(2, 1.5), (7, 2.0)]
    assert factors([1.0, 2.0], Layout(pipeline=2)) == []


@settings(max_examples=30)
@given(st.integers(0, 7), st.floats(1.15, 5.0), st.integers(0, 2**32))
def test_a_slow_rank_is_named_once(slow: int, factor: float, seed: int) -> None:
    noise, judge, named = random.Random(seed), Stragglers(GRID, 20), []
    for _ in range(60):
        busy = [noise.uniform(0.98, 1.02) for _ in range(8)]
        busy[slow] *= factor
        named += judge.observe(busy)
    assert [rank for rank, _ in named] == [slow]
    assert named[0][1] == pytest.approx(factor, rel=0.05)


@settings(max_examples=30, derandomize=True)  # a rare chance stays a chance: the same ones each time
@given(st.integers(0, 2**32), st.floats(0, 3))
def test_noise_is_no_straggler(seed: int, spread: float) -> None:
    noise, judge = random.Random(seed), Stragglers(GRID, 20)
    assert not any(judge.observe([1 + noise.random() * spread for _ in range(8)]) for _ in range(100))


def test_a_rank_that_recovered_is_named_again() -> None:
    judge, named = Stragglers(Layout(data=4), 20), []
    for step in range(100):
        is_slow = step < 30 or step >= 70
        named += judge.observe([1.0 + 0.01 * ((step + rank) % 4) + (rank == 3 and is_slow) for rank in range(4)])
    assert [rank for rank, _ in named] == [3, 3]


def test_a_rank_that_is_always_a_little_slower_is_not_named() -> None:
    judge = Stragglers(Layout(data=2), 20)
    assert not any(judge.observe([1.0, 1.05]) for _ in range(100))


@pytest.fixture
def one_rank() -> Any:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20))
    yield
    dist.destroy_process_group()


def test_every_wait_of_this_thread_goes_through_the_clock(one_rank: None) -> None:
    clock, before, ticks = BusyClock(), vars(Work)["wait"], []
    clock._time = lambda wait: (ticks.append(threading.get_ident()), wait())[1]  # pyright: ignore
    clock.start()
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    dist.all_reduce(tensor, async_op=True).wait()  # pyright: ignore[reportOptionalMemberAccess]
    other = threading.Thread(target=lambda: dist.all_reduce(tensor))
    other.start()
    other.join()
    assert clock.stop() >= 0 and vars(Work)["wait"] is before
    dist.all_reduce(tensor)
    assert len(ticks) == 2
    clock.close()


def test_a_device_is_let_finish_before_messages_and_after_waits(one_rank: None) -> None:
    story: list[str] = []
    clock = BusyClock(lambda: story.append("finish"))
    issue = vars(ProcessGroup)["allreduce"]
    clock.start()
    story.clear()
    work = dist.all_reduce(torch.ones(2), async_op=True)
    assert story == ["finish"] and work is not None
    work.wait()
    assert story == ["finish", "finish"]
    clock.close()
    dist.all_reduce(torch.ones(2))
    assert vars(ProcessGroup)["allreduce"] is issue


def test_the_watch_names_host_place_and_factor(one_rank: None) -> None:
    told: list[Any] = []
    watch = StragglerWatch(Layout(), Places(Layout(), ["here"]), window=20, tell=told.append)
    watch._stragglers.observe = lambda busy: [(0, 1.5)]  # type: ignore[method-assign]
    report: Any = type("Report", (), {"step": 7})()
    watch.on_step_end(report)
    assert not told, "no step was measured"
    watch.on_step_begin(7)
    watch.on_step_end(report)
    watch.on_close()
    (fault,) = told
    assert fault.ranks == (0,) and fault.details["factor"] == 1.5
    assert "rank 0 (pp 0, dp 0, tp 0) on here is a straggler: busy 1.50 times as long" in fault.message
