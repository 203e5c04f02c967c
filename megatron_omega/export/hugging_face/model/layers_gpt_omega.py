"""The layers of GPT-Omega for Transformers. Every matrix is a plain `nn.Linear`.

    encoder   x += a SelfMix(norm(x));  x += a FFN(norm(x))
    decoder   y += a SelfMix(norm(y));  y += a Cross(norm(y), memory);  y += a FFN(norm(y))

SelfMix attends in several patterns at once: one projection gives q, k and v of all branches, another one takes the
heads of all of them back. q and k are normalised for each head (QK-norm, arXiv 2302.05442).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_gpt_omega import GPTOmegaConfig
from .sight_gpt_omega import Sight, select_mask, waves

HAS_SINK = ("local", "axial")


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalise the last axis, in fp32."""
    wide = hidden.float()
    return (wide * wide.square().mean(-1, keepdim=True).add(epsilon).rsqrt() * weight.float()).to(hidden.dtype)


def rotate(heads: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate the pairs (k, k + head_dim / 2) of [b, h, s, head_dim] by the angles of every token."""
    if rotary is None:
        return heads
    cosine, sine = rotary
    first, second = heads.float().chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(heads.dtype)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attend [b, h, q, head_dim], spelled out -> [b, q, h, head_dim] and the weights."""
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by the implementation that was chosen: [b, h, q, head_dim] -> [b, q, h, head_dim]."""
    config: Any = module.config
    function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
    scaling = config.resolved_head_dim**-0.5
    return function(module, query, key, value, mask, scaling=scaling, dropout=0.0, is_causal=False)[0]


class GPTOmegaRMSNorm(nn.Module):
    """Root-mean-square norm over the features."""

    def __init__(self, config: GPTOmegaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.epsilon = config.norm_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.epsilon)


class GPTOmegaInputPositions(nn.Module):
    """Positions that the first layer of a stack adds to the embeddings: learned or sinusoidal."""

    def __init__(self, config: GPTOmegaConfig, longest: int) -> None:
        super().__init__()
        self.size = config.hidden_size
        self.weight = None
        if config.positions == "learned":
            self.weight = nn.Parameter(torch.empty(longest, self.size))

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """[b, s] -> [b, s, d]."""
        if self.weight is not None:
            return F.embedding(positions, self.weight)
        cosine, sine = waves(positions, self.size // 2, 10_000.0)
        return torch.cat((sine, cosine), -1).to(dtype)


class GPTOmegaSelfAttention(nn.Module):
    """All self-attention branches of one layer."""

    def __init__(self, config: GPTOmegaConfig, branches: tuple[str, ...], layer_idx: int) -> None:
        super().__init__()
        self.config, self.branches, self.layer_idx = config, branches, layer_idx
        self.heads, self.head_dim = config.num_attention_heads, config.resolved_head_dim
        self.with_sinks = tuple(branch for branch in branches if config.attention_sinks and branch in HAS_SINK)
        inner = len(branches) * self.heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.hidden_size, bias=False)
        self.qk_gains = nn.Parameter(torch.ones(len(branches), 2, self.heads, self.head_dim))
        if self.with_sinks:
            self.sinks = nn.Parameter(torch.zeros(len(self.with_sinks), self.heads, self.head_dim))
        if "dynamic" in branches:
            self.dynamic = nn.Linear(config.hidden_size, 2 * self.heads)

    def forward(self, hidden: Tensor, sight: Sight, cache: Cache | None = None) -> Tensor:
        """[b, s, d] -> [b, s, d]; with a cache the keys are those of all tokens so far."""
        query, key, value = self._project(hidden, sight)
        key, value = self._remember(query, key, value, cache)
        attended = []
        for index, branch in enumerate(self.branches):
            of_branch = slice(index * self.heads, (index + 1) * self.heads)
            parts = query[:, of_branch], key[:, of_branch], value[:, of_branch]
            if branch == "dynamic":
                temperature, gate = (2 * self.dynamic(hidden).sigmoid()).unflatten(-1, (2, -1, 1)).unbind(2)
                found = self._attend(branch, parts[0] * temperature.transpose(1, 2), *parts[1:], key, sight)
                attended.append(found * gate)
            else:
                attended.append(self._attend(branch, *parts, key, sight))
        return self.out(torch.stack(attended, 2).flatten(2))

    def _project(self, hidden: Tensor, sight: Sight) -> list[Tensor]:
        """Return normed and rotated q and k, and v, of all branches: each [b, branches * heads, s, head_dim]."""
        qkv = self.qkv(hidden).unflatten(-1, (len(self.branches), 3, self.heads, self.head_dim))
        normal = rms_norm(qkv[:, :, :, :2], self.qk_gains, self.config.norm_epsilon)
        parts = normal[:, :, :, 0], normal[:, :, :, 1], qkv[:, :, :, 2]
        query, key, value = (part.flatten(2, 3).transpose(1, 2) for part in parts)
        return [rotate(query, sight.rotary), rotate(key, sight.rotary), value]

    def _remember(self, query: Tensor, key: Tensor, value: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all tokens; behind the keys stand the queries by which blocks are chosen."""
        if "select" in self.branches:
            first = self.branches.index("select") * self.heads
            routing = query[:, first : first + self.heads]
            key, value = torch.cat((key, routing), 1), torch.cat((value, routing), 1)  # a cache wants equal shapes
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        return (key, value) if cache is None else cache.update(key, value, self.layer_idx)

    def _attend(self, branch: str, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, sight: Sight) -> Tensor:
        """Attend by one branch, [b, h, q, head_dim] -> [b, q, h, head_dim]."""
        masks = sight.masks
        if branch == "select":
            routing = keys[:, len(self.branches) * self.heads :]
            return attend(self, query, key, value, select_mask(sight, routing, key, self.config))
        if branch == "local":
            return self._attend_with_sink(branch, query, key, value, masks["local"], slice(None))
        if branch == "axial":
            found = torch.empty_like(query.transpose(1, 2))
            for parity, pattern in ((0, "rows"), (1, "columns")):
                at = slice(parity, None, 2)
                parts = query[:, at], key[:, at], value[:, at]
                if parts[0].shape[1]:
                    found[:, :, at] = self._attend_with_sink(branch, *parts, masks[pattern], at)
            return found
        return attend(self, query, key, value, masks["full"])

    def _attend_with_sink(
        self, branch: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, at: slice
    ) -> Tensor:
        """Attend with a learned key and a value of zero behind all others, where the model has such keys."""
        if self.with_sinks:
            sink = self.sinks[self.with_sinks.index(branch)][at].unsqueeze(1).to(key.dtype)  # [h, 1, head_dim]
            key = torch.cat((key, sink.expand(len(key), -1, -1, -1)), 2)
            value, mask = F.pad(value, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=True)
        return attend(self, query, key, value, mask)


class GPTOmegaCrossAttention(nn.Module):
    """Decoder tokens attend the encoder's output."""

    def __init__(self, config: GPTOmegaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.head_dim = config.num_attention_heads, config.resolved_head_dim
        inner = self.heads * self.head_dim
        self.q = nn.Linear(config.hidden_size, inner, bias=False)
        self.kv = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.out = nn.Linear(inner, config.hidden_size, bias=False)
        self.qk_gains = nn.Parameter(torch.ones(2, self.heads, self.head_dim))

    def forward(self, hidden: Tensor, memory: Tensor | None, mask: Tensor | None, cache: Cache | None = None) -> Tensor:
        """hidden [b, s_d, d], memory [b, s_e, d], mask [b, 1, 1, s_e] -> [b, s_d, d]."""
        query = self._normal(self.q(hidden).unflatten(-1, (self.heads, self.head_dim)), 0)
        key, value = self._keys_values(memory, cache)
        mask = None if mask is None else mask.expand(-1, -1, hidden.shape[1], -1)
        return self.out(attend(self, query, key, value, mask).flatten(2))

    def _keys_values(self, memory: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        if not isinstance(cache, EncoderDecoderCache):
            return self._project(memory)
        if not cache.is_updated.get(self.layer_idx):
            cache.cross_attention_cache.update(*self._project(memory), self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
        return layer.keys, layer.values

    def _project(self, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        assert memory is not None, "there is neither a memory nor a cache that holds its keys"
        kv = self.kv(memory).unflatten(-1, (2, self.heads, self.head_dim))
        return self._normal(kv[:, :, 0], 1), kv[:, :, 1].transpose(1, 2)

    def _normal(self, heads: Tensor, which: int) -> Tensor:
        return rms_norm(heads, self.qk_gains[which], self.config.norm_epsilon).transpose(1, 2)


class GPTOmegaFeedForward(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: GPTOmegaConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class GPTOmegaLayer(GradientCheckpointingLayer):
    """One layer of the encoder or, with cross-attention if there is an encoder, of the decoder."""

    def __init__(self, config: GPTOmegaConfig, stack: str, layer_idx: int) -> None:
        super().__init__()
        is_encoder = stack == "encoder"
        self.residual = config.residual_multiplier(config.encoder_layers if is_encoder else config.decoder_layers)
        self.positions = None
        if layer_idx == 0 and config.positions != "rotary":
            longest = config.max_encoder_length if is_encoder else config.max_decoder_length
            self.positions = GPTOmegaInputPositions(config, longest)
        self.attention_norm = GPTOmegaRMSNorm(config)
        self.attention = GPTOmegaSelfAttention(config, config.layer_branches(stack, layer_idx), layer_idx)
        self.cross = None
        if not is_encoder and config.is_encoder_decoder:
            self.cross_norm = GPTOmegaRMSNorm(config)
            self.cross = GPTOmegaCrossAttention(config, layer_idx)
        self.feed_forward_norm = GPTOmegaRMSNorm(config)
        self.feed_forward = GPTOmegaFeedForward(config)

    def forward(
        self,
        hidden: Tensor,
        sight: Sight,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """hidden [b, s, d], memory [b, s_e, d] -> hidden."""
        a = self.residual
        if self.positions is not None:
            hidden = hidden + self.positions(sight.positions, hidden.dtype)
        hidden = hidden + a * self.attention(self.attention_norm(hidden), sight, past_key_values)
        if self.cross is not None:
            hidden = hidden + a * self.cross(self.cross_norm(hidden), memory, memory_mask, past_key_values)
        return hidden + a * self.feed_forward(self.feed_forward_norm(hidden))


class GPTOmegaMaskedHead(nn.Module):
    """Memory -> hidden states that the tied table turns into logits of masked tokens."""

    def __init__(self, config: GPTOmegaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = GPTOmegaRMSNorm(config)
        self.output_bias = nn.Parameter(torch.zeros(config.padded_vocab_size))

    def forward(self, memory: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(memory)))
