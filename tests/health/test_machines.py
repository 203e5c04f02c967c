"""Slow hosts are named, and no others; links are slow on both sides of the host that is the cause."""

from __future__ import annotations

from itertools import accumulate, cycle
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.health import machines
from megatron_omega.health.machines import Seconds, measure, slow_hosts


@given(st.integers(5, 12), st.integers(1, 4), st.sampled_from(["product", "copy", "ring"]), st.randoms())
@settings(max_examples=40)
def test_the_slow_host_is_named_whatever_is_slow(nodes: int, each: int, kind: str, chance: Random) -> None:
    hosts = [f"n{rank // each}" for rank in range(nodes * each)]
    everyone = [Seconds(*(1 + chance.random() / 20 for _ in range(3))) for _ in hosts]
    assert slow_hosts(everyone, hosts, 1.5) == {}
    slow = chance.randrange(nodes)
    if kind == "ring":
        for rank in (slow * each, (slow + 1) * each % len(hosts)):  # what comes in, and what goes out
            everyone[rank] = everyone[rank]._replace(ring=3.0)
    else:
        rank = slow * each + chance.randrange(each)
        everyone[rank] = everyone[rank]._replace(**{kind: 3.0})
    assert list(slow_hosts(everyone, hosts, 1.5)) == [f"n{slow}"]


def test_one_slow_link_blames_nobody() -> None:
    everyone = [Seconds(1.0, 1.0, 3.0 if rank == 2 else 1.0) for rank in range(4)]
    assert slow_hosts(everyone, ["n1", "n2", "n3", "n4"], 1.5) == {}


def test_a_rank_measures_itself() -> None:
    assert min(measure(torch.device("cpu"))[:2]) > 0


def test_a_device_that_rests_now_and_then_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a quota: most products are as fast as ever, and then nothing is done for a while."""
    clock = iter(accumulate(cycle([0.0, 1e-3, 0.0, 1e-3, 0.0, 1e-3, 0.0, 7e-3])))
    monkeypatch.setattr(machines.time, "perf_counter", lambda: next(clock))
    rests = machines._sustained(lambda: None, torch.device("cpu"))
    assert machines._fastest(lambda: None, torch.device("cpu")) < 1.1e-3 < 2e-3 < rests


@pytest.mark.parametrize("hosts", [["n1"], ["n1", "n2"]])
def test_few_hosts_have_no_majority_of_links(hosts: list[str]) -> None:
    assert slow_hosts([Seconds(1.0, 1.0, 5.0)] * len(hosts), hosts, 1.5) == {}
