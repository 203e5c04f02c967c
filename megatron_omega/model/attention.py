"""The attention patterns: who attends whom, and the kernel that computes it.

`visible` is the definition of every pattern, token by token; `attend` computes it for a whole stream. Local and axial
attention never build an n x n mask: they attend inside chunks, rows and columns. All tensors: [b, h, s, head_dim].

    branch   definition (i attends j, always inside one document)          computed as
    -------  ------------------------------------------------------------  ------------------------------------------
    full     every j                                                       one dense attention
    causal   j <= i                                                        one dense attention
    local    |i - j| < W;  decoder 0 <= i - j < W                           chunks of W on themselves and neighbours
    axial    same row (even heads) or column (odd heads) of width w;       rows and columns as batches
             decoder also j <= i
    dynamic  full, with a temperature on q and a gate on the output        one dense attention

Axial: arXiv 1912.12180, 1904.10509. Local: 2004.05150. Packed documents start at multiples of w, so a document's own
grid and that of the stream are the same. Padding (segment 0) sees everything in its pattern: no row is ever empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omega.config.schema import Branch
from megatron_omega.model.kernels import Kernels, scaled_dot_product_attention

PADDING = 0
OUTSIDE = -1  # segment of what a kernel adds to fill its last chunk


@dataclass(frozen=True)
class Pattern:
    """What the patterns have in common."""

    causal: bool
    window: int
    width: int
    first_head: int = 0
    """Global index of this rank's first head: axial heads are told apart by their global parity."""


@dataclass(frozen=True)
class Stream:
    """The documents of a stream: what attention must know beside q, k and v. Masks are made where they are used."""

    segments: Tensor
    """[b, s] int: 1.. = document, 0 = padding."""
    kernels: Kernels

    @cached_property
    def positions(self) -> Tensor:
        """[b, s] index of each token inside its document."""
        index = torch.arange(self.segments.shape[1], device=self.segments.device).expand_as(self.segments)
        is_start = F.pad(self.segments[:, 1:] != self.segments[:, :-1], (1, 0), value=True)
        return index - torch.where(is_start, index, 0).cummax(dim=1).values

    @cached_property
    def same_document(self) -> Tensor:
        """[b, 1, s, s]."""
        return share_document(self.segments, self.segments).unsqueeze(1)

    @cached_property
    def earlier_in_document(self) -> Tensor:
        """[b, 1, s, s]."""
        return self.same_document.tril()


def share_document(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """[..., q], [..., k] -> [..., q, k]: may these tokens see each other at all?"""
    query, key = query_segments.unsqueeze(-1), key_segments.unsqueeze(-2)
    return (query == key) | ((query == PADDING) & (key > OUTSIDE))


def visible(branch: Branch, pattern: Pattern, query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """[q], [k] stream positions -> bool [num_heads, q, k]: the definition of `branch`, documents apart."""
    i, j = query.unsqueeze(-1), key.unsqueeze(-2)
    if branch == "local":
        sees = (i - j).abs() < pattern.window
    elif branch == "axial":
        row = i // pattern.width == j // pattern.width
        column = i % pattern.width == j % pattern.width
        is_row_head = (pattern.first_head + torch.arange(num_heads, device=query.device)) % 2 == 0
        sees = torch.where(is_row_head.view(-1, 1, 1), row, column)
    else:
        sees = torch.ones_like(i == j)
    if pattern.causal:
        sees = sees & (j <= i)
    return sees.expand(num_heads, -1, -1)


def attend(branch: Branch, pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, stream: Stream) -> Tensor:
    """Attend [b, h, s, head_dim] by `branch`."""
    return _KERNELS[branch](pattern, query, key, value, stream)


def _dense(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, stream: Stream) -> Tensor:
    flash = stream.kernels.windowed_attention
    if flash is not None and query.is_cuda and query.dtype != torch.float32:
        return _flash(flash, pattern, query, key, value, stream)
    mask = stream.earlier_in_document if pattern.causal else stream.same_document
    return scaled_dot_product_attention(query, key, value, mask)


def _flash(
    flash: Callable[..., Tensor], pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, stream: Stream
) -> Tensor:
    """Variable-length flash attention: runs of equal segments are its sequences, so there is no mask."""
    batch, heads, length, head_dim = query.shape
    first = F.pad(stream.segments[:, 1:] != stream.segments[:, :-1], (1, 0), value=True).flatten()
    bounds = F.pad(first.nonzero().flatten().int(), (0, 1), value=batch * length)
    q, k, v = (part.transpose(1, 2).reshape(batch * length, heads, head_dim) for part in (query, key, value))
    attended = flash(q, k, v, bounds, bounds, length, length, causal=pattern.causal)
    return attended.view(batch, length, heads, head_dim).transpose(1, 2)


def _local(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, stream: Stream) -> Tensor:
    """Chunks of `window` queries attend their own chunk, the one before and, in the encoder, the one after."""
    batch, _, length, _ = query.shape
    size = pattern.window
    after = 0 if pattern.causal else size
    fill = -length % size
    chunks = (length + fill) // size
    reach = 2 * size + after  # keys of one chunk
    chunked = F.pad(query, (0, 0, 0, fill)).unflatten(2, (chunks, size)).transpose(1, 2).flatten(0, 1)
    keys, values = (
        F.pad(part, (0, 0, size, fill + after))
        .unfold(2, reach, size)  # [b, h, chunks, head_dim, reach]
        .permute(0, 2, 1, 4, 3)
        .flatten(0, 1)
        for part in (key, value)
    )
    segments = F.pad(stream.segments, (size, fill + after), value=OUTSIDE).unfold(1, reach, size)  # [b, chunks, reach]
    queries_at = torch.arange(size, 2 * size, device=query.device)
    keys_at = torch.arange(reach, device=query.device)
    band = visible("local", pattern, queries_at, keys_at, 1)
    mask = share_document(segments[..., size : 2 * size], segments) & band  # [b, chunks, size, reach]
    attended = scaled_dot_product_attention(chunked, keys, values, mask.flatten(0, 1).unsqueeze(1))
    attended = attended.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3)
    return attended[:, :, :length]


_ROWS, _COLUMNS = 2, 3  # axes of [b, h, rows, width, head_dim]


def _axial(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, stream: Stream) -> Tensor:
    """Even global heads attend along rows of `width` tokens, odd ones along columns."""
    length, width = query.shape[2], pattern.width
    fill = -length % width
    parts = [F.pad(part, (0, 0, 0, fill)).unflatten(2, (-1, width)) for part in (query, key, value)]
    segments = F.pad(stream.segments, (0, fill), value=OUTSIDE).unflatten(1, (-1, width))  # [b, rows, width]
    attended = torch.empty_like(parts[0])
    first_row_head = pattern.first_head % 2
    for first, across in ((first_row_head, _ROWS), (1 - first_row_head, _COLUMNS)):
        if first < query.shape[1]:
            lines = [part[:, first::2] for part in parts]
            attended[:, first::2] = _attend_lines(lines, segments, across, causal=pattern.causal)
    return attended.flatten(2, 3)[:, :, :length]


def _attend_lines(parts: list[Tensor], segments: Tensor, across: int, *, causal: bool) -> Tensor:
    """Attend [b, h, rows, width, head_dim] along one axis of the grid; the axis `across` is batch."""
    query, key, value = (part.movedim(across, 1).flatten(0, 1) for part in parts)  # [b * lines, h, s, head_dim]
    line_segments = segments.movedim(across - 1, 1).flatten(0, 1)
    mask = share_document(line_segments, line_segments).unsqueeze(1)
    attended = scaled_dot_product_attention(query, key, value, mask.tril() if causal else mask)
    return attended.unflatten(0, (parts[0].shape[0], -1)).movedim(1, across)


_KERNELS: dict[Branch, Callable[[Pattern, Tensor, Tensor, Tensor, Stream], Tensor]] = {
    "full": _dense,
    "causal": _dense,
    "dynamic": _dense,
    "local": _local,
    "axial": _axial,
}
