from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_omega.health.stragglers import BusyClock
from megatron_omega.host.environment import free_port
from megatron_omega.parallel.counting import COLLECTIVES, count_messages


class Counts(Counter[str]):
    """A ledger of numbers alone."""

    def open_row(self, name: str) -> None:
        self[name] += 0

    def count(self, name: str, operation: str) -> None:
        self[name] += 1
        self[operation] += 1


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_every_message_is_counted_under_the_name_of_its_group() -> None:
    before = vars(ProcessGroup)["allreduce"]
    group: Any = dist.new_group([0])
    tensor, counts = torch.ones(1), Counts()
    restore = count_messages(counts)
    try:
        assert len(counts) == 2, "both groups have a row before their first message"
        dist.all_reduce(tensor)
        clock = BusyClock(lambda: None)
        clock.start()
        dist.all_reduce(tensor, group=group)
        assert clock.stop() > 0, "a clock around a message that is counted leaves the count where it was"
        clock.close()
        dist.all_gather_into_tensor(torch.empty(1), tensor, group=group)
        dist.barrier(group=group)
        assert counts["allreduce"] == 2 and counts["barrier"] == 1
        assert counts[dist.group.WORLD.group_name] == 1 and counts[group.group_name] == 3  # pyright: ignore
    finally:
        restore()
    assert vars(ProcessGroup)["allreduce"] is before
    assert tensor.item() == 1.0


def test_the_messages_of_this_torch_are_known() -> None:
    assert {"allreduce", "broadcast", "allgather", "barrier"} <= set(COLLECTIVES)
