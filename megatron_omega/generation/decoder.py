"""The decoder over rows of tokens: one row for each growing text, or the rows of a prompt. Few operations a layer.

The rows of all texts go through every matrix together; attention is computed text by text, so that no text is padded
to another's length, and what it gives does not depend on its company. Nor do the products, if the number of rows is a
multiple of ROW_MULTIPLE: on CPUs another kernel computes fewer rows, and rounds differently.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omega.generation.cache import Part
from megatron_omega.generation.matrices import Matrix, Weigh, as_it_is, plain
from megatron_omega.model.embeddings import rotary_table
from megatron_omega.model.layers import DecoderLayer, Head
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.products import product

ROW_MULTIPLE = 4

Rotation = tuple[Tensor, Tensor]
"""Of every row, each [rows, 1, 1, 1, head_dim]: cosines, and signed sines."""


class Room(NamedTuple):
    """Where the products of a layer that attend are written, and how they are looked at."""

    projected: Tensor
    """[rows, branches * 3 * heads * head_dim]."""
    split: Tensor
    """The same as [rows, branches, 3, heads, head_dim]."""
    query_key: Tensor
    """Of it, q and k."""
    query: Tensor
    """Queries of the memory [rows, heads * head_dim]."""
    query_heads: Tensor
    """The same as [rows, heads, head_dim]."""


def make_room(rows: int, like: Tensor) -> Room:
    """Make room for so many rows of a layer whose gains are `like` [branches, 2, heads, head_dim]."""
    branches, _, heads, head_dim = like.shape
    projected = like.new_empty(rows, branches * 3 * heads * head_dim)
    split = projected.view(rows, branches, 3, heads, head_dim)
    query = like.new_empty(rows, heads * head_dim)
    return Room(projected, split, split[:, :, :2], query, query.view(rows, heads, head_dim))


class Attending(Protocol):
    """How rows attend: what the cache keeps, and what the encoder has read."""

    def room(self, layer: int) -> Room:
        """Return where the products of all rows are to be written."""
        ...

    def attend(self, layer: int, projected: Tensor) -> Tensor:
        """Keep keys and values of q, k, v [rows, branches, 3, heads, head_dim]; return [rows, attended]."""
        ...

    def attend_memory(self, layer: int, query: Tensor) -> Tensor:
        """[rows, heads, head_dim] -> [rows, heads * head_dim]."""
        ...


class LayerPass:
    """One decoder layer, with its weights at hand."""

    def __init__(self, index: int, layer: DecoderLayer, parts: tuple[Part, ...], weigh: Weigh) -> None:
        self.index, self.parts = index, parts
        self.residual, self.parallel = layer.residual, layer.parallel
        self.positions = layer.positions
        attention = layer.attention
        model = attention.model
        self.head_dim = model.resolved_head_dim
        self.epsilon = attention.gains.new_tensor(model.norm_epsilon, dtype=torch.float32)
        self.pattern = attention.pattern
        self.form = tuple((part.keeping, part.branch_index) for part in parts)
        self.qkv, self.out = weigh(attention.qkv.weight, -1), weigh(attention.out.weight, 1)
        self.gains = attention.gains
        self.sinks = [attention.sink(part.branch) for part in parts]
        self.attention_norm, self.feed_forward_norm = layer.attention_norm.weight, layer.feed_forward_norm.weight
        self.gate_up = weigh(layer.feed_forward.gate_up.weight, -1)
        self.down = weigh(layer.feed_forward.down.weight, 1)
        self.cross = layer.cross
        self.layer = layer
        if layer.cross is not None:
            self.cross_norm = layer.cross_norm.weight
            self.cross_q, self.cross_out = weigh(layer.cross.q.weight, -1), weigh(layer.cross.out.weight, 1)
            self.cross_gains = layer.cross.gains[0]

    def run(self, hidden: Tensor, rotation: Rotation | None, attending: Attending) -> Tensor:
        """[rows, d] -> [rows, d], in place."""
        room = attending.room(self.index)
        self.qkv(self._norm(self.attention_norm, hidden), room.projected)
        self._normalise(room.query_key, rotation)
        self._add(hidden, self.out, attending.attend(self.index, room.split))
        if self.cross is not None:
            query = room.query_heads
            self.cross_q(self._norm(self.cross_norm, hidden), room.query)
            torch.mul(normalised(query, self.epsilon), self.cross_gains, out=query)
            self._add(hidden, self.cross_out, attending.attend_memory(self.index, query))
        gate, up = self.gate_up(self._norm(self.feed_forward_norm, hidden)).chunk(2, dim=-1)
        self._add(hidden, self.down, F.silu(gate).mul_(up))
        return hidden

    def _norm(self, gain: Tensor, hidden: Tensor) -> Tensor:
        normal = normalised(hidden, self.epsilon).mul_(gain)
        return normal if normal.dtype == hidden.dtype else normal.to(hidden.dtype)

    def _normalise(self, query_key: Tensor, rotation: Rotation | None) -> None:
        """Normalise and rotate q and k [rows, branches, 2, heads, head_dim] in place."""
        normal = normalised(query_key, self.epsilon)
        if rotation is None:
            torch.mul(normal, self.gains, out=query_key)
            return
        cosine, sine = rotation
        swapped = normal.mul_(self.gains).roll(self.head_dim // 2, dims=-1)
        torch.addcmul(normal.mul_(cosine), swapped, sine, out=query_key)

    def _add(self, hidden: Tensor, matrix: Matrix, inputs: Tensor) -> None:
        """Add to the residual stream what the ranks' shares of a product sum up to."""
        if self.parallel.size == 1:
            matrix.add_to(hidden, inputs, self.residual)
        else:
            hidden.add_(self.parallel.all_reduce(matrix(inputs)), alpha=self.residual)


class CompiledLayerPass(LayerPass):
    """The same, what lies between two attentions in one graph. Eager layers remain the definition."""

    def run(self, hidden: Tensor, rotation: Rotation | None, attending: Attending) -> Tensor:
        """[rows, d] -> [rows, d]."""
        room, layer = attending.room(self.index), self.layer
        attention, feed_forward = layer.attention, layer.feed_forward
        room.projected.copy_(
            _projected(hidden, self.attention_norm, attention.qkv.weight, self.gains, self.epsilon, rotation)
        )
        attended, out = attending.attend(self.index, room.split), attention.out.weight
        if layer.cross is not None:
            hidden, query = _queried(
                hidden, attended, out, self.residual, self.cross_norm, layer.cross.q.weight, self.cross_gains,
                self.epsilon,
            )  # fmt: skip
            attended, out = attending.attend_memory(self.index, query), layer.cross.out.weight
        return _fed(
            hidden, attended, out, self.residual, self.feed_forward_norm, feed_forward.gate_up.weight,
            feed_forward.down.weight, self.epsilon,
        )  # fmt: skip


def _scaled(hidden: Tensor, gain: Tensor, epsilon: Tensor) -> Tensor:
    return (normalised(hidden, epsilon) * gain).to(hidden.dtype)


def _after(hidden: Tensor, attended: Tensor, out: Tensor, residual: float) -> Tensor:
    """Add what attended [rows, heads * head_dim] gives through `out` [d, ...]."""
    return hidden + residual * product(attended, out.flatten(1))


@torch.compile
def _projected(
    hidden: Tensor, norm: Tensor, qkv: Tensor, gains: Tensor, epsilon: Tensor, rotation: Rotation | None
) -> Tensor:
    """[rows, d] -> q, k, v [rows, branches * 3 * heads * head_dim], q and k normalised and rotated."""
    branches, _, heads, head_dim = gains.shape
    split = product(_scaled(hidden, norm, epsilon), qkv.flatten(0, -2)).view(-1, branches, 3, heads, head_dim)
    query_key = normalised(split[:, :, :2], epsilon) * gains
    if rotation is not None:
        cosine, sine = rotation
        query_key = query_key * cosine + query_key.roll(head_dim // 2, dims=-1) * sine
    return torch.cat((query_key.to(split.dtype), split[:, :, 2:]), dim=2).flatten(1)


@torch.compile
def _queried(
    hidden: Tensor, attended: Tensor, out: Tensor, residual: float, norm: Tensor, to_query: Tensor, gains: Tensor,
    epsilon: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return hidden with what attended, and the queries of the memory [rows, heads, head_dim]."""
    hidden = _after(hidden, attended, out, residual)
    query = product(_scaled(hidden, norm, epsilon), to_query.flatten(0, -2)).view(-1, *gains.shape)
    return hidden, (normalised(query, epsilon) * gains).to(query.dtype)


@torch.compile
def _fed(
    hidden: Tensor, attended: Tensor, out: Tensor, residual: float, norm: Tensor, gate_up: Tensor, down: Tensor,
    epsilon: Tensor,
) -> Tensor:  # fmt: skip
    """Return hidden with what attended, and the feed-forward network behind it."""
    hidden = _after(hidden, attended, out, residual)
    gate, up = product(_scaled(hidden, norm, epsilon), gate_up.flatten(0, -2)).chunk(2, dim=-1)
    return _after(hidden, F.silu(gate) * up, down, residual)


class Decoder:
    """All decoder layers of a model, and its logits."""

    def __init__(self, model: Omega, parts: Sequence[tuple[Part, ...]], weigh: Weigh = plain) -> None:
        self.model, self.parallel, self._parts = model, model.context.parallel, parts
        self.layers = self._passes(LayerPass, weigh)
        self.workspaces: dict[Hashable, Any] = {}
        self.norm = cast(Head, model.module_named("head")).norm
        self.table = model.table
        rows = model.context.model.vocab_size if self.parallel.size == 1 else len(self.table.weight)
        self.to_logits = plain(self.table.weight[:rows], -1)

    def _passes(self, kind: type[LayerPass], weigh: Weigh) -> Sequence[LayerPass]:
        layers = (cast(DecoderLayer, self.model.module_named(f"decoder.layers.{n}")) for n in range(len(self._parts)))
        pairs = zip(layers, self._parts, strict=True)
        return [kind(index, layer, parts, weigh) for index, (layer, parts) in enumerate(pairs)]

    def compile(self) -> None:
        """Let torch.compile fuse the layers; nothing is compiled before the first rows. One rank, plain weights."""
        assert self.parallel.size == 1, "messages of a layer lie inside what would be compiled"
        self.layers = self._passes(CompiledLayerPass, as_it_is)

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    def run(self, ids: Sequence[int], positions: Sequence[int], attending: Attending) -> Tensor:
        """Run one row for each id, at its position in its text: hidden states [rows, d]."""
        settings = self.model.context.model
        at = torch.tensor([list(positions)], device=self.device)
        hidden = self.table(torch.tensor([list(ids)], device=self.device))
        if (added := self.layers[0].positions) is not None:
            hidden = added(hidden, at)
        rotation = None
        if settings.positions == "rotary":
            cosine, sine = rotary_table(at[0], settings.resolved_head_dim, settings.rotary_base)
            rotation = cosine[:, None, None, None], sine[:, None, None, None]
        hidden = hidden[0]
        for layer in self.layers:
            hidden = layer.run(hidden, rotation, attending)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, d] -> fp32 [rows, vocab_size], equal on all tensor-parallel ranks."""
        settings, table = self.model.context.model, self.table
        normal = self.norm(hidden)
        if self.parallel.size == 1:
            found = self.to_logits(normal).float()
        else:
            found = normal.new_zeros(len(normal), settings.padded_vocab_size, dtype=torch.float32)
            found[:, table.start : table.stop] = self.to_logits(normal)
            found = self.parallel.all_reduce(found)[:, : settings.vocab_size]
        return found.mul_(settings.logit_multiplier)


def normalised(hidden: Tensor, epsilon: Tensor) -> Tensor:
    """Divide the last axis by its root mean square, in fp32: in four operations, where torch's own takes a dozen."""
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.addcmul(epsilon, norm, norm, value=1 / hidden.shape[-1]).rsqrt_() * hidden


def padded(rows: Sequence[int], multiple: int = ROW_MULTIPLE) -> list[int]:
    """Return `rows` with zeros behind, up to a multiple."""
    return [*rows, *[0] * (-len(rows) % multiple)]
