"""The layers as their equations: encoder, decoder, the bridge's norm, the heads.

    encoder   x += a SelfMix(norm(x));  x += a FFN(norm(x))
    decoder   y += a SelfMix(norm(y));  y += a Cross(norm(y), memory);  y += a FFN(norm(y))

a = depth_base / layers of the stack (CompleteP, arXiv 2505.01618). Products that take in the residual
stream enter the tensor-parallel region, `leave` is its other border. The memory enters it once, at the bridge: what
decoder layers add to its gradient stays a partial sum on every rank until then, which saves an all-reduce in each
decoder layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from megatron_omega.config.schema import Branches
from megatron_omega.model.attention import BranchFacts
from megatron_omega.model.attention_mix import CrossAttention, LayerCache, MixFacts, SelfAttention
from megatron_omega.model.context import ModelContext
from megatron_omega.model.embeddings import InputPositions
from megatron_omega.model.feed_forward import FeedForward
from megatron_omega.model.stream import Continued, Stream, positions
from megatron_omega.parallel.layers import RMSNorm
from megatron_omega.parallel.parameters import declare_parameter


def build_norm(name: str, context: ModelContext) -> RMSNorm:
    return RMSNorm(
        name, context.model.hidden_size, epsilon=context.model.norm_epsilon, parallel=context.parallel,
        seed=context.seed, scales=context.vector_scales, norm=context.kernels.norm,
    )  # fmt: skip


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call `function`, keep its arguments (nested tuples of tensors) only, and run it again in the backward pass."""
    leaves, structure = tree_flatten(arguments)

    def call(*leaves: Any) -> Tensor:
        return function(*tree_unflatten(leaves, structure))

    return checkpoint(call, *leaves, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


class LayerFacts(NamedTuple):
    """What a layer takes of its stream: tensors alone, made once per micro-batch and stage."""

    mix: MixFacts
    positions: Tensor | None
    """Of the first layer of a stack, where positions are added to the embeddings."""
    cross: BranchFacts | None = None


class EncoderLayer(nn.Module):
    """x += a SelfMix(norm(x)); x += a FFN(norm(x))."""

    def __init__(
        self, name: str, context: ModelContext, branches: Branches, *, max_positions: int | None = None
    ) -> None:
        super().__init__()
        context = context.in_stack(context.model.encoder_layers)
        self.parallel = context.parallel
        self.kernels = context.kernels
        self.recompute = context.recompute
        self.residual = context.residual
        self.positions = InputPositions(f"{name}.positions", max_positions, context) if max_positions else None
        self.attention_norm = build_norm(f"{name}.attention_norm", context)
        self.attention = SelfAttention(f"{name}.attention", branches, context, causal=False)
        self.feed_forward_norm = build_norm(f"{name}.feed_forward_norm", context)
        self.feed_forward = FeedForward(f"{name}.feed_forward", context)

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        """hidden [b, s, d] ([b, s/tp, d] under sequence parallelism) of the documents of `stream` -> hidden."""
        facts = self._facts(stream, hidden.dtype)
        if self.recompute == "full":
            return recomputed(self.compute, hidden, facts)
        return self.compute(hidden, facts)

    def _facts(self, stream: Stream, dtype: torch.dtype) -> LayerFacts:
        return LayerFacts(
            self.attention.facts(stream, dtype), None if self.positions is None else stream.once(positions)
        )

    def compute(self, hidden: Tensor, facts: LayerFacts) -> Tensor:
        parallel, a = self.parallel, self.residual
        if self.positions is not None and facts.positions is not None:
            hidden = self.positions(hidden, facts.positions)
        update = parallel.leave(self.attention(self.attention_norm(hidden), facts.mix))
        hidden, normal = self.feed_forward_norm.after_adding(hidden, update, a)
        update = recomputed(self.feed_forward, normal) if self.recompute == "ffn" else self.feed_forward(normal)
        return torch.add(hidden, parallel.leave(update), alpha=a)


class DecoderLayer(nn.Module):
    """y += a SelfMix(norm(y)); y += a Cross(norm(y), memory); y += a FFN(norm(y)). Decoder-only models lack Cross."""

    def __init__(
        self, name: str, context: ModelContext, branches: Branches, *, max_positions: int | None = None
    ) -> None:
        super().__init__()
        context = context.in_stack(context.model.decoder_layers)
        self.parallel = context.parallel
        self.kernels = context.kernels
        self.recompute = context.recompute
        self.residual = context.residual
        self.positions = InputPositions(f"{name}.positions", max_positions, context) if max_positions else None
        self.attention_norm = build_norm(f"{name}.attention_norm", context)
        self.attention = SelfAttention(f"{name}.attention", branches, context, causal=True)
        self.cross = None
        if not context.model.is_decoder_only:
            self.cross_norm = build_norm(f"{name}.cross_norm", context)
            self.cross = CrossAttention(f"{name}.cross", context)
        self.feed_forward_norm = build_norm(f"{name}.feed_forward_norm", context)
        self.feed_forward = FeedForward(f"{name}.feed_forward", context)

    def forward(
        self, hidden: Tensor, stream: Stream, memory: Tensor | None = None, memory_stream: Stream | None = None
    ) -> Tensor:
        """hidden [b, s_d, d] of the documents of `stream`, memory [b, s_e, d] of those of `memory_stream` -> hidden."""
        facts = self._facts(stream, memory_stream, hidden.dtype)
        if self.recompute == "full":
            return recomputed(self.compute, hidden, facts, memory)
        return self.compute(hidden, facts, memory)

    def _facts(self, stream: Stream, memory_stream: Stream | None, dtype: torch.dtype) -> LayerFacts:
        return LayerFacts(
            self.attention.facts(stream, dtype),
            None if self.positions is None else stream.once(positions),
            None if self.cross is None or memory_stream is None else self.cross.facts(stream, memory_stream, dtype),
        )

    def compute(self, hidden: Tensor, facts: LayerFacts, memory: Tensor | None) -> Tensor:
        parallel, a = self.parallel, self.residual
        if self.positions is not None and facts.positions is not None:
            hidden = self.positions(hidden, facts.positions)
        update = parallel.leave(self.attention(self.attention_norm(hidden), facts.mix))
        if self.cross is not None:
            assert memory is not None and facts.cross is not None
            hidden, normal = self.cross_norm.after_adding(hidden, update, a)
            update = parallel.leave(self.cross(normal, memory, facts.cross))
        hidden, normal = self.feed_forward_norm.after_adding(hidden, update, a)
        update = recomputed(self.feed_forward, normal) if self.recompute == "ffn" else self.feed_forward(normal)
        return torch.add(hidden, parallel.leave(update), alpha=a)

    def extend(
        self,
        hidden: Tensor,
        cache: LayerCache,
        new: Continued,
        memory: Tensor | None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Run new tokens [b, t, d], one document a row, after those in `cache`; on one tensor-parallel rank.

        `memory_mask` bool [b, 1, 1, s_e] says which of the memory's tokens there are; None: all.
        """
        assert self.parallel.size == 1, "text is generated from an unsharded model"
        a = self.residual
        if self.positions is not None:
            hidden = self.positions(hidden, new.once(positions))
        hidden = hidden + a * self.attention.extend(self.attention_norm(hidden), cache.self_attention, new)
        if self.cross is not None:
            if cache.memory_keys_values is None:
                assert memory is not None
                cache.memory_keys_values = self.cross.project_memory(memory)
            hidden = hidden + a * self.cross.extend(self.cross_norm(hidden), cache.memory_keys_values, memory_mask)
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
            scales=context.matrix_scales,
            rows=(0,),
            columns=(1,),
            **build,
        )
        self.dense_bias = declare_parameter(f"{name}.mlm.dense.bias", (size,), scales=context.vector_scales, **build)
        self.mlm_norm = build_norm(f"{name}.mlm.norm", whole)
        self.output_bias = declare_parameter(
            f"{name}.mlm.output_bias", (model.padded_vocab_size,), axis=0, scales=context.vector_scales, **build
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
