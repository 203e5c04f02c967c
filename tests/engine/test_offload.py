"""Which optimizer updates what lies on the host."""

from __future__ import annotations

import pytest

from megatron_omega.engine.engine import _is_offloaded
from megatron_omega.engine.repairs import sum_with_fewer_copies


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 1}, False),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, True),
        ({"stage": 3, "offload_optimizer": {"device": "none"}}, False),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, True),
    ],
)
def test_offloaded_state_is_not_given_to_a_cuda_library(zero: dict[str, object], *, expected: bool) -> None:
    assert _is_offloaded({"zero_optimization": zero}) is expected


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
