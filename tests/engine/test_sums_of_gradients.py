"""Sums of gradients that copy no more than they have to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from megatron_omega.engine.repairs import sum_nothing_over_one_replica, sum_with_fewer_copies


@pytest.mark.parametrize(
    ("zero", "changed"),
    [
        ({"stage": 1}, True),
        ({"stage": 1, "reduce_scatter": True, "reduce_bucket_size": 7}, False),
        ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, False),
        ({"stage": 2}, False),
    ],
)
def test_fewer_copies_are_for_plain_zero_1_and_leave_what_the_json_says(
    zero: dict[str, object], *, changed: bool
) -> None:
    values = {"zero_optimization": zero}
    found = sum_with_fewer_copies(values, is_cpu=True)["zero_optimization"]
    assert (found != zero) is changed and zero.items() <= found.items()


@pytest.mark.parametrize(
    ("replicas", "dtype", "summed"),
    [(1, torch.float32, False), (2, torch.float32, True), (1, torch.bfloat16, True)],
    ids=["one replica", "two replicas", "another format on the wire"],
)
def test_gradients_of_an_only_replica_are_left_alone(replicas: int, dtype: torch.dtype, *, summed: bool) -> None:
    asked: list[Any] = []
    engine = SimpleNamespace(
        allreduce_and_copy=lambda *arguments: asked.append(arguments), communication_data_type=torch.float32
    )
    sum_nothing_over_one_replica(engine)
    gradients = [torch.ones(3, dtype=dtype)]
    engine.allreduce_and_copy(gradients, None, replicas)
    assert asked == ([(gradients, None, replicas)] if summed else [])


def test_deepspeed_still_sums_by_the_method_that_is_replaced() -> None:
    assert "allreduce_and_copy" in DeepSpeedEngine.allreduce_no_retain.__code__.co_names
