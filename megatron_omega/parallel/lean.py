"""Functions whose backward pass is written out: they keep what it needs and no more, in few kernels.

Autograd by itself keeps every intermediate result, and views of weights: under ZeRO-3 such a view keeps the gathered
weight alive until the backward pass. Here parameters are kept as they are, so that the engine can take their memory
back. Reductions are in fp32 (or better). Each function is tested against autograd in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megatron_omega.parallel.products import product


def linear(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
    """X W^T: [..., in], a weight of any shape that is a matrix [rows, in] when flattened -> [..., rows]."""
    return _Linear.apply(hidden, weight, rows)  # pyright: ignore[reportReturnType]


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalise the last axis (arXiv 1910.07467). Keeps the input and the reciprocal roots."""
    return _RMSNorm.apply(hidden, weight, epsilon)  # pyright: ignore[reportReturnType]


def add_and_norm(hidden: Tensor, update: Tensor, scale: float, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return hidden + scale * update, and its norm. Keeps the sum and the reciprocal roots."""
    return _AddAndNorm.apply(hidden, update, scale, weight, epsilon)  # pyright: ignore[reportReturnType]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202) of [..., 2f] -> [..., f]. Keeps gate and up."""
    return _SwiGLU.apply(gate_up)  # pyright: ignore[reportReturnType]


def gated_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """`linear(swiglu(gate_up), weight)`, weight [rows, f]. Keeps gate and up, and computes their product again."""
    return _GatedLinear.apply(gate_up, weight)  # pyright: ignore[reportReturnType]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the format in which sums over values of `dtype` are formed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Linear(Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
        context.rows = rows
        context.save_for_backward(hidden if weight.requires_grad else None, weight)
        return product(hidden, weight.reshape(rows, -1))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight = context.saved_tensors
        d_hidden = d_weight = None
        if context.needs_input_grad[0]:
            d_hidden = product(gradient, weight.reshape(context.rows, -1).t())
        if context.needs_input_grad[1]:
            d_weight = product(gradient.flatten(0, -2).t(), hidden.flatten(0, -2).t()).view(weight.shape)
        return d_hidden, d_weight, None


def _normalise(hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of `hidden` and the reciprocal roots [..., 1]."""
    wide = hidden.to(accumulation(hidden.dtype))
    root = wide.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
    return (wide * root).mul_(weight).to(hidden.dtype), root


def _norm_gradients(
    gradient: Tensor, hidden: Tensor, weight: Tensor, root: Tensor, passing: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weight; `passing` is added to the first."""
    wide = accumulation(hidden.dtype)
    normal, gradient = hidden.to(wide) * root, gradient.to(wide)
    product = gradient * normal
    d_weight = product.flatten(0, -2).sum(dim=0) if weight.dim() == 1 else product.sum_to_size(weight.shape)
    mean = product.mul_(weight).mean(dim=-1, keepdim=True)
    direct = (gradient * weight).addcmul_(normal, mean, value=-1)
    d_hidden = direct.mul_(root) if passing is None else torch.addcmul(passing.to(wide), direct, root)
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype)


class _RMSNorm(Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normal, root = _normalise(hidden, weight, epsilon)
        context.save_for_backward(hidden, weight, root)
        return normal

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, root = context.saved_tensors
        return *_norm_gradients(gradient, hidden, weight, root), None


class _AddAndNorm(Function):
    @staticmethod
    def forward(
        context: Any, hidden: Tensor, update: Tensor, scale: float, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        total = torch.add(hidden, update, alpha=scale)
        normal, root = _normalise(total, weight, epsilon)
        context.scale = scale
        context.save_for_backward(total, weight, root)
        return total, normal

    @staticmethod
    def backward(context: Any, passing: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, None, Tensor, None]:
        total, weight, root = context.saved_tensors
        d_total, d_weight = _norm_gradients(gradient, total, weight, root, passing)
        return d_total, d_total * context.scale, None, d_weight, None


class _SwiGLU(Function):
    @staticmethod
    def forward(context: Any, gate_up: Tensor) -> Tensor:
        context.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = context.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        return _gate_up_gradient(gradient, gate, up)


class _GatedLinear(Function):
    @staticmethod
    def forward(context: Any, gate_up: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, dim=-1)
        return product(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate_up, weight = context.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        d_gate_up = d_weight = None
        if context.needs_input_grad[1]:
            d_weight = product(gradient.flatten(0, -2).t(), (activated * up).flatten(0, -2).t())
        if context.needs_input_grad[0]:
            d_gate_up = _gate_up_gradient(product(gradient, weight.t()), gate, up, activated)
        return d_gate_up, d_weight


def _gate_up_gradient(gradient: Tensor, gate: Tensor, up: Tensor, activated: Tensor | None = None) -> Tensor:
    """Return the gradient of gate and up from that of silu(gate) * up; `activated` is silu(gate), if it is known."""
    if torch.compiler.is_compiling():  # fuses what follows by itself, and writes to no view
        known = F.silu(gate) if activated is None else activated
        return torch.cat((torch.ops.aten.silu_backward(gradient * up, gate), known * gradient), dim=-1)
    found = gradient.new_empty(*gate.shape[:-1], gate.shape[-1] + up.shape[-1])
    d_gate, d_up = found.chunk(2, dim=-1)  # written where they belong: to join them would copy both
    torch.mul(gradient, up, out=d_gate)
    torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    if activated is None:
        torch.ops.aten.silu.out(gate, out=d_up).mul_(gradient)
    else:
        torch.mul(activated, gradient, out=d_up)
    return found
