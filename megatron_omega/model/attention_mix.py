"""Self-attention as a mix of parallel branches, and cross-attention. One projection in, one projection out.

One column-parallel product gives q, k and v of every branch, each branch attends in its own pattern, one row-parallel
product takes the concatenated heads back. It equals the sum of separate attention modules, at one norm and one
all-reduce for all of them. Parallel heterogeneous branches: arXiv 1911.09483, 2411.13676. QK-norm: 2302.05442.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omega.config.schema import Branch, Branches
from megatron_omega.config.schema.model import WHOLE
from megatron_omega.model.attention import (
    BranchFacts,
    attend,
    attend_memory,
    attend_whole,
    branch_facts,
    cross_facts,
    with_sink,
)
from megatron_omega.model.context import ModelContext
from megatron_omega.model.embeddings import RotaryTable
from megatron_omega.model.heads import Temperature, alone, split_heads
from megatron_omega.model.kernels import scaled_dot_product_attention
from megatron_omega.model.select import select_visible
from megatron_omega.model.stream import Continued, Pattern, Stream, continued_mask, rotations
from megatron_omega.parallel.layers import ColumnParallelLinear, EnteringLinear, RowParallelLinear
from megatron_omega.parallel.parameters import declare_parameter

_FIRST_ROOM = 64


@dataclass
class SelfCache:
    """Keys and values of the tokens a decoder layer has seen. Their room doubles, so that a token is moved rarely."""

    length: int = 0
    """Tokens seen."""
    routes: dict[int, Tensor] = field(default_factory=dict)
    """Of each select branch, the blocks that the last block of tokens attends: bool [b, heads, blocks]."""
    _room: Tensor | None = None
    """Keys and values: [2, b, branches, heads, room, head_dim]."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [b, branches, heads, t, head_dim] each; return those of all tokens."""
        start, self.length = self.length, self.length + keys.shape[3]
        room = self._room
        if room is None or room.shape[4] < self.length:
            *outer, _, head_dim = keys.shape
            room = keys.new_empty(2, *outer, max(_FIRST_ROOM, 2 * self.length), head_dim)
            if self._room is not None:
                room[..., :start, :] = self._room[..., :start, :]
            self._room = room
        room[0, ..., start : self.length, :] = keys
        room[1, ..., start : self.length, :] = values
        return room[0, ..., : self.length, :], room[1, ..., : self.length, :]

    def of(self, rows: Tensor) -> SelfCache:
        """Return a cache of its own for each of `rows`, of which several may be the same."""
        routes = {branch: blocks[rows] for branch, blocks in self.routes.items()}
        return SelfCache(self.length, routes, None if self._room is None else self._room[:, rows])


@dataclass
class LayerCache:
    """What one decoder layer remembers between generated tokens."""

    self_attention: SelfCache = field(default_factory=SelfCache)
    memory_keys_values: tuple[Tensor, Tensor] | None = None

    def of(self, rows: Tensor) -> LayerCache:
        """Return what each of `rows` remembers, of which several may be the same."""
        pair = self.memory_keys_values
        return LayerCache(self.self_attention.of(rows), None if pair is None else (pair[0][rows], pair[1][rows]))


class MixFacts(NamedTuple):
    """What a self-attention mix takes of a stream: tensors alone, made before and shared by equal layers."""

    branches: tuple[BranchFacts, ...]
    rotary: RotaryTable | None


class SelfAttention(nn.Module):
    """All self-attention branches of one layer."""

    def __init__(self, name: str, branches: tuple[Branch, ...], context: ModelContext, *, causal: bool) -> None:
        super().__init__()
        model, first_head = context.model, context.local_heads[0]
        heads, head_dim, count = model.num_attention_heads, model.resolved_head_dim, len(branches)
        self.branches = branches
        self.groups = attended_together(branches)
        self.parallel = context.parallel
        self.model = model
        self.kernels = context.kernels
        self.pattern = Pattern(
            causal, model.local_window, model.axial_width, first_head, model.select_blocks, model.attention_sinks
        )
        build: dict[str, Any] = {"parallel": context.parallel, "seed": context.seed}
        scaled: dict[str, Any] = build | {"scales": context.matrix_scales}
        self.qkv = EnteringLinear(f"{name}.qkv", (count, 3, heads, head_dim, model.hidden_size), axis=2, **scaled)
        self.out = RowParallelLinear(f"{name}.out", (model.hidden_size, count, heads, head_dim), axis=2, **scaled)
        self.gains = declare_parameter(
            f"{name}.qk_gains", (count, 2, heads, head_dim), axis=2, fill=1.0, scales=context.vector_scales, **build
        )
        self.sinks = None
        if sinks := model.sinks(branches):
            self.sinks = declare_parameter(
                f"{name}.sinks", (len(sinks), heads, head_dim), axis=1, scales=context.vector_scales, **build
            )
        if "dynamic" in branches:
            self.dynamic = DynamicActivation(f"{name}.dynamic", context)

    def facts(self, stream: Stream, dtype: torch.dtype) -> MixFacts:
        """Return what `forward` takes of `stream`, for hidden states of `dtype`."""
        branches = tuple(branch_facts(branch, self.pattern, stream, dtype) for branch in self.branches)
        return MixFacts(branches, self._rotary(stream))

    def forward(self, hidden: Tensor, facts: MixFacts) -> Tensor:
        """[b, s or s/tp, d] outside the tensor-parallel region -> this rank's partial sum [b, s, d]."""
        attended: dict[int, Tensor] = {}
        qkv, activation = self._enter(hidden)
        temperature = Temperature(self.branches.index("dynamic"), activation[0]) if activation else None
        for group, parts in zip(self.groups, self._split(qkv, facts.rotary, self.groups, temperature), strict=True):
            attended |= zip(group, self._attend(group, parts, facts), strict=True)
        if temperature is not None:
            attended[temperature.branch] = attended[temperature.branch] * activation[1].transpose(1, 2)
        return self._merge([attended[index] for index in range(len(self.branches))])

    def extend(self, hidden: Tensor, cache: SelfCache, new: Continued) -> Tensor:
        """Attend from new tokens [b, t, d] to all cached and new ones. One document, no packing, no dynamic branch."""
        each = alone(range(len(self.branches)))
        heads = self._split(self.qkv(hidden)[0], self._rotary(new), each)
        projected = [[part.squeeze(1) for part in parts] for parts in heads]
        keys, values = cache.append(*(torch.stack([parts[which] for parts in projected], dim=1) for which in (1, 2)))
        attended = []
        for index, branch in enumerate(self.branches):
            query = projected[index][0]
            if branch == "select":
                first = 0
                mask, cache.routes[index] = select_visible(self.pattern, cache.routes.get(index), query, keys[:, index])
            else:
                first, mask = new.once(continued_mask, branch, self.pattern, query.shape[1])
            seen = with_sink(keys[:, index, :, first:], values[:, index, :, first:], self.sink(branch))
            mask = mask if seen[0].shape[2] == mask.shape[3] else F.pad(mask, (0, 1), value=True)
            attended.append(scaled_dot_product_attention(query, *seen, mask))
        return self._merge(attended)

    def _attend(self, group: range, parts: tuple[Tensor, ...], facts: MixFacts) -> tuple[Tensor, ...]:
        """Return what each branch of `group` attends, [b, heads, s, head_dim]."""
        branch, mine = self.branches[group.start], facts.branches[group.start]
        if branch in WHOLE:
            return attend_whole(self.pattern, parts[0], parts[1], parts[2], mine, self.kernels)
        query, key, value = (part.squeeze(1) for part in parts)
        return (attend(branch, self.pattern, query, key, value, mine, self.kernels, self.sink(branch)),)

    def sink(self, branch: Branch) -> Tensor | None:
        """Return the learned keys [heads, head_dim] of a branch that has them."""
        with_sinks = self.model.sinks(self.branches)
        return self.sinks[with_sinks.index(branch)] if self.sinks is not None and branch in with_sinks else None

    def _rotary(self, stream: Stream | Continued) -> RotaryTable | None:
        model = self.model
        if model.positions != "rotary":
            return None
        return stream.once(rotations, model.resolved_head_dim, model.rotary_base)

    def _enter(self, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return q, k and v of all branches, [b, s, branches * 3 * heads * head_dim], and the dynamic one's activation.

        Both enter the tensor-parallel region, if there is one, together.
        """
        if "dynamic" not in self.branches:
            return self.qkv(hidden)[0], ()
        if self.parallel.size == 1:
            return self.qkv(hidden)[0], self.dynamic(hidden)
        qkv, scores = self.qkv(hidden, self.dynamic.weight)
        return qkv, self.dynamic.activation(scores + self.dynamic.bias.flatten())

    def _split(
        self, qkv: Tensor, rotary: RotaryTable | None, groups: Sequence[range], temperature: Temperature | None = None
    ) -> list[tuple[Tensor, ...]]:
        """Return normed, rotated q and k, and v, of every group: each [b, branches, heads, s, head_dim]."""
        qkv = qkv.unflatten(-1, (len(self.branches), 3, -1, self.model.resolved_head_dim))
        epsilon = self.model.norm_epsilon
        parts = split_heads(qkv, self.gains, rotary, epsilon, groups=groups, temperature=temperature)
        return [parts[first : first + 3] for first in range(0, len(parts), 3)]

    def _merge(self, attended: list[Tensor]) -> Tensor:
        """[b, heads, s, head_dim] of every branch -> [b, s, d]."""
        by_token = [part.transpose(1, 2) for part in attended]
        is_alone = len(by_token) == 1 and self.branches[0] in WHOLE  # its tokens lie one after the other already
        joined = by_token[0] if is_alone else torch.stack(by_token, dim=2)
        return self.out(joined.flatten(2))


def attended_together(branches: Branches) -> tuple[range, ...]:
    """Return groups of branches that are attended in one call: two that see whole documents, and each other by itself.

    >>> attended_together(("full", "local", "axial", "dynamic"))
    (range(0, 4, 3), range(1, 2), range(2, 3))
    """
    whole = [index for index, branch in enumerate(branches) if branch in WHOLE]
    if len(whole) != 2:  # more would be no range, which is what makes a view of them
        return alone(range(len(branches)))
    first, second = whole
    others = (index for index in range(len(branches)) if index not in whole)
    return range(first, second + 1, second - first), *alone(others)


class DynamicActivation(nn.Module):
    """Per token and head: a temperature on the query and a gate on the output, both 2 sigmoid(w x + b).

    Zero-initialised, so the branch starts as plain attention. Query temperature: arXiv 2411.12892; gates: 2505.06708.
    """

    def __init__(self, name: str, context: ModelContext) -> None:
        super().__init__()
        model = context.model
        shape = (2, model.num_attention_heads)
        build = {"axis": 1, "parallel": context.parallel, "seed": context.seed}
        self.weight = declare_parameter(
            f"{name}.weight", (*shape, model.hidden_size), scales=context.matrix_scales, **build
        )
        self.bias = declare_parameter(f"{name}.bias", shape, scales=context.vector_scales, **build)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[b, s, d] -> temperature and gate, each [b, s, heads, 1]."""
        return self.activation(F.linear(hidden, self.weight.flatten(0, 1), self.bias.flatten()))

    def activation(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The same of w x + b, [b, s, 2 * heads]."""
        temperature, gate = (2 * scores.sigmoid()).unflatten(-1, (2, -1)).unsqueeze(-1).unbind(2)
        return temperature, gate


class CrossAttention(nn.Module):
    """Decoder tokens attend the encoder's output of their own document."""

    def __init__(self, name: str, context: ModelContext) -> None:
        super().__init__()
        model = context.model
        heads, head_dim, d = model.num_attention_heads, model.resolved_head_dim, model.hidden_size
        build: dict[str, Any] = {"parallel": context.parallel, "seed": context.seed}
        scaled: dict[str, Any] = build | {"scales": context.matrix_scales}
        self.model = model
        self.kernels = context.kernels
        self.q = EnteringLinear(f"{name}.q", (heads, head_dim, d), axis=0, **scaled)
        self.kv = ColumnParallelLinear(f"{name}.kv", (2, heads, head_dim, d), axis=1, **scaled)
        self.out = RowParallelLinear(f"{name}.out", (d, heads, head_dim), axis=1, **scaled)
        self.gains = declare_parameter(
            f"{name}.qk_gains", (2, heads, head_dim), axis=1, fill=1.0, scales=context.vector_scales, **build
        )

    def facts(self, stream: Stream, memory: Stream, dtype: torch.dtype) -> BranchFacts:
        """Return what `forward` takes of both streams, for hidden states of `dtype`."""
        return cross_facts(stream, memory, self.model.axial_width, dtype)

    def forward(self, hidden: Tensor, memory: Tensor, facts: BranchFacts) -> Tensor:
        """hidden [b, s_d or s_d/tp, d] outside, memory [b, s_e, d] inside the region -> this rank's sum [b, s_d, d]."""
        (query,) = self._split(self.q(hidden)[0], 1, self.gains[:1])
        return self._merge(attend_memory(query, *self.project_memory(memory), facts, self.kernels))

    def extend(self, hidden: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """Attend from new tokens [b, t, d] to the memory, one document a row; to all of it, or where `mask` is true."""
        (query,) = self._split(self.q(hidden)[0], 1, self.gains[:1])
        return self._merge(scaled_dot_product_attention(query, *keys_values, mask))

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[b, s_e, d] -> keys and values [b, heads, s_e, head_dim]; they stay the same while a text is generated."""
        key, value = self._split(self.kv(memory), 2, self.gains[1:])
        return key, value

    def _merge(self, attended: Tensor) -> Tensor:
        return self.out(attended.transpose(1, 2).flatten(2))

    def _split(self, projected: Tensor, parts: int, gains: Tensor) -> tuple[Tensor, ...]:
        heads = projected.unflatten(-1, (1, parts, -1, self.model.resolved_head_dim))
        found = split_heads(heads, gains.unsqueeze(0), None, self.model.norm_epsilon)
        return tuple(part.squeeze(1) for part in found)
