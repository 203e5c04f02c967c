"""Layers that are split over tensor-parallel ranks. They compute; entering and leaving the region is the caller's act.

    column-parallel: Y_r = X W_r^T         W = [W_0; W_1; ...] split by rows: every rank computes its own features
    row-parallel:    Y = sum_r X_r W_r^T   W = [W_0, W_1, ...] split by columns: `leave` adds the partial results

Weights keep their canonical shape (for example [branches, 3, heads, head_dim, d]) so that a checkpoint needs no
knowledge of how the features of a layer are laid out; they are flattened to a matrix where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omega.parallel.parameters import declare_parameter
from megatron_omega.parallel.tensor_parallel import TensorParallel

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""From (hidden, weight, epsilon) to the normalised hidden states."""


class ColumnParallelLinear(nn.Module):
    """Y_r = X W_r^T, without bias. `shape` is the global weight shape; its last axis is the input."""

    def __init__(
        self, name: str, shape: tuple[int, ...], *, axis: int, parallel: TensorParallel, seed: int, lr_scale: float
    ) -> None:
        super().__init__()
        self.weight = declare_parameter(
            f"{name}.weight", shape, axis=axis, std=shape[-1] ** -0.5, parallel=parallel, seed=seed,
            learning_rate_scale=lr_scale,
        )  # fmt: skip

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, in] inside the region -> [b, s, out / tp]."""
        return F.linear(hidden, self.weight.flatten(0, -2))


class RowParallelLinear(nn.Module):
    """sum_r X_r W_r^T, without bias. `shape` is the global weight shape; its first axis is the output."""

    def __init__(
        self, name: str, shape: tuple[int, ...], *, axis: int, parallel: TensorParallel, seed: int, lr_scale: float
    ) -> None:
        super().__init__()
        self.weight = declare_parameter(
            f"{name}.weight", shape, axis=axis, std=math.prod(shape[1:]) ** -0.5, parallel=parallel, seed=seed,
            learning_rate_scale=lr_scale,
        )  # fmt: skip

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, in / tp] -> this rank's partial sum [b, s, out]; the caller leaves the region."""
        return F.linear(hidden, self.weight.flatten(1))


class TokenTable(nn.Module):
    """The token embeddings, split by rows of the vocabulary; input, bridge and both heads share it.

    Holds the tied weight and nothing else: the pipeline engine synchronises exactly that.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, parallel: TensorParallel, seed: int) -> None:
        super().__init__()
        self.parallel = parallel
        self.start, self.stop = parallel.shard(vocab_size)
        self.scale = math.sqrt(hidden_size)  # rows are drawn at 1/sqrt(d); the stream starts at unit variance
        self.weight = declare_parameter(
            "token_table.weight", (vocab_size, hidden_size), axis=0, std=hidden_size**-0.5, parallel=parallel, seed=seed
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids [b, s] -> [b, s, d] ([b, s/tp, d] under sequence parallelism): each rank looks up its own rows."""
        if self.parallel.size == 1:
            return F.embedding(ids, self.weight) * self.scale
        foreign = (ids < self.start) | (ids >= self.stop)
        rows = F.embedding((ids - self.start).masked_fill(foreign, 0), self.weight)
        return self.parallel.leave(rows.masked_fill(foreign.unsqueeze(-1), 0.0)) * self.scale


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalise the last axis of `hidden`; `weight` broadcasts against it."""
    if weight.dim() == 1 and hidden.dtype == weight.dtype:
        return F.rms_norm(hidden, weight.shape, weight, epsilon)
    normal = F.rms_norm(hidden.float(), hidden.shape[-1:], None, epsilon)
    return (normal * weight.float()).to(hidden.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the features (arXiv 1910.07467), computed in fp32.

    Under sequence parallelism each rank normalises its own tokens, so the weight's gradient is summed over the ranks.
    `norm` is the implementation.
    """

    def __init__(
        self, name: str, size: int, *, epsilon: float, parallel: TensorParallel, seed: int, norm: Norm = rms_norm
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.norm = norm
        self.parallel = parallel
        self.weight = declare_parameter(
            f"{name}.weight", (size,), fill=1.0, parallel=parallel, seed=seed, weight_decay=False
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        weight = self.parallel.copy(self.weight) if self.parallel.sequence_parallel else self.weight
        return self.norm(hidden, weight, self.epsilon)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202) of [..., 2f] -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class LeanSwiGLU(torch.autograd.Function):
    """`swiglu` that keeps gate and up only and computes the activation again in the backward pass."""

    @staticmethod
    def forward(context: Any, gate_up: Tensor) -> Tensor:
        context.save_for_backward(gate_up)
        return swiglu(gate_up)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = context.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        activated = gate * sigmoid
        d_gate = gradient * up * (sigmoid + activated * (1 - sigmoid))
        return torch.cat((d_gate, gradient * activated), dim=-1)
