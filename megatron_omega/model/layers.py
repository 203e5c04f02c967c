"""The layers as their equations: encoder, decoder, the bridge's norm, the heads.

    encoder   x += a SelfMix(norm(x));  x += a FFN(norm(x))
    decoder   y += a SelfMix(norm(y));  y += a Cross(norm(y), memory);  y += a FFN(norm(y))

a = depth_base / depth (CompleteP, arXiv 2505.01618). `enter` and `leave` are the borders of the tensor-parallel
region. The memory enters it once, at the bridge: what decoder layers add to its gradient stays a partial sum on every
rank until then, which saves an all-reduce in each decoder layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_omega.config.schema import Branches
from megatron_omega.model.attention import Stream, share_document
from megatron_omega.model.attention_mix import CrossAttention, LayerCache, SelfAttention
from megatron_omega.model.context import ModelContext
from megatron_omega.model.embeddings import InputPositions
from megatron_omega.model.feed_forward import FeedForward
from megatron_omega.parallel.layers import RMSNorm
from megatron_omega.parallel.parameters import declare_parameter


def build_norm(name: str, context: ModelContext) -> RMSNorm:
    return RMSNorm(
        name, context.model.hidden_size, epsilon=context.model.norm_epsilon, parallel=context.parallel,
        seed=context.seed, norm=context.kernels.norm,
    )  # fmt: skip


def recomputed(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Call `function`, keep its arguments only, and run it again in the backward pass."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


class EncoderLayer(nn.Module):
    """x += a SelfMix(norm(x)); x += a FFN(norm(x))."""

    def __init__(
        self, name: str, context: ModelContext, branches: Branches, *, max_positions: int | None = None
    ) -> None:
        super().__init__()
        self.parallel = context.parallel
        self.kernels = context.kernels
        self.recompute = context.recompute
        self.residual = context.model.residual_multiplier
        self.positions = InputPositions(f"{name}.positions", max_positions, context) if max_positions else None
        self.attention_norm = build_norm(f"{name}.attention_norm", context)
        self.attention = SelfAttention(f"{name}.attention", branches, context, causal=False)
        self.feed_forward_norm = build_norm(f"{name}.feed_forward_norm", context)
        self.feed_forward = FeedForward(f"{name}.feed_forward", context)

    def forward(self, hidden: Tensor, segments: Tensor) -> Tensor:
        """hidden [b, s, d] ([b, s/tp, d] under sequence parallelism), segments [b, s] -> hidden."""
        if self.recompute == "full":
            return recomputed(self._layer, hidden, segments)
        return self._layer(hidden, segments)

    def _layer(self, hidden: Tensor, segments: Tensor) -> Tensor:
        parallel, a = self.parallel, self.residual
        stream = Stream(segments, self.kernels)
        if self.positions is not None:
            hidden = self.positions(hidden, stream.positions)
        hidden = hidden + a * parallel.leave(self.attention(parallel.enter(self.attention_norm(hidden)), stream))
        feed_forward = parallel.enter(self.feed_forward_norm(hidden))
        if self.recompute == "ffn":
            return hidden + a * parallel.leave(recomputed(self.feed_forward, feed_forward))
        return hidden + a * parallel.leave(self.feed_forward(feed_forward))


class DecoderLayer(nn.Module):
    """y += a SelfMix(norm(y)); y += a Cross(norm(y), memory); y += a FFN(norm(y)). Decoder-only models lack Cross."""

    def __init__(
        self, name: str, context: ModelContext, branches: Branches, *, max_positions: int | None = None
    ) -> None:
        super().__init__()
        self.parallel = context.parallel
        self.kernels = context.kernels
        self.recompute = context.recompute
        self.residual = context.model.residual_multiplier
        self.positions = InputPositions(f"{name}.positions", max_positions, context) if max_positions else None
        self.attention_norm = build_norm(f"{name}.attention_norm", context)
        self.attention = SelfAttention(f"{name}.attention", branches, context, causal=True)
        self.cross = None
        if not context.model.is_decoder_only:
            self.cross_norm = build_norm(f"{name}.cross_norm", context)
            self.cross = CrossAttention(f"{name}.cross", context)
        self.feed_forward_norm = build_norm(f"{name}.feed_forward_norm", context)
        self.feed_forward = FeedForward(f"{name}.feed_forward", context)

    def forward(self, hidden: Tensor, segments: Tensor, *memory: Tensor) -> Tensor:
        """hidden [b, s_d, d], segments [b, s_d]; `memory` is (memory [b, s_e, d], its segments [b, s_e]) or nothing."""
        if self.recompute == "full":
            return recomputed(self._layer, hidden, segments, *memory)
        return self._layer(hidden, segments, *memory)

    def _layer(self, hidden: Tensor, segments: Tensor, *memory: Tensor) -> Tensor:
        parallel, a = self.parallel, self.residual
        stream = Stream(segments, self.kernels)
        if self.positions is not None:
            hidden = self.positions(hidden, stream.positions)
        hidden = hidden + a * parallel.leave(self.attention(parallel.enter(self.attention_norm(hidden)), stream))
        if self.cross is not None:
            encoded, encoder_segments = memory
            mask = share_document(segments, encoder_segments).unsqueeze(1)
            query = parallel.enter(self.cross_norm(hidden))
            hidden = hidden + a * parallel.leave(self.cross(query, encoded, mask))
        feed_forward = parallel.enter(self.feed_forward_norm(hidden))
        if self.recompute == "ffn":
            return hidden + a * parallel.leave(recomputed(self.feed_forward, feed_forward))
        return hidden + a * parallel.leave(self.feed_forward(feed_forward))

    def extend(self, hidden: Tensor, cache: LayerCache, memory: Tensor | None) -> Tensor:
        """Run new tokens [b, t, d] of one unpacked document after those in `cache`; on one tensor-parallel rank."""
        assert self.parallel.size == 1, "text is generated from an unsharded model"
        a = self.residual
        if self.positions is not None:
            seen = cache.self_attention.length
            positions = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)
            hidden = self.positions(hidden, positions.expand(hidden.shape[:2]))
        hidden = hidden + a * self.attention.extend(self.attention_norm(hidden), cache.self_attention)
        if self.cross is not None:
            if cache.memory_keys_values is None:
                assert memory is not None
                cache.memory_keys_values = self.cross.project_memory(memory)
            hidden = hidden + a * self.cross.attend_memory(self.cross_norm(hidden), cache.memory_keys_values, None)
        return hidden + a * self.feed_forward(self.feed_forward_norm(hidden))


class EncoderNorm(nn.Module):
    """The encoder's final norm; its output, the memory, enters the tensor-parallel region here, once for all layers."""

    def __init__(self, name: str, context: ModelContext) -> None:
        super().__init__()
        self.parallel = context.parallel
        self.norm = build_norm(name, context)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s_e, d] ([b, s_e/tp, d] under sequence parallelism) -> memory [b, s_e, d]."""
        return self.parallel.enter(self.norm(hidden))


class Head(nn.Module):
    """The decoder's final norm and, for the memory, the MLM transform: dense, GELU, norm; and the MLM output bias.

    Every rank transforms the whole memory, with replicated weights; so its share of the memory's gradient is a part.
    """

    def __init__(self, name: str, context: ModelContext) -> None:
        super().__init__()
        model, self.parallel = context.model, context.parallel
        self.norm = build_norm("decoder.norm", context)
        self.has_mlm = model.has_mlm_head
        if not self.has_mlm:
            return
        whole = replace(context, parallel=replace(context.parallel, sequence_parallel=False))
        build = {"parallel": context.parallel, "seed": context.seed}
        size = model.hidden_size
        self.dense = declare_parameter(
            f"{name}.mlm.dense.weight",
            (size, size),
            std=size**-0.5,
            learning_rate_scale=model.width_multiplier,
            **build,
        )
        self.dense_bias = declare_parameter(f"{name}.mlm.dense.bias", (size,), weight_decay=False, **build)
        self.mlm_norm = build_norm(f"{name}.mlm.norm", whole)
        self.output_bias = declare_parameter(
            f"{name}.mlm.output_bias", (model.padded_vocab_size,), axis=0, weight_decay=False, **build
        )

    def forward(self, hidden: Tensor, memory: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the tied table turns into logits: (decoder hidden,) or (decoder hidden, encoder hidden, bias)."""
        decoded = self.parallel.enter(self.norm(hidden))
        if not self.has_mlm:
            return (decoded,)
        assert memory is not None
        encoded = self.parallel.copy(self.transform(self.parallel.share_gradient(memory)))
        return decoded, encoded, self.output_bias.clone()  # ZeRO-3 takes the parameter itself away after this call

    def transform(self, memory: Tensor) -> Tensor:
        """[b, s_e, d] -> [b, s_e, d]."""
        return self.mlm_norm(F.gelu(F.linear(memory, self.dense, self.dense_bias)))
