"""From a projection to what attention takes: heads apart, QK-norm (arXiv 2302.05442), rotary positions (2104.09864).

One function with a backward pass of its own. It keeps the projection and the reciprocal roots of the norm, and forms
the gradient of the whole projection at once, instead of one padded with zeros for every branch. A dynamic branch's
temperature (2411.12892) is part of it, so that its queries lie beside those of the branch that it is attended with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_omega.model.embeddings import RotaryTable
from megatron_omega.parallel.lean import accumulation


class Temperature(NamedTuple):
    """A factor of every token and head on the queries of one branch."""

    branch: int
    factor: Tensor
    """[b, s, heads, 1]."""


def split_heads(
    projected: Tensor,
    gains: Tensor,
    rotary: RotaryTable | None,
    epsilon: float,
    *,
    groups: Sequence[range] | None = None,
    temperature: Temperature | None = None,
) -> tuple[Tensor, ...]:
    """Return every part of every group of branches as [b, branches, heads, s, head_dim], group by group.

    projected [b, s, branches, parts, heads, head_dim]; gains [branches, normed, heads, head_dim]: the first `normed`
    parts of each branch are normalised and rotated, the others (values) stay as they are. A group is a range of
    branches, so that it is a view; if none are given, every branch is one.
    """
    groups = alone(range(projected.shape[2])) if groups is None else tuple(groups)
    cosine, sine = rotary or (None, None)
    scaled, factor = temperature or (0, None)
    return _SplitHeads.apply(projected, gains, cosine, sine, factor, (groups, scaled, epsilon))  # pyright: ignore[reportReturnType]


def alone(branches: Iterable[int]) -> tuple[range, ...]:
    """Return a group for each of `branches`."""
    return tuple(range(branch, branch + 1) for branch in branches)


def rotate(normal: Tensor, rotary: RotaryTable, *, backward: bool = False) -> Tensor:
    """Rotate the last axis of [b, s, branches, parts, heads, head_dim] by every token's angles, or back."""
    shape = (*rotary[0].shape[:2], 1, 1, 1, -1)
    cosine, sine = (table.view(shape) for table in rotary)
    first, second = normal.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return (normal * cosine).addcmul_(swapped, sine, value=-1.0 if backward else 1.0)


class _SplitHeads(Function):
    @staticmethod
    def forward(
        context: Any,
        projected: Tensor,
        gains: Tensor,
        cosine: Tensor | None,
        sine: Tensor | None,
        factor: Tensor | None,
        settings: tuple[tuple[range, ...], int, float],
    ) -> tuple[Tensor, ...]:
        (groups, scaled, epsilon), normed = settings, gains.shape[1]
        wide = projected[:, :, :, :normed].to(accumulation(projected.dtype))
        root = wide.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        normal = (wide * root).mul_(gains)
        if cosine is not None and sine is not None:
            normal = rotate(normal, (cosine, sine))
        if factor is not None:
            normal[:, :, scaled, 0].mul_(factor)
        context.groups, context.scaled = groups, scaled
        context.save_for_backward(projected, gains, root, cosine, sine, factor)
        return _parts((normal.to(projected.dtype), projected[:, :, :, normed:]), groups)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        projected, gains, root, cosine, sine, factor = context.saved_tensors
        normed, wide = gains.shape[1], accumulation(projected.dtype)
        d_projected = _joined(gradients, context.groups, projected.shape)
        gradient = d_projected[:, :, :, :normed].to(wide)
        if cosine is not None:
            gradient = rotate(gradient, (cosine, sine), backward=True)
        normal = projected[:, :, :, :normed].to(wide) * root
        d_factor = None
        if factor is not None:
            mine, scaled = gradient[:, :, context.scaled, 0], context.scaled
            d_factor = (mine * normal[:, :, scaled, 0]).mul_(gains[scaled, 0]).sum(dim=-1, keepdim=True)
            d_factor = d_factor.to(factor.dtype)
            mine.mul_(factor)
        product = gradient * normal
        d_gains = product.sum(dim=(0, 1)).to(gains.dtype)
        mean = product.mul_(gains).mean(dim=-1, keepdim=True)
        direct = (gradient * gains).addcmul_(normal, mean, value=-1)
        d_projected[:, :, :, :normed] = direct.mul_(root)
        return d_projected, d_gains, None, None, d_factor, None


def _parts(wholes: tuple[Tensor, Tensor], groups: Sequence[range]) -> tuple[Tensor, ...]:
    """[b, s, branches, parts, heads, head_dim] of both -> every part of every group, [b, branches, heads, s, ...]."""
    return tuple(
        part.permute(0, 2, 3, 1, 4)
        for group in groups
        for whole in wholes
        for part in whole[:, :, group.start : group.stop : group.step].unbind(dim=3)
    )


def _joined(gradients: Sequence[Tensor], groups: Sequence[range], shape: torch.Size) -> Tensor:
    """Return a new tensor [b, s, branches, parts, heads, head_dim] of what `_parts` took apart."""
    branches, parts = shape[2:4]
    ordered: list[Tensor] = [gradients[0]] * (branches * parts)
    for number, gradient in enumerate(gradients):
        group, part = groups[number // parts], number % parts
        for branch, mine in zip(group, gradient.unbind(dim=1), strict=True):  # each [b, heads, s, head_dim]
            ordered[branch * parts + part] = mine.transpose(1, 2)
    return torch.stack(ordered, dim=2).view(shape)
