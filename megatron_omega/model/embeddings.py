"""Positions: rotary, sinusoidal, learned. A position is the index of a token inside its document."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omega.model.context import ModelContext
from megatron_omega.model.parametrization import position_scales
from megatron_omega.parallel.parameters import declare_parameter

RotaryTable = tuple[Tensor, Tensor]
"""Of every token, each [b, s, head_dim] in fp32: (cosine, cosine) and (-sine, sine) of its position."""


def rotary_table(positions: Tensor, head_dim: int, base: float) -> RotaryTable:
    """Return the table of `positions` [b, s]."""
    cosine, sine = _waves(positions, head_dim // 2, base)
    return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)


def sinusoids(positions: Tensor, size: int) -> Tensor:
    """Sinusoidal encoding (arXiv 1706.03762): positions [b, s] -> [b, s, size]."""
    cosine, sine = _waves(positions, size // 2, 10_000.0)
    return torch.cat((sine, cosine), dim=-1)


def _waves(positions: Tensor, count: int, base: float) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(count, device=positions.device, dtype=torch.float32) / count
    angles = positions.unsqueeze(-1).float() * base**-exponents
    return angles.cos(), angles.sin()


class InputPositions(nn.Module):
    """Positions that are added to the embeddings, by the first layer of a stack (sinusoidal and learned)."""

    def __init__(self, name: str, max_positions: int, context: ModelContext) -> None:
        super().__init__()
        self.parallel = context.parallel
        self.size = context.model.hidden_size
        self.table = None
        if context.model.positions == "learned":
            self.table = declare_parameter(
                f"{name}.weight", (max_positions, self.size), std=1.0, parallel=context.parallel, seed=context.seed,
                scales=position_scales(context.model),
            )  # fmt: skip

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Add to [b, s, d] ([b, s/tp, d] under sequence parallelism); positions [b, s] are those of all tokens."""
        if self.parallel.sequence_parallel:
            start, stop = self.parallel.shard(positions.shape[1])
            positions = positions[:, start:stop]
        if self.table is None:
            return hidden + sinusoids(positions, self.size).to(hidden.dtype)
        table = self.parallel.copy(self.table) if self.parallel.sequence_parallel else self.table
        return hidden + F.embedding(positions, table)
