"""Who sees whom: positions, rotary tables and the masks of all branches, made once per pass and shared by all layers.

    branch            token i sees token j of its own text
    full, dynamic     every j
    causal            j <= i
    local             |i - j| < local_window
    axial             even heads: same i // axial_width; odd heads: same i % axial_width
    select            the best earlier blocks of axial_width tokens, chosen by each head, and j <= i of its own block

In the decoder all of them are causal. A position is the index among the tokens that are no padding, so padding may
stand on either side. Masks are bool, True where attention is allowed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_gpt_omega import GPTOmegaConfig


class Blocks(NamedTuple):
    """What the choice of the select branch is made from."""

    first: Tensor
    """[b, q, k]: is key k the first token of the block of query q?"""
    members: Tensor
    """[b, k, m]: does key k lie in block m?"""
    earlier: Tensor
    """[b, q, m]: does block m end before the block of query q begins?"""


class Sight(NamedTuple):
    """What the layers of a stack know of their tokens beside the hidden states."""

    positions: Tensor
    """[b, q]."""
    masks: dict[str, Tensor]
    """Of each pattern, [b, 1, q, k]."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines, [b, 1, q, head_dim / 2], fp32."""
    blocks: Blocks | None


def text_positions(valid: Tensor) -> Tensor:
    """[b, s] bool, False for padding -> index of each token inside its text."""
    return (valid.long().cumsum(-1) - 1).clamp(min=0)


def look(config: GPTOmegaConfig, stack: str, query_at: Tensor, key_at: Tensor, valid: Tensor) -> Sight:
    """Return what queries at `query_at` [b, q] see of keys at `key_at` [b, k], of which `valid` are no padding."""
    layers = config.encoder_layers if stack == "encoder" else config.decoder_layers
    branches = {branch for layer in range(layers) for branch in config.layer_branches(stack, layer)}
    i, j = query_at[:, None, :, None], key_at[:, None, None, :]
    seen = valid[:, None, None, :].expand(-1, -1, query_at.shape[1], -1)
    if stack == "decoder":
        seen = seen & (j <= i)
    width = config.axial_width
    masks = {"full": seen}
    if "local" in branches:
        masks["local"] = seen & ((i - j).abs() < config.local_window)
    if branches & {"axial", "select"}:
        masks["rows"] = seen & (i // width == j // width)
    if "axial" in branches:
        masks["columns"] = seen & (i % width == j % width)
    rotary = rotations(query_at, config) if config.positions == "rotary" else None
    blocks = _blocks(query_at, key_at, valid, width) if "select" in branches else None
    return Sight(query_at, masks, rotary, blocks)


def waves(positions: Tensor, count: int, base: float) -> tuple[Tensor, Tensor]:
    """[...] -> cosines and sines [..., count] in fp32."""
    exponents = torch.arange(count, device=positions.device, dtype=torch.float32) / count
    angles = positions.unsqueeze(-1).float() * base**-exponents
    return angles.cos(), angles.sin()


def rotations(positions: Tensor, config: GPTOmegaConfig) -> tuple[Tensor, Tensor]:
    cosine, sine = waves(positions, config.resolved_head_dim // 2, config.rotary_base)
    return cosine.unsqueeze(1), sine.unsqueeze(1)


def _blocks(query_at: Tensor, key_at: Tensor, valid: Tensor, width: int) -> Blocks:
    count = -(-key_at.shape[1] // width)
    numbers = torch.arange(count, device=key_at.device)
    start = (query_at // width * width).unsqueeze(-1)  # [b, q, 1]
    first = valid.unsqueeze(1) & (key_at.unsqueeze(1) == start)
    members = valid.unsqueeze(-1) & (key_at.unsqueeze(-1) // width == numbers)
    return Blocks(first, members, numbers < start // width)


@torch.no_grad()
def select_mask(sight: Sight, queries: Tensor, keys: Tensor, config: GPTOmegaConfig) -> Tensor:
    """Return the mask [b, h, q, k] of the select branch; queries and keys [b, h, k, head_dim] are those of all tokens.

    A block is routed by its first query alone: any later one would tell earlier tokens what comes behind them.
    """
    blocks, own = sight.blocks, sight.masks["rows"]
    assert blocks is not None
    firsts = blocks.first.unsqueeze(1).float() @ queries.float()  # [b, h, q, head_dim]
    means = blocks.members.transpose(1, 2).unsqueeze(1).float() @ keys.float() / config.axial_width
    earlier = blocks.earlier.unsqueeze(1)
    scores = (firsts @ means.transpose(-1, -2)).masked_fill(~earlier, float("-inf"))  # [b, h, q, m]
    best = scores.topk(min(config.select_blocks, scores.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(scores).scatter(-1, best, 1.0) * earlier
    far = chosen @ blocks.members.transpose(1, 2).unsqueeze(1).float()  # [b, h, q, k]
    return own | (far > 0)
