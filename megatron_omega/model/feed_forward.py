"""The gated feed-forward block, SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_omega.model.context import ModelContext
from megatron_omega.parallel.layers import ColumnParallelLinear, LeanSwiGLU, RowParallelLinear


class FeedForward(nn.Module):
    """down(silu(gate x) * up x): gate and up are one column-parallel product, down is row-parallel."""

    def __init__(self, name: str, context: ModelContext) -> None:
        super().__init__()
        model = context.model
        build = {"parallel": context.parallel, "seed": context.seed, "lr_scale": model.width_multiplier}
        shape = (2, model.ffn_hidden_size, model.hidden_size)
        self.gate_up = ColumnParallelLinear(f"{name}.gate_up", shape, axis=1, **build)
        self.down = RowParallelLinear(f"{name}.down", shape[:0:-1], axis=1, **build)
        self.activation = LeanSwiGLU.apply if context.recompute == "swiglu" else context.kernels.gated_activation

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, d] inside the tensor-parallel region -> this rank's partial sum [b, s, d]."""
        return self.down(self.activation(self.gate_up(hidden)))
