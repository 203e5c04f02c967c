"""From a projection to what attention takes: heads apart, QK-norm (arXiv 2302.05442), rotary positions (2104.09864).

One function with a backward pass of its own. It keeps the projection and the reciprocal roots of the norm, and forms
the gradient of the whole projection at once, instead of one padded with zeros for every branch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_omega.model.embeddings import RotaryTable
from megatron_omega.parallel.lean import accumulation


def split_heads(projected: Tensor, gains: Tensor, rotary: RotaryTable | None, epsilon: float) -> tuple[Tensor, ...]:
    """Return every part of every branch as [b, heads, s, head_dim], branch by branch.

    projected [b, s, branches, parts, heads, head_dim]; gains [branches, normed, heads, head_dim]: the first `normed`
    parts of each branch are normalised and rotated, the others (values) stay as they are.
    """
    cosine, sine = rotary or (None, None)
    return _SplitHeads.apply(projected, gains, cosine, sine, epsilon)  # pyright: ignore[reportReturnType]


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
        context: Any, projected: Tensor, gains: Tensor, cosine: Tensor | None, sine: Tensor | None, epsilon: float
    ) -> tuple[Tensor, ...]:
        normed = gains.shape[1]
        wide = projected[:, :, :, :normed].to(accumulation(projected.dtype))
        root = wide.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        normal = (wide * root).mul_(gains)
        if cosine is not None and sine is not None:
            normal = rotate(normal, (cosine, sine))
        context.save_for_backward(projected, gains, root, cosine, sine)
        return _parts(normal.to(projected.dtype), projected[:, :, :, normed:])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        projected, gains, root, cosine, sine = context.saved_tensors
        normed, wide = gains.shape[1], accumulation(projected.dtype)
        stacked = torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2)
        d_projected = stacked.view(projected.shape)
        gradient = d_projected[:, :, :, :normed].to(wide)
        if cosine is not None:
            gradient = rotate(gradient, (cosine, sine), backward=True)
        normal = projected[:, :, :, :normed].to(wide) * root
        product = gradient * normal
        d_gains = product.sum(dim=(0, 1)).to(gains.dtype)
        mean = product.mul_(gains).mean(dim=-1, keepdim=True)
        direct = (gradient * gains).addcmul_(normal, mean, value=-1)
        d_projected[:, :, :, :normed] = direct.mul_(root)
        return d_projected, d_gains, None, None, None


def _parts(normal: Tensor, rest: Tensor) -> tuple[Tensor, ...]:
    """[b, s, branches, parts, heads, head_dim] of both -> all parts of all branches, [b, heads, s, head_dim]."""
    return tuple(
        part.transpose(1, 2)
        for branch in range(normal.shape[2])
        for parts in (normal, rest)
        for part in parts[:, :, branch].unbind(dim=2)
    )
