"""Layers that are split over tensor-parallel ranks. Column-parallel ones enter the region; leaving it is the caller's.

    column-parallel: Y_r = X W_r^T         W = [W_0; W_1; ...] split by rows: every rank computes its own features
    row-parallel:    Y = sum_r X_r W_r^T   W = [W_0, W_1, ...] split by columns: `leave` adds the partial results

Weights keep their canonical shape (for example [branches, 3, heads, head_dim, d]) so that a checkpoint needs no
knowledge of how the features of a layer are laid out; they are flattened to a matrix where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omega.parallel.entering import enter_products
from megatron_omega.parallel.lean import add_and_norm, linear, rms_norm
from megatron_omega.parallel.parameters import UNSCALED, Scales, declare_parameter
from megatron_omega.parallel.tensor_parallel import TensorParallel

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""From (hidden, weight, epsilon) to the normalised hidden states."""


class ColumnParallelLinear(nn.Module):
    """Y_r = X W_r^T, without bias, of what is inside the region.

    `shape` is the global weight shape; its last axis is the input. Axes in front of `axis`, which is split, tell
    matrices apart that are computed together (branches; q, k, v).
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], *, axis: int, parallel: TensorParallel, seed: int, scales: Scales
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.adapter: nn.Module | None = None
        self.weight = declare_parameter(
            f"{name}.weight", shape, axis=axis, std=shape[-1] ** -0.5, parallel=parallel, seed=seed,
            scales=scales, rows=(*range(axis, len(shape) - 1),), columns=(len(shape) - 1,),
        )  # fmt: skip

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, in] inside the region -> [b, s, out / tp]."""
        return self._adapted(hidden, linear(hidden, self.weight, self.weight.shape[:-1].numel()))

    def _adapted(self, hidden: Tensor, product: Tensor) -> Tensor:
        """Add what a low-rank adapter makes of the same input, if there is one."""
        return product if self.adapter is None else product + self.adapter(hidden)


class EnteringLinear(ColumnParallelLinear):
    """A column-parallel layer whose input comes from outside the region."""

    def forward(self, hidden: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[b, s or s/tp, in] outside the region -> [b, s, out / tp], and as much for each weight `beside` this one."""
        if self.parallel.size > 1:
            first, *others = enter_products(hidden, self.parallel, self.weight, *beside)
        else:
            weights = (self.weight, *beside)
            first, *others = (linear(hidden, weight, weight.shape[:-1].numel()) for weight in weights)
        return self._adapted(hidden, first), *others


class RowParallelLinear(nn.Module):
    """sum_r X_r W_r^T, without bias. `shape` is the global weight shape; its first axis is the output.

    Axes between it and `axis`, which is split, tell matrices apart that are computed together (branches).
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], *, axis: int, parallel: TensorParallel, seed: int, scales: Scales
    ) -> None:
        super().__init__()
        self.adapter: nn.Module | None = None
        self.weight = declare_parameter(
            f"{name}.weight", shape, axis=axis, std=math.prod(shape[1:]) ** -0.5, parallel=parallel, seed=seed,
            scales=scales, rows=(0,), columns=(*range(axis, len(shape)),),
        )  # fmt: skip

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, in / tp] -> this rank's partial sum [b, s, out]; the caller leaves the region."""
        return self.adapted(hidden, linear(hidden, self.weight, self.weight.shape[0]))

    def adapted(self, hidden: Tensor, product: Tensor) -> Tensor:
        """Add what a low-rank adapter makes of the same input, if there is one."""
        return product if self.adapter is None else product + self.adapter(hidden)


class TokenTable(nn.Module):
    """The token embeddings, split by rows of the vocabulary; input, bridge and both heads share it.

    Holds the tied weight and nothing else: the pipeline engine synchronises exactly that.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, *, parallel: TensorParallel, seed: int, scales: Scales = UNSCALED
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.start, self.stop = parallel.shard(vocab_size)
        self.scale = math.sqrt(hidden_size)  # rows are drawn at 1/sqrt(d); the stream starts at unit variance
        self.weight = declare_parameter(
            "token_table.weight", (vocab_size, hidden_size), axis=0, std=hidden_size**-0.5, parallel=parallel,
            seed=seed, scales=scales,
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids [b, s] -> [b, s, d] ([b, s/tp, d] under sequence parallelism): each rank looks up its own rows."""
        if self.parallel.size == 1:
            return F.embedding(ids, self.weight) * self.scale
        foreign = (ids < self.start) | (ids >= self.stop)
        rows = F.embedding((ids - self.start).masked_fill(foreign, 0), self.weight)
        return self.parallel.leave(rows.masked_fill(foreign.unsqueeze(-1), 0.0)) * self.scale


class RMSNorm(nn.Module):
    """Root-mean-square norm over the features (arXiv 1910.07467), computed in fp32.

    Under sequence parallelism each rank normalises its own tokens, so the weight's gradient is summed over the ranks.
    `norm` is the implementation.
    """

    def __init__(
        self, name: str, size: int, *, epsilon: float, parallel: TensorParallel, seed: int, scales: Scales,
        norm: Norm = rms_norm,
    ) -> None:  # fmt: skip
        super().__init__()
        self.epsilon = epsilon
        self.norm = norm
        self.parallel = parallel
        self.weight = declare_parameter(
            f"{name}.weight", (size,), fill=1.0, parallel=parallel, seed=seed, scales=scales
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return self.norm(hidden, self._weight(), self.epsilon)

    def after_adding(self, hidden: Tensor, update: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return hidden + scale * update, and its norm."""
        if self.norm is rms_norm:
            return add_and_norm(hidden, update, scale, self._weight(), self.epsilon)
        total = torch.add(hidden, update, alpha=scale)
        return total, self(total)

    def _weight(self) -> Tensor:
        return self.parallel.copy(self.weight) if self.parallel.sequence_parallel else self.weight
