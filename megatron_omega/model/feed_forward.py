"""The gated feed-forward block, SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omega.model.context import ModelContext
from megatron_omega.parallel.layers import EnteringLinear, RowParallelLinear
from megatron_omega.parallel.lean import gated_linear


class FeedForward(nn.Module):
    """down(silu(gate x) * up x): gate and up are one column-parallel product, down is row-parallel."""

    def __init__(self, name: str, context: ModelContext) -> None:
        super().__init__()
        model = context.model
        build = {"parallel": context.parallel, "seed": context.seed, "scales": context.matrix_scales}
        shape = (2, model.ffn_hidden_size, model.hidden_size)
        self.gate_up = EnteringLinear(f"{name}.gate_up", shape, axis=1, **build)
        self.down = RowParallelLinear(f"{name}.down", shape[:0:-1], axis=1, **build)
        self.activation = context.kernels.gated_activation
        self.recompute = context.recompute

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s or s/tp, d] outside the tensor-parallel region -> this rank's partial sum [b, s, d]."""
        (gate_up,) = self.gate_up(hidden)
        if self.recompute == "swiglu" and self.down.adapter is None:
            return gated_linear(gate_up, self.down.weight)
        product = self.activation(gate_up)
        if self.recompute in ("ffn", "full"):
            # Torch keeps arguments before it multiplies: the recomputation, of which this is the end, stops here.
            return self.down.adapted(product, F.linear(product, self.down.weight))
        return self.down(product)
