"""What layers know of a batch beside its hidden states, made once per micro-batch and stage and shared by all layers.

A `Stream` carries the documents of a stream as integers; every other fact (positions, rotary tables, masks) is a pure
function of it, called through `Once.once`: made when the first layer asks, and kept for the others. Between pipeline
stages only the integers travel. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omega.config.schema import Branch
from megatron_omega.model.embeddings import RotaryTable, rotary_table
from megatron_omega.model.kernels import Kernels

PADDING = 0
OUTSIDE = -1  # segment of what a kernel adds to fill its last chunk

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Pattern:
    """What the patterns have in common."""

    causal: bool
    window: int
    width: int
    first_head: int = 0
    """Global index of this rank's first head: axial heads are told apart by their global parity."""
    blocks: int = 0
    """Earlier blocks of `width` tokens that a block selects."""
    has_sinks: bool = False
    """Whether local and axial heads see a learned key behind all others."""


class Once:
    """Facts that are made when they are first asked for, and kept."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def once(self, make: Callable[..., Fact], *arguments: Hashable) -> Fact:
        """Return make(self, *arguments), made at the first call."""
        key = (make, *arguments)
        if key not in self._made:
            self._made[key] = make(self, *arguments)
        return self._made[key]


class Stream(Once):
    """The documents of a stream: segments [b, s] int, 1.. = document, 0 = padding."""

    def __init__(self, segments: Tensor, kernels: Kernels) -> None:
        super().__init__()
        self.segments = segments
        self.kernels = kernels


class Continued(Once):
    """New tokens of one unpacked document, behind `seen` earlier ones."""

    def __init__(self, seen: int, new: int, device: torch.device) -> None:
        super().__init__()
        self.seen, self.new, self.device = seen, new, device

    @property
    def total(self) -> int:
        return self.seen + self.new


def positions(stream: Stream | Continued) -> Tensor:
    """[b, s] index of each token inside its document."""
    if isinstance(stream, Continued):
        return torch.arange(stream.seen, stream.total, device=stream.device).unsqueeze(0)
    segments = stream.segments
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_start = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def rotations(stream: Stream | Continued, head_dim: int, base: float) -> RotaryTable:
    """Cosines and sines of every token's position."""
    return rotary_table(stream.once(positions), head_dim, base)


def dense_mask(stream: Stream, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """[b, 1, s, s]: tokens of one document; causal: earlier ones."""
    same = share_document(stream.segments, stream.segments).unsqueeze(1)
    return additive(same.tril() if pattern.causal else same, dtype)


def cross_mask(stream: Stream, memory: Stream, dtype: torch.dtype) -> Tensor:
    """[b, 1, s_d, s_e]: the encoder's tokens of a decoder token's own document."""
    return additive(share_document(stream.segments, memory.segments).unsqueeze(1), dtype)


def local_mask(stream: Stream, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """[b * chunks, 1, window, reach]: chunks of `window` queries and the keys around them."""
    size, segments = pattern.window, stream.segments
    after = 0 if pattern.causal else size
    reach = 2 * size + after
    filled = F.pad(segments, (size, -segments.shape[1] % size + after), value=OUTSIDE).unfold(1, reach, size)
    queries_at = torch.arange(size, 2 * size, device=segments.device)
    keys_at = torch.arange(reach, device=segments.device)
    band = visible("local", pattern, queries_at, keys_at, 1)
    mask = share_document(filled[..., size : 2 * size], filled) & band  # [b, chunks, window, reach]
    return _with_sink(additive(mask.flatten(0, 1).unsqueeze(1), dtype), pattern)


def line_mask(stream: Stream, pattern: Pattern, across: int, dtype: torch.dtype) -> Tensor:
    """[b * lines, 1, s, s] along one axis of the grid [b, h, rows, width]; the axis `across` is batch."""
    missing = -stream.segments.shape[1] % pattern.width
    segments = F.pad(stream.segments, (0, missing), value=OUTSIDE) if missing else stream.segments
    lines = segments.unflatten(1, (-1, pattern.width)).movedim(across - 1, 1).flatten(0, 1)
    mask = share_document(lines, lines).unsqueeze(1)
    return _with_sink(additive(mask.tril() if pattern.causal else mask, dtype), pattern)


def _with_sink(mask: Tensor, pattern: Pattern) -> Tensor:
    """Let all queries see one key more."""
    return F.pad(mask, (0, 1)) if pattern.has_sinks else mask


def continued_mask(stream: Continued, branch: Branch, pattern: Pattern, num_heads: int) -> tuple[int, Tensor]:
    """Return the first key that any new token may see, and who sees whom from there: bool [1, heads, new, keys]."""
    first = max(0, stream.seen + 1 - pattern.window) if branch == "local" else 0
    queries_at, keys_at = stream.once(positions)[0], torch.arange(first, stream.total, device=stream.device)
    return first, visible(branch, pattern, queries_at, keys_at, num_heads).unsqueeze(0)


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


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: 0 where `mask` is true, -inf elsewhere. Made here, or every layer would."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
