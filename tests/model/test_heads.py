"""Splitting a projection into heads, with QK-norm and rotary positions, against the same spelled out in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_omega.model.embeddings import RotaryTable, rotary_table
from megatron_omega.model.heads import Temperature, alone, split_heads

EPSILON = 1e-3


def spelled_out(projected: Tensor, gains: Tensor, positions: Tensor | None) -> list[Tensor]:
    """Pairs (j, j + head_dim / 2) as complex numbers, turned by position * base ** (-2 j / head_dim)."""
    parts = []
    for branch in range(projected.shape[2]):
        for part in range(projected.shape[3]):
            values = projected[:, :, branch, part]
            if part < gains.shape[1]:
                values = values / (values.square().mean(-1, keepdim=True) + EPSILON).sqrt() * gains[branch, part]
                if positions is not None:
                    half = values.shape[-1] // 2
                    angles = positions[:, :, None, None] * 100.0 ** (-torch.arange(half, dtype=torch.double) / half)
                    turned = torch.complex(*values.split(half, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
                    values = torch.cat((turned.real, turned.imag), dim=-1)
            parts.append(values.transpose(1, 2))
    return parts


def table(positions: Tensor, size: int) -> RotaryTable:
    cosine, sine = rotary_table(positions, size, 100.0)
    return cosine.double(), sine.double()


@pytest.mark.parametrize(("branches", "parts", "normed"), [(1, 3, 2), (3, 3, 2), (1, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("is_rotary", [True, False])
def test_heads_and_gradients_are_those_of_autograd(branches: int, parts: int, normed: int, *, is_rotary: bool) -> None:
    projected = torch.randn(2, 5, branches, parts, 3, 8, dtype=torch.double, requires_grad=True)
    gains = torch.randn(branches, normed, 3, 8, dtype=torch.double, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]) if is_rotary else None
    rotary = None if positions is None else table(positions, 8)
    found = [part.squeeze(1) for part in split_heads(projected, gains, rotary, EPSILON)]
    expected = spelled_out(projected, gains, positions)
    weights = [torch.randn_like(part) for part in expected]
    gradients = [torch.autograd.grad(heads, (projected, gains), weights) for heads in (found, expected)]
    for left, right in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
        assert torch.allclose(left, right, atol=1e-6)  # the table is made in fp32
    assert torch.autograd.gradcheck(lambda left, right: split_heads(left, right, rotary, EPSILON), (projected, gains))


def test_the_projection_and_the_roots_are_all_that_is_kept() -> None:
    sizes: list[int] = []
    projected = torch.randn(1, 6, 2, 3, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    gains = torch.nn.Parameter(torch.ones(2, 2, 3, 8, dtype=torch.bfloat16))
    rotary = rotary_table(torch.arange(6).unsqueeze(0), 8, 100.0)

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        parts = split_heads(projected, gains, rotary, EPSILON)
    assert len(parts) == 6 and all(part.shape == (1, 1, 3, 6, 8) for part in parts)
    assert sizes == [projected.numel(), gains.numel(), 6 * 2 * 2 * 3, 6 * 8, 6 * 8]


@pytest.mark.parametrize("is_rotary", [True, False])
@pytest.mark.parametrize("order", [[0, 3, 1, 2], [1, 2, 0, 3]])
def test_branches_together_with_a_temperature_are_views_with_the_gradients_of_autograd(
    order: list[int], *, is_rotary: bool
) -> None:
    pair = order[:2]
    groups = (range(pair[0], pair[1] + 1, pair[1] - pair[0]), *alone(order[2:]))
    projected = torch.randn(2, 5, 4, 3, 3, 8, dtype=torch.double, requires_grad=True)
    gains = torch.randn(4, 2, 3, 8, dtype=torch.double, requires_grad=True)
    factor = torch.rand(2, 5, 3, 1, dtype=torch.double, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]) if is_rotary else None
    rotary = None if positions is None else table(positions, 8)
    temperature = Temperature(pair[1], factor)

    parts = split_heads(projected, gains, rotary, EPSILON, groups=groups, temperature=temperature)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 2, "one for q and k, and the projection for v"
    found = [heads for part in parts for heads in part.unbind(1)]
    expected = spelled_out(projected, gains, positions)
    expected[3 * pair[1]] = expected[3 * pair[1]] * factor.transpose(1, 2)
    expected = [expected[3 * branch + part] for group in groups for part in range(3) for branch in group]
    weights = [torch.randn_like(part) for part in expected]
    leaves = (projected, gains, factor)
    gradients = [torch.autograd.grad(heads, leaves, weights) for heads in (found, expected)]
    for left, right in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
        assert torch.allclose(left, right, atol=1e-6)
