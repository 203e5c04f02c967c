"""Collectives through shared memory: what they give, in what order they may be waited for, and how they end."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omega.engine.start import start_distributed
from megatron_omega.health.stragglers import BusyClock
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.parallel import slots
from megatron_omega.parallel.counting import count_messages
from megatron_omega.parallel.shared_memory import SharedMemoryGroup
from megatron_omega.parallel.topology import own_group

SIZES = (0, 1, 7, 1000, slots.SLOT // 4, slots.SLOT // 4 + 1, 3 * slots.SLOT // 4 + 5)
"""Elements of fp32: within a slot, just one, just more, and several."""
GIVE = {dist.ReduceOp.SUM: Tensor.sum, dist.ReduceOp.MAX: Tensor.amax, dist.ReduceOp.MIN: Tensor.amin}


def _group(timeout: float = 60) -> dist.ProcessGroup:
    start_distributed(local_rank=0, timeout_seconds=60)
    group = own_group([range(dist.get_world_size())], timedelta(seconds=timeout))
    return cast(dist.ProcessGroup, group)


def _values(size: int, dtype: torch.dtype, ranks: int) -> Tensor:
    """What every rank has, [ranks, size]: small whole numbers, so that sums in any order are the same."""
    return torch.randint(-9, 10, (ranks, size), generator=torch.Generator().manual_seed(size)).to(dtype)


def _collectives() -> None:
    group = _group()
    assert isinstance(group, SharedMemoryGroup)
    rank, ranks = group.rank(), group.size()
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for size in SIZES:
            values = _values(size, dtype, ranks)
            for op, give in GIVE.items():
                mine = values[rank].clone()
                dist.all_reduce(mine, op, group=group)
                torch.testing.assert_close(mine, cast(Any, give)(values, dim=0).to(dtype), rtol=0, atol=0)
            _gathers(values, group)
            _scatters(_values(size * ranks, dtype, ranks), group)


def _gathers(values: Tensor, group: dist.ProcessGroup) -> None:
    mine, parts = values[group.rank()].clone(), [torch.zeros_like(part) for part in values]
    dist.all_gather(parts, mine, group=group)
    assert torch.equal(torch.stack(parts), values)
    if len(mine):
        whole = torch.zeros_like(values)
        dist.all_gather_into_tensor(whole.view(-1), mine, group=group)
        assert torch.equal(whole, values)


def _scatters(values: Tensor, group: dist.ProcessGroup) -> None:
    """`values` [ranks, ranks * size]."""
    ranks, total = group.size(), values.sum(0).to(values.dtype)
    own = total.chunk(ranks)[group.rank()] if len(total) else total
    part = torch.zeros_like(own)
    dist.reduce_scatter(part, [*values[group.rank()].view(ranks, -1)], group=group)
    assert torch.equal(part, own)
    if len(own):
        part = torch.zeros_like(own)
        dist.reduce_scatter_tensor(part, values[group.rank()].clone(), group=group)
        assert torch.equal(part, own)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_all_get_what_the_operation_means(ranks: int) -> None:
    """With 5 ranks they share the sums, with fewer each makes all of them."""
    run_ranks(_collectives, ranks, timeout_seconds=120)


def _rounding() -> bytes:
    group = _group()
    mine = torch.randn(10_001, generator=torch.Generator().manual_seed(group.rank()))
    dist.all_reduce(mine, group=group)
    return mine.numpy().tobytes()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [3, 4])
def test_sums_have_the_same_bits_on_all_ranks_and_every_time(ranks: int) -> None:
    found = run_ranks(_rounding, ranks, timeout_seconds=120) + run_ranks(_rounding, ranks, timeout_seconds=120)
    assert len({*found}) == 1


def _orders() -> None:
    group = _group()
    long, short = torch.full((2 * slots.SLOT,), 1.0), torch.full((3,), 2.0)
    strided = torch.arange(12.0).view(3, 4).t()
    gathered = torch.zeros(group.size() * 3)
    works = [
        dist.all_reduce(long, group=group, async_op=True),
        dist.all_gather_into_tensor(gathered, short.clone(), group=group, async_op=True),
        dist.all_reduce(short, group=group, async_op=True),
        dist.all_reduce(strided, group=group, async_op=True),
    ]
    dist.broadcast(torch.zeros(1), 0, group=group)  # gloo's, in between
    dist.all_reduce(torch.zeros(5), group=group)  # not asynchronous: all before it come first
    assert all(work is not None and work.is_completed() for work in works)
    for work in reversed(works):
        cast(Any, work).wait()
    size = group.size()
    assert (long == size).all() and (short == 2 * size).all() and (gathered == 2).all()
    assert torch.equal(strided, size * torch.arange(12.0).view(3, 4).t())


@pytest.mark.distributed
def test_many_may_be_under_way_and_are_waited_for_in_any_order() -> None:
    run_ranks(_orders, 2, timeout_seconds=120)


def _transfers() -> None:
    """Each sends to the other more than it takes in meanwhile, under two tags; then whatever was asked for comes."""
    group = _group()
    rank, peer = group.rank(), 1 - group.rank()
    for turn in range(3):
        sent = [torch.full((size,), 10.0 * rank + turn) for size in (3, 300_000, 0, 70_000, 5)]
        works = [dist.isend(value, peer, group=group, tag=tag) for tag in (7, 8) for value in sent]
        found = {tag: [torch.zeros(len(value)) for value in sent] for tag in (8, 7)}
        works += [dist.irecv(value, peer, group=group, tag=tag) for tag in found for value in found[tag]]
        for value in sent:
            value.zero_()  # may be written to as soon as a message is done
        for work in reversed(works):
            cast(Any, work).wait()
        assert all((value == 10.0 * peer + turn).all() for values in found.values() for value in values)
    strided = torch.arange(12.0).view(3, 4).t()
    if rank:
        dist.send(strided, peer, group=group)
    else:
        into = torch.zeros(3, 4).t()
        dist.recv(into, peer, group=group)
        assert torch.equal(into, strided)


@pytest.mark.distributed
def test_messages_to_one_rank_come_in_order_and_their_sender_waits_for_nobody() -> None:
    run_ranks(_transfers, 2, timeout_seconds=60)


def _sizes() -> str:
    group = _group()
    if group.rank():
        dist.send(torch.ones(3), 0, group=group)
        dist.barrier()
        return ""
    with pytest.raises(RuntimeError) as caught:
        dist.recv(torch.ones(4), 1, group=group)
    dist.barrier()
    return str(caught.value)


@pytest.mark.distributed
def test_a_message_of_another_size_is_not_taken_for_the_expected_one() -> None:
    assert run_ranks(_sizes, 2, timeout_seconds=60)[0] == "rank 1 of the group sent 12 bytes where 16 were expected"


def _full() -> None:
    slots.STORE = 1 << 19
    group = _group()
    sizes = (60_000, 60_000, 60_000, 400_000, 5)
    if group.rank():
        works = [dist.isend(torch.full((size,), float(size)), 0, group=group) for size in sizes]
        dist.barrier()
        for work in works:
            cast(Any, work).wait()
    else:
        dist.barrier()
        for size in sizes:
            into = torch.zeros(size)
            dist.recv(into, 1, group=group)
            assert (into == size).all()


@pytest.mark.distributed
def test_what_the_store_has_no_room_for_goes_through_gloo_in_its_turn() -> None:
    run_ranks(_full, 2, timeout_seconds=60)


class _Counts(Counter[str]):
    def open_row(self, name: str) -> None: ...

    def count(self, name: str, operation: str) -> None:
        self[operation] += 1


def _watched() -> tuple[dict[str, int], float]:
    group, counts, clock = _group(), _Counts(), BusyClock()
    value, whole, peer = torch.ones(4), torch.ones(8), 1 - group.rank()
    restore = count_messages(counts)
    dist.all_reduce(value, group=group)
    dist.all_gather_into_tensor(whole, value, group=group)
    dist.reduce_scatter_tensor(value, whole, group=group)
    dist.broadcast(value, 0, group=group)
    dist.send(value, peer, group=group) if group.rank() else dist.recv(value, peer, group=group)
    restore()
    dist.all_reduce(value, group=group)
    clock.start()
    time.sleep(group.rank())
    dist.all_reduce(value, group=group)
    return dict(counts), clock.stop()


@pytest.mark.distributed
def test_each_message_is_counted_once_and_waiting_is_no_work() -> None:
    """The watch compares the numbers of ranks, and the search for stragglers their busy time."""
    (counts, first), (_, second) = run_ranks(_watched, 2, timeout_seconds=60)
    assert sorted(counts.values()) == [1, 1, 1, 1, 1], counts
    assert first < 0.5 < 1 <= second


def _ahead() -> tuple[float, bool, bool]:
    group = _group()
    short, long = torch.ones(4), torch.ones(slots.SLOT)
    if group.rank():
        time.sleep(1)
    began = time.monotonic()
    works = [dist.all_reduce(value, group=group, async_op=True) for value in (short, long)]
    seconds = time.monotonic() - began
    dist.barrier()
    first = dist.all_reduce(torch.ones(1), group=group, async_op=True)
    for work in (*works, first):
        cast(Any, work).wait()
    return seconds, bool((short == 2).all()), bool((long == 2).all())


@pytest.mark.distributed
def test_what_is_started_waits_for_nobody() -> None:
    (seconds, *rights), (_, *others) = run_ranks(_ahead, 2, timeout_seconds=60)
    assert seconds < 0.5, "the other rank came a second later"
    assert all(rights) and all(others)


def _failing(leave: Callable[[dist.ProcessGroup], None]) -> tuple[str, str, float]:
    group = _group(timeout=3)
    dist.all_reduce(torch.ones(3), group=group)
    if group.rank() == 1:
        leave(group)
        dist.barrier()
        return "", "", 0.0
    said, began = [], time.monotonic()
    for _ in range(2):
        try:
            dist.all_reduce(torch.ones(3), group=group)
        except RuntimeError as error:
            said.append(str(error))
    seconds = time.monotonic() - began
    dist.barrier()
    return said[0], said[1], seconds


def _shut_down(group: dist.ProcessGroup) -> None:
    group.shutdown()


def _leave_a_child(group: dist.ProcessGroup) -> None:
    """Fork a process that outlives the connections, and end them."""
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    group.shutdown()
    time.sleep(2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _stay_away(group: dist.ProcessGroup) -> None:
    time.sleep(4)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("leave", "reason", "shortest", "longest"),
    [
        (_shut_down, "connection closed by peer", 0, 2),
        (_leave_a_child, "connection closed by peer", 0, 2),
        (_stay_away, "timed out after 3 s waiting for rank 1", 2.5, 6),
    ],
)
def test_a_rank_that_is_gone_or_does_not_come_ends_the_group(
    leave: Callable[[dist.ProcessGroup], None], reason: str, shortest: float, longest: float
) -> None:
    (first, second, seconds), _ = run_ranks(_failing, 2, leave, timeout_seconds=60)
    assert reason in first
    assert "connection closed" in second, "a group that has failed does not go on"
    assert shortest <= seconds <= longest


def _apart() -> tuple[str, float]:
    start_distributed(local_rank=0, timeout_seconds=60)
    slots._host = lambda: f"host {dist.get_rank()}"
    group = cast(dist.ProcessGroup, own_group([range(dist.get_world_size())], timedelta(seconds=20)))
    value = torch.ones(1)
    dist.all_reduce(value, group=group)
    parts = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(parts, value, group=group)
    return type(group).__name__, parts[1].item()


@pytest.mark.distributed
def test_ranks_of_several_hosts_talk_through_gloo() -> None:
    assert run_ranks(_apart, 2, timeout_seconds=60) == [("ProcessGroup", 2.0)] * 2
