"""One flipped bit in one copy of a weight is found, and the rank that holds it named, under every engine."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from synthetic import replica_batches, small_config, start_engine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_omega.config.layout import Layout
from megatron_omega.engine.internals import engine_holdings
from megatron_omega.health.checksums import checksum, row_checksums, total_checksum
from megatron_omega.health.weights import Copy, Integrity, describe_difference, differing, odd_ones
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.parameters import declared_parameters
from megatron_omega.parallel.places import Places, gather_places


def flip(tensor: Tensor, bit: int = 0) -> None:
    """Flip one bit of the first element, in place."""
    words = tensor.detach().reshape(-1)[:1].view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    words ^= 1 << bit


@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 15), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_flipped_bit_changes_the_checksum(count: int, start: int, bit: int, dtype: torch.dtype) -> None:
    values = torch.arange(64).to(dtype)
    part = values[start : start + count]
    before = int(checksum(part))
    assert int(checksum(part.clone())) == before, "it depends on where in memory the weights lie"
    for index in {0, count // 2, count - 1}:
        flip(part[index:], bit)
        assert int(checksum(part)) != before
        flip(part[index:], bit)


@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]), st.data()
)
def test_a_row_of_a_buffer_sums_like_its_copy_and_every_flip_is_seen(
    elements: int, owners: int, start: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    buffer = torch.randn(start + owners * elements, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows = buffer[start:].view(owners, elements)
    before = row_checksums(rows)
    copies = [row_checksums(row.clone().view(1, -1))[0] for row in rows]
    assert before.tolist() == [int(copy) for copy in copies]
    owner, place = data.draw(st.integers(0, owners - 1)), data.draw(st.integers(0, elements - 1))
    flip(rows[owner, place:], data.draw(st.integers(0, 15)))
    assert (row_checksums(rows) != before).tolist() == [index == owner for index in range(owners)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.data())
def test_many_tensors_have_one_checksum_that_every_flip_changes(sizes: list[int], data: st.DataObject) -> None:
    masters = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in sizes]
    weights = [master.to(torch.bfloat16) for master in masters]
    with patch("megatron_omega.health.checksums._BUCKET_BYTES", 8 * 12):
        before = total_checksum(weights)
        assert before is not None and torch.equal(before, total_checksum(masters, torch.bfloat16) or torch.zeros(()))
        flip(data.draw(st.sampled_from(weights)), data.draw(st.integers(0, 15)))
        assert total_checksum(weights) != before
    assert total_checksum([]) is None


class _Kernels(TorchDispatchMode):
    """Counts what would be a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = ("view", "slice", "alias", "detach", "select", "expand", "narrow", "_unsafe_view")
        self.count += not any(func.__name__.startswith(name) for name in views)
        return func(*args, **(kwargs or {}))


def test_a_thousand_small_tensors_take_a_few_kernels() -> None:
    gains = [torch.ones(20) for _ in range(1000)]
    with _Kernels() as kernels:
        total_checksum(gains)
        row_checksums(torch.ones(64, 1000))
    assert kernels.count <= 8, kernels.count


def test_the_minority_is_wrong() -> None:
    a, b, c = Copy(0), Copy(1), Copy(0, is_master=True)
    assert odd_ones({a: 1, b: 1, c: 1}) == []
    assert odd_ones({a: 1, b: 2, c: 1}) == [b]
    assert odd_ones({a: 2, b: 1, c: 1}) == [a]
    assert odd_ones({a: 1, b: 2}) == [a, b]


def test_who_is_named() -> None:
    layout = Layout(pipeline=2, data=2, tensor=2)
    rows = [[1, 2, 1 + (rank // 2) % 2, 7] for rank in range(8)]  # owners' parts 1 and 2, own master, alike
    assert differing(torch.tensor(rows), layout, has_masters=True, is_sharded=False) == []
    rows[6][0] = 9  # pp 1, dp 1, tp 0: its copy of the other's part
    assert differing(torch.tensor(rows), layout, has_masters=True, is_sharded=False) == [Copy(6)]
    rows[6] = [1, 2, 2, 8]  # no replica says otherwise, but the other three of its stage hold 7
    assert differing(torch.tensor(rows), layout, has_masters=True, is_sharded=False) == [Copy(6)]
    places = Places(layout, [f"n{rank // 4}" for rank in range(8)])
    assert "the working weights of rank 6 (pp 1, dp 1, tp 0) on n1 differ" in describe_difference([Copy(6)], places)


def test_the_minority_of_replicas_without_masters_is_named() -> None:
    rows = [[5, 0, 0] for _ in range(4)]  # ZeRO-0: one sum of all weights, no master
    assert differing(torch.tensor(rows), Layout(data=4), has_masters=False, is_sharded=False) == []
    rows[2][0] = 6
    assert differing(torch.tensor(rows), Layout(data=4), has_masters=False, is_sharded=False) == [Copy(2)]
    tensor = [[rank, 0, 7 + (rank == 3)] for rank in range(4)]
    assert differing(torch.tensor(tensor), Layout(tensor=4), has_masters=False, is_sharded=False) == [Copy(3)]


def by_looking_at_every_copy(
    rows: list[list[int]], layout: Layout, *, has_masters: bool, is_sharded: bool
) -> list[Copy]:
    """The definition of `differing`."""
    found: list[Copy] = []
    owners = len(rows[0]) - 2
    for ranks in layout.groups("data"):
        for owner, owning_rank in enumerate(ranks[:owners]):
            copies = {Copy(rank): rows[rank][owner] for rank in ([owning_rank] if is_sharded else ranks)}
            if has_masters:
                copies[Copy(owning_rank, is_master=True)] = rows[owning_rank][-2]
            found += odd_ones(copies)
    if found or layout.tensor == 1:
        return list(dict.fromkeys(found))
    for ranks in layout.groups("tensor") if is_sharded else layout.groups("data", "tensor"):
        found += odd_ones({Copy(rank): rows[rank][-1] for rank in ranks})
    return found


@given(st.data())
def test_looking_at_suspicious_copies_alone_finds_the_same(data: st.DataObject) -> None:
    layout = Layout(*(data.draw(st.integers(1, 3)) for _ in range(3)))
    has_masters, is_sharded = data.draw(st.sampled_from([(True, False), (True, True), (False, False)]))
    owners = layout.data if has_masters else 1
    rows = [
        [
            *(100 * layout.coordinate(rank).pipeline + 10 * layout.coordinate(rank).tensor + n for n in range(owners)),
            100 * layout.coordinate(rank).pipeline + 10 * layout.coordinate(rank).tensor + layout.coordinate(rank).data,
            7,
        ]
        for rank in range(layout.world_size)
    ]
    for _ in range(data.draw(st.integers(0, 3))):
        rows[data.draw(st.integers(0, layout.world_size - 1))][data.draw(st.integers(0, owners + 1))] += 1000
    kinds = {"has_masters": has_masters, "is_sharded": is_sharded}
    found = differing(torch.tensor(rows), layout, **kinds)
    assert set(found) == set(by_looking_at_every_copy(rows, layout, **kinds))


CASES = [
    {"world": 2, "zero": 0, "named": (0, 1)},  # two copies, no master: nothing tells
    {"world": 2, "zero": 1, "named": (1,)},
    {"world": 2, "zero": 1, "what": "own", "named": (1,)},
    {"world": 2, "zero": 1, "what": "master", "named": (1,)},
    {"world": 2, "zero": 2, "dtype": "bf16", "named": (1,)},
    {"world": 2, "zero": 3, "named": (1,)},
    {"world": 2, "zero": 1, "tensor": 2, "named": (1,)},
    {"world": 2, "zero": 0, "tensor": 2, "named": (0, 1)},
]  # fmt: skip


def find_flips(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case: what is found before a flip, in a step of which a bit of rank 1 flips, and after two more steps."""
    found = []
    for case in cases:
        config = small_config(
            parallel={"tensor_parallel_size": case.get("tensor", 1)},
            precision={"dtype": case.get("dtype", "fp32")},
            batch={"micro_batch_size": 2, "global_batch_size": 4},
        )
        engine = start_engine(config, case["zero"])
        layout = engine.topology.layout
        guard = Integrity(
            engine.deepspeed,
            engine.topology,
            gather_places(layout, Peers(timeout=timedelta(minutes=1))),
            interval_steps=1,
        )
        batches = replica_batches(config, engine)
        for _ in range(2):
            engine.train_step(batches, learning_rate=1e-2)
        before = guard.find_fault()
        if dist.get_rank() == 1:
            flip_one(engine, case.get("what", "other"))
        for _ in range(3):
            engine.train_step(batches, learning_rate=1e-2)
        fault = guard.find_fault()
        found.append({"before": before, "ranks": fault.ranks if fault else None, "message": fault and fault.message})
    return found


def flip_one(engine: Any, what: str) -> None:
    holdings = engine_holdings(engine.deepspeed)
    if what == "master":
        flip(holdings[0].part(holdings[0].flat), bit=20)
    elif what == "own" or engine.deepspeed.zero_optimization_stage() == 3:
        flip(holdings[0].working())
    else:  # of a parameter that tensor-parallel ranks hold alike, owned by the first replica where there are two
        is_partitioned = engine.topology.data.size > 1 and engine.deepspeed.zero_optimization_stage() > 0
        owned = {mine.info.name for mine in holdings} if is_partitioned else set()
        flip(next(p for info, p in declared_parameters(engine.module) if info.axis is None and info.name not in owned))


@pytest.mark.distributed
def test_a_flipped_bit_is_found_and_its_rank_named() -> None:
    ranks = run_ranks(find_flips, 2, CASES, timeout_seconds=240)
    for position, case in enumerate(CASES):
        for found in (rank[position] for rank in ranks):
            assert found["before"] is None, (case, found)
            assert found["ranks"] == case["named"], (case, found)
