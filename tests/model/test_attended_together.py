"""Branches that see whole documents, attended in one call: equal to the last bit to one call for each of them."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from test_documents import Calls, stream_of
from torch import Tensor

from megatron_omega.config.schema import ENCODER_BRANCHES, Branches, ModelConfig
from megatron_omega.model.attention_mix import SelfAttention, attended_together
from megatron_omega.model.context import ModelContext
from megatron_omega.model.heads import alone

ORDERS: list[Branches] = [
    *permutations(ENCODER_BRANCHES),
    ("dynamic", "full"),
    ("local", "dynamic"),
    ("full",),
    ("dynamic",),
]
ROWS = [[16, 8], [24]]


def mix_of(branches: Branches, *, heads: int = 3, causal: bool = False) -> SelfAttention:
    model = ModelConfig(
        hidden_size=24, ffn_hidden_size=32, num_attention_heads=heads, head_dim=8, local_window=16, axial_width=8
    )
    mix = SelfAttention("mix", branches, ModelContext(model), causal=causal)
    if "dynamic" in branches:
        torch.nn.init.normal_(mix.dynamic.weight)
        torch.nn.init.normal_(mix.dynamic.bias)
    return mix


def both_passes(mix: SelfAttention, hidden: Tensor, rows: list[list[int]]) -> tuple[list[Tensor], int]:
    """Return the result, all gradients, and how many calls of the fused kernel the forward pass made."""
    stream = stream_of(rows)
    given = hidden[: len(rows), : stream.segments.shape[1]].clone().requires_grad_()
    mix.zero_grad()
    with Calls() as calls:
        found = mix(given, mix.facts(stream, given.dtype))
    found.square().sum().backward()
    gradients = [parameter.grad for parameter in mix.parameters()]
    return [found.detach(), *(part for part in (given.grad, *gradients) if part is not None)], len(calls.queries)


@pytest.mark.parametrize("branches", ORDERS, ids="-".join)
def test_one_call_equals_one_for_each_branch_to_the_last_bit(branches: Branches) -> None:
    mix = mix_of(branches)
    for rows in (ROWS, [[24]], [[24], [24]]):
        hidden = torch.randn(2, 64, 24)
        mix.groups = attended_together(branches)
        together, _ = both_passes(mix, hidden, rows)
        mix.groups = alone(range(len(branches)))
        apart, _ = both_passes(mix, hidden, rows)
        assert len(together) == len(apart) == 2 + len(list(mix.parameters()))
        assert all(torch.equal(left, right) for left, right in zip(together, apart, strict=True))


def test_documents_are_one_call_each_for_two_branches() -> None:
    mix, hidden = mix_of(("full", "dynamic")), torch.randn(2, 64, 24)
    _, together = both_passes(mix, hidden, ROWS)
    mix.groups = alone(range(2))
    _, apart = both_passes(mix, hidden, ROWS)
    assert apart == 2 * together


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_a_causal_branch_goes_with_a_dynamic_one(heads: int) -> None:
    branches: Branches = ("causal", "local", "dynamic")
    mix, hidden = mix_of(branches, heads=heads, causal=True), torch.randn(2, 64, 24)
    assert mix.groups == (range(0, 3, 2), range(1, 2))
    together, _ = both_passes(mix, hidden, ROWS)
    mix.groups = alone(range(3))
    apart, _ = both_passes(mix, hidden, ROWS)
    assert all(torch.equal(left, right) for left, right in zip(together, apart, strict=True))
