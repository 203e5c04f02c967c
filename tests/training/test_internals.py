"""Step counters are found where each implementation of Adam keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_omega.engine.internals import adam_step, prefill_adam, set_adam_step


class CountsInGroup(torch.optim.Optimizer):
    """Adam as apex keeps it: moments for each tensor, the counter for the group."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, CountsInGroup])
def test_the_counter_goes_on_where_it_was_set(kind: Any) -> None:
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = kind([parameter])
    assert adam_step(optimizer, parameter) == 0
    state = prefill_adam(optimizer, parameter)
    assert torch.equal(state["exp_avg"], torch.zeros(3))
    set_adam_step(optimizer, parameter, 7.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert adam_step(optimizer, parameter) == 8


def test_a_prefilled_state_steps_like_an_untouched_one() -> None:
    results = []
    for prefill in (False, True):
        parameter = torch.ones(4, requires_grad=True)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        if prefill:
            prefill_adam(optimizer, parameter)
        parameter.grad = torch.arange(4.0)
        optimizer.step()
        results.append(parameter.detach().clone())
    assert torch.equal(*results)
