"""The attention patterns: who attends whom, and the kernel that computes it.

`visible` is the definition of every pattern, token by token; `attend` computes it for a whole stream, without an n x n
mask wherever another way is known; `dense_mask` remains for devices without one. All tensors: [b, h, s, head_dim].

    branch   definition (i attends j, always inside one document)          computed as
    -------  ------------------------------------------------------------  ------------------------------------------
    full     every j                                                       document by document (`documents`)
    causal   j <= i                                                        document by document
    local    |i - j| < W;  decoder 0 <= i - j < W                           chunks of W on themselves and neighbours;
                                                                           on CUDA by document, through a window
    axial    same row (even heads) or column (odd heads) of width w;       rows and columns as batches
             decoder also j <= i
    dynamic  full, with a temperature on q and a gate on the output        document by document
    select   the best earlier blocks of w tokens, and j <= i of one's own  `model.select`: blocks gathered, then dense

Branches of one layer that see whole documents see the same keys: they are attended together (`attend_whole`).

With sinks, local and axial heads see one more key: learned, one for each head, without position and with a value of
zero (2309.17453 keeps the first tokens instead; but chunks and columns of packed documents share no first token).

Axial: arXiv 1912.12180, 1904.10509. Local: 2004.05150. Packed documents start at multiples of w, so a document's own
grid and that of the stream are the same. Padding (segment 0) is seen by padding only; what it sees does not matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omega.config.schema import Branch
from megatron_omega.model.documents import (
    attend_bounds,
    attend_spans,
    cross_bounds,
    cross_spans,
    self_bounds,
    self_spans,
)
from megatron_omega.model.kernels import Kernels, scaled_dot_product_attention
from megatron_omega.model.select import earlier_blocks, select, select_mask
from megatron_omega.model.stream import Pattern, Stream, cross_mask, dense_mask, line_mask, local_mask

BranchFacts = tuple[Tensor, ...]
"""What a branch's kernel takes beside q, k and v: spans (one tensor of two axes), bounds (two of one), or masks."""
_ROWS, _COLUMNS = 2, 3  # axes of [b, h, rows, width, head_dim]
_EVERY = -1


def branch_facts(branch: Branch, pattern: Pattern, stream: Stream, dtype: torch.dtype) -> BranchFacts:
    """Return the facts of `stream` that `attend` takes for `branch`; equal layers of a stage share them."""
    if branch == "select":
        return stream.once(earlier_blocks, pattern), stream.once(select_mask, pattern, dtype)
    if branch == "axial":
        return tuple(stream.once(line_mask, pattern, across, dtype) for across in (_ROWS, _COLUMNS))
    if _takes_bounds(stream, dtype) and not (branch == "local" and pattern.has_sinks):
        return stream.once(self_bounds, pattern.width)
    if branch == "local":
        return (stream.once(local_mask, pattern, dtype),)
    if _takes_spans(stream):
        return (stream.once(self_spans),)
    return (stream.once(dense_mask, pattern, dtype),)


def cross_facts(stream: Stream, memory: Stream, width: int, dtype: torch.dtype) -> BranchFacts:
    """Return what `attend_memory` takes for the documents of both streams."""
    if _takes_bounds(stream, dtype):
        return stream.once(cross_bounds, memory, width)
    if _takes_spans(stream):
        return (stream.once(cross_spans, memory),)
    return (stream.once(cross_mask, memory, dtype),)


def attend(
    branch: Branch,
    pattern: Pattern,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    facts: BranchFacts,
    kernels: Kernels,
    sink: Tensor | None = None,
) -> Tensor:
    """Attend [b, h, s, head_dim] by `branch`; `facts` come from `branch_facts`; `sink` [h, head_dim] is learned."""
    if branch == "local" and len(facts) == 1:
        return _local(pattern, query, key, value, facts, sink)
    if branch == "axial":
        return _axial(pattern, query, key, value, facts, sink)
    if branch == "select":
        return select(pattern, query, key, value, (facts[0], facts[1]))
    reach = pattern.window - 1 if branch == "local" else _EVERY
    window = reach, 0 if pattern.causal else reach
    return _inside_documents(*_as_one(query, key, value), facts, kernels, window)[0]


def attend_whole(
    pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, facts: BranchFacts, kernels: Kernels
) -> tuple[Tensor, ...]:
    """Attend branches that see whole documents, [b, branches, h, s, head_dim]; return [b, h, s, head_dim] of each."""
    return _inside_documents(query, key, value, facts, kernels, (_EVERY, 0 if pattern.causal else _EVERY))


def with_sink(keys: Tensor, values: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Put `sink` [h, head_dim] behind the keys [b, h, s, head_dim], and zeros behind the values."""
    if sink is None:
        return keys, values
    return torch.cat((keys, sink.unsqueeze(1).expand(len(keys), -1, -1, -1)), dim=2), F.pad(values, (0, 0, 0, 1))


def attend_memory(query: Tensor, key: Tensor, value: Tensor, facts: BranchFacts, kernels: Kernels) -> Tensor:
    """Attend from [b, h, s_d, head_dim] to [b, h, s_e, head_dim]; `facts` are what `cross_facts` returns."""
    return _inside_documents(*_as_one(query, key, value), facts, kernels, (_EVERY, _EVERY))[0]


def _as_one(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)


def _takes_bounds(stream: Stream, dtype: torch.dtype) -> bool:
    has_kernel = stream.kernels.variable_length_attention is not None
    return has_kernel and stream.segments.is_cuda and dtype in (torch.bfloat16, torch.float16)


def _takes_spans(stream: Stream) -> bool:
    return stream.segments.device.type in ("cpu", "meta")


def _inside_documents(
    query: Tensor, key: Tensor, value: Tensor, facts: BranchFacts, kernels: Kernels, window: tuple[int, int]
) -> tuple[Tensor, ...]:
    """[b, branches, h, s, head_dim] -> [b, h, s, head_dim] of each branch."""
    if len(facts) == 2:
        kernel = kernels.variable_length_attention
        assert kernel is not None, "bounds are made for a variable-length kernel"
        return attend_bounds(kernel, query, key, value, (facts[0], facts[1]), window)
    if facts[0].dim() == 2:
        return attend_spans(query, key, value, facts[0], causal=window == (_EVERY, 0))
    parts = zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True)
    return tuple(scaled_dot_product_attention(*each, facts[0]) for each in parts)


def _local(
    pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, facts: BranchFacts, sink: Tensor | None
) -> Tensor:
    """Chunks of `window` queries attend their own chunk, the one before and, in the encoder, the one after."""
    batch, _, length, _ = query.shape
    size = pattern.window
    after = 0 if pattern.causal else size
    missing = -length % size
    chunks = (length + missing) // size
    reach = 2 * size + after  # keys of one chunk
    chunked = _fill_tokens(query, missing).unflatten(2, (chunks, size)).transpose(1, 2).flatten(0, 1)
    keys, values = (
        F.pad(part, (0, 0, size, missing + after))
        .unfold(2, reach, size)  # [b, h, chunks, head_dim, reach]
        .permute(0, 2, 1, 4, 3)
        .flatten(0, 1)
        for part in (key, value)
    )
    attended = scaled_dot_product_attention(chunked, *with_sink(keys, values, sink), facts[0])
    attended = attended.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)
    return attended[:, :, :length]


def _axial(
    pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, facts: BranchFacts, sink: Tensor | None
) -> Tensor:
    """Even global heads attend along rows of `width` tokens, odd ones along columns."""
    length, width = query.shape[2], pattern.width
    parts = [_fill_tokens(part, -length % width).unflatten(2, (-1, width)) for part in (query, key, value)]
    masks = facts if pattern.first_head % 2 == 0 else facts[::-1]
    axes = (_ROWS, _COLUMNS) if pattern.first_head % 2 == 0 else (_COLUMNS, _ROWS)
    sinks = (None, None) if sink is None else (sink[0::2], sink[1::2])
    lines = [_attend_lines(*arguments) for arguments in zip(_by_parity(parts), axes, masks, sinks, strict=False)]
    return _interleave(lines).flatten(2, 3)[:, :, :length]


def _by_parity(parts: list[Tensor]) -> list[list[Tensor]]:
    """Part heads of even and of odd index; the odd ones are left out if there are none."""
    heads = parts[0].shape[1]
    if heads % 2:
        return [[part[:, first::2] for part in parts] for first in range(min(heads, 2))]
    return [list(half) for half in zip(*(part.unflatten(1, (-1, 2)).unbind(2) for part in parts), strict=True)]


def _interleave(halves: list[Tensor]) -> Tensor:
    """Put heads of even and of odd index in their order again."""
    if len(halves) == 1:
        return halves[0]
    even, odd = halves
    if even.shape[1] == odd.shape[1]:
        return torch.stack((even, odd), dim=2).flatten(1, 2)
    return torch.cat((_interleave([even[:, :-1], odd]), even[:, -1:]), dim=1)


def _attend_lines(parts: list[Tensor], across: int, mask: Tensor, sink: Tensor | None) -> Tensor:
    """Attend [b, h, rows, width, head_dim] along one axis of the grid; the axis `across` is batch."""
    query, key, value = (part.movedim(across, 1).flatten(0, 1) for part in parts)  # [b * lines, h, s, head_dim]
    attended = scaled_dot_product_attention(query, *with_sink(key, value, sink), mask)
    return attended.unflatten(0, (parts[0].shape[0], -1)).movedim(1, across)


def _fill_tokens(part: Tensor, count: int) -> Tensor:
    return F.pad(part, (0, 0, 0, count)) if count else part
