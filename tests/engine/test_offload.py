"""Which optimizer updates what lies on the host."""

from __future__ import annotations

import pytest

from megatron_omega.engine.engine import _is_offloaded


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
