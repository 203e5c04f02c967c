"""Attention inside documents whose bounds are known: no mask, and no work between documents.

On the CPU every document is a call of torch's fused kernel on its slice of the stream; on CUDA all documents are one
call of a variable-length kernel. Both take integers that are made once per micro-batch: spans on the CPU, cumulative
bounds on CUDA, where nothing may wait for the device, so that their number depends on the length of the stream only.
Packing lets every document begin at a multiple of the axial width, and numbers them 1.. in order.

Branches that see the same keys go together, [b, branches, h, s, head_dim]: on the CPU they are the batch of a call, on
CUDA more heads of one, where no copy is needed for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_omega.model.kernels import HEAD_MULTIPLE, VariableLengthAttention
from megatron_omega.model.stream import PADDING, Stream
from megatron_omega.parallel.lean import accumulation

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_SPAN = 5  # row, first and end of the queries, first and end of the keys

Span = tuple[int, ...]


class _Call(NamedTuple):
    """What one call of the fused kernel takes: of which row or branch, and which tokens."""

    place: tuple[int | slice, int | slice]
    queries: slice
    keys: slice

    def of_queries(self, part: Tensor) -> Tensor:
        """[b, branches, h, s, ...] -> [b or branches, h, queries, ...]."""
        return part[(*self.place, slice(None), self.queries)]

    def of_keys(self, part: Tensor) -> Tensor:
        """The same of the keys' tokens."""
        return part[(*self.place, slice(None), self.keys)]


Bounds = tuple[Tensor, Tensor]
"""Cumulative bounds of queries and of keys, int32 [sequences + 1]."""


def self_spans(stream: Stream) -> Tensor:
    """Where each document (or gap) lies: int32 [1 + b * s, 5] on the CPU, the number of spans in front."""
    rows = _rows(stream)
    spans = [(row, *run, *run) for row, runs in enumerate(rows) for _, *run in runs]
    return _pack(spans, stream.segments.numel())


def cross_spans(stream: Stream, memory: Stream) -> Tensor:
    """Where each document lies in both streams; as `self_spans`. Padding of the decoder attends nothing."""
    spans: list[Span] = []
    for row, (runs, others) in enumerate(zip(_rows(stream), _rows(memory), strict=True)):
        places = {document: place for document, *place in others if document != PADDING}
        spans += [(row, *run, *places[document]) for document, *run in runs if document in places]
    return _pack(spans, stream.segments.numel())


def self_bounds(stream: Stream, width: int) -> Bounds:
    """Bounds of documents and of the gaps between them, for a variable-length kernel."""
    bounds = _bounds(stream.segments, -(-stream.segments.shape[1] // width))
    return bounds, bounds


def cross_bounds(stream: Stream, memory: Stream, width: int) -> Bounds:
    """Bounds of the same documents in both streams."""
    capacity = -(-max(stream.segments.shape[1], memory.segments.shape[1]) // width)
    return _bounds(stream.segments, capacity), _bounds(memory.segments, capacity)


def attend_spans(query: Tensor, key: Tensor, value: Tensor, spans: Tensor, *, causal: bool) -> tuple[Tensor, ...]:
    """Attend [b, branches, h, s, head_dim] on the CPU, document by document; zeros if nobody is to be attended.

    Return what each branch attends, [b, h, s, head_dim].
    """
    return _apart(_SpanAttention.apply(query, key, value, spans, causal))  # pyright: ignore[reportArgumentType]


def attend_bounds(
    kernel: VariableLengthAttention, query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, window: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Attend [b, branches, h, s, head_dim] on CUDA; return what each branch attends, [b, h, s, head_dim].

    `window` counts the keys before and after, -1 = all. What the kernel needs padded is copied, and becomes heads of
    one call by that; of anything else every branch is a call on what stands where it is.
    """
    batch, count, _, length, head_dim = query.shape
    q, k, v = (part.permute(0, 3, 1, 2, 4).flatten(0, 1) for part in (query, key, value))  # [b * s, branches, h, ..]
    together = count if head_dim % HEAD_MULTIPLE else 1
    calls = [slice(first, first + together) for first in range(0, count, together)]
    attended = [kernel(q[:, c], k[:, c], v[:, c], *bounds, length, key.shape[3], window) for c in calls]
    return tuple(branch.unflatten(0, (batch, length)).transpose(1, 2) for call in attended for branch in _apart(call))


def _apart(attended: Tensor) -> tuple[Tensor, ...]:
    """[.., branches, ...] -> one for each branch; the gradient of a single one is not copied."""
    return (attended.squeeze(1),) if attended.shape[1] == 1 else attended.unbind(1)


def _rows(stream: Stream) -> list[list[Span]]:
    """Return (document, first token, end) of every run of equal segments, row by row."""
    segments = stream.segments
    if segments.is_meta:  # a rehearsal has no data: every row is one document
        return [[(1, 0, segments.shape[1])]] * segments.shape[0]
    rows = []
    for row in segments:
        documents, counts = torch.unique_consecutive(row, return_counts=True)
        ends = counts.cumsum(0).tolist()
        rows.append(list(zip(documents.tolist(), [0, *ends[:-1]], ends, strict=True)))
    return rows


def _pack(spans: list[Span], room: int) -> Tensor:
    """Return spans as a tensor whose shape does not depend on them, so that compiled layers stay compiled."""
    packed = torch.zeros(1 + room, _SPAN, dtype=torch.int32, device="cpu")
    packed[0, 0] = len(spans)
    if spans:
        packed[1 : 1 + len(spans)] = torch.tensor(spans, dtype=torch.int32, device="cpu")
    return packed


def _bounds(segments: Tensor, capacity: int) -> Tensor:
    """[b, s] -> int32 [b * (2 capacity + 1) + 1]: gap, document, gap, ..., gap of every row, all tokens in one line."""
    batch, length = segments.shape
    documents = torch.arange(1, capacity + 1, device=segments.device).expand(batch, -1).contiguous()
    latest = segments.cummax(dim=1).values  # padding belongs to the document before it
    first = torch.searchsorted(latest, documents)
    counts = torch.zeros(batch, length + 2, dtype=torch.long, device=segments.device)
    counts.scatter_add_(1, segments, torch.ones_like(segments))
    end = first + counts[:, 1 : capacity + 1]
    rows = torch.arange(batch, device=segments.device).unsqueeze(1) * length
    edges = torch.stack((first, end), dim=2).flatten(1) + rows  # [b, 2 capacity]
    inner = torch.cat((edges, rows + length), dim=1).flatten()
    return torch.cat((inner.new_zeros(1), inner)).int()


def _calls(spans: Tensor, query: Tensor, key: Tensor) -> list[_Call]:
    """Return what every call takes: all branches of a document, or all rows of a branch if each is one document."""
    rows = spans[1 : 1 + int(spans[0, 0])].tolist()
    ends = [0, query.shape[3], 0, key.shape[3]]
    if len(rows) == query.shape[0] > 1 and all(span[1:] == ends for span in rows):
        return [_Call((slice(None), branch), slice(*ends[:2]), slice(*ends[2:])) for branch in range(query.shape[1])]
    return [_Call((row, slice(None)), slice(*at[:2]), slice(*at[2:])) for row, *at in rows]


def _is_everything(calls: list[_Call], query: Tensor, key: Tensor) -> bool:
    """Whether one call takes all there is: what it returns is the result then."""
    whole = slice(0, query.shape[3]), slice(0, key.shape[3])
    return len(calls) == 1 and (calls[0].queries, calls[0].keys) == whole and 1 in query.shape[:2]


def _attend(query: Tensor, key: Tensor, value: Tensor, spans: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return what is attended [b, branches, h, s, head_dim], laid out as [b, branches, s, h, head_dim], and
    log-sum-exps [b, branches, h, s]."""
    calls = _calls(spans, query, key)
    if _is_everything(calls, query, key):
        found = _flash(calls[0].of_queries(query), calls[0].of_keys(key), calls[0].of_keys(value), is_causal=causal)
        return found[0].unflatten(0, query.shape[:2]), found[1].unflatten(0, query.shape[:2])
    attended, sums = _room_for_attended(query)
    for call in calls:
        parts = call.of_queries(query), call.of_keys(key), call.of_keys(value)
        call.of_queries(attended)[:], call.of_queries(sums)[:] = _flash(*parts, is_causal=causal)
    return attended, sums


def _attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, sums: Tensor, spans: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, laid out as [b, branches, s, h, head_dim]."""
    calls = _calls(spans, query, key)

    def gradients(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
        mine = [call.of_queries(part) for part in (gradient, query, attended, sums)]
        return _flash_backward(*mine[:2], call.of_keys(key), call.of_keys(value), *mine[2:], 0.0, causal)

    if _is_everything(calls, query, key):
        d_query, d_key, d_value = (part.unflatten(0, query.shape[:2]) for part in gradients(calls[0]))
        return d_query, d_key, d_value
    d_query, d_key, d_value = _room_for_gradients(query, key, value)
    for call in calls:
        places = call.of_queries(d_query), call.of_keys(d_key), call.of_keys(d_value)
        for place, part in zip(places, gradients(call), strict=True):
            place[:] = part
    return d_query, d_key, d_value


def _room_for_attended(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, branches, heads, length, _ = query.shape
    sums = query.new_zeros(batch, branches, length, heads, dtype=accumulation(query.dtype))
    return _zeros_by_token(query), sums.transpose(2, 3)


def _room_for_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _zeros_by_token(query), _zeros_by_token(key), _zeros_by_token(value)


def _zeros_by_token(part: Tensor) -> Tensor:
    batch, branches, heads, length, head_dim = part.shape
    return part.new_zeros(batch, branches, length, heads, head_dim).transpose(2, 3)


def _by_token(part: Tensor) -> Tensor:
    """Lay out as [b, branches, s, h, ...]: a compiler is promised that; one call may give what its inputs look like."""
    return part.transpose(2, 3).contiguous().transpose(2, 3)


@torch.library.custom_op("megatron_omega::attend_spans", mutates_args=())
def _traced_attend(
    query: Tensor, key: Tensor, value: Tensor, spans: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    attended, sums = _attend(query, key, value, spans, causal)
    return _by_token(attended), _by_token(sums)


@torch.library.custom_op("megatron_omega::attend_spans_backward", mutates_args=())
def _traced_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, sums: Tensor, spans: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_query, d_key, d_value = _attend_backward(gradient, query, key, value, attended, sums, spans, causal)
    return _by_token(d_query), _by_token(d_key), _by_token(d_value)


@_traced_attend.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _room_for_attended(query)


@_traced_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _room_for_gradients(query, key, value)


class _SpanAttention(Function):
    """The number of calls depends on the data; so a compiler sees one operation, while eager code calls through."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, spans: Tensor, causal: bool) -> Tensor:
        attend = _traced_attend if torch.compiler.is_compiling() else _attend
        attended, sums = attend(query, key, value, spans, causal)
        context.causal = causal
        context.save_for_backward(query, key, value, attended, sums, spans)
        return attended

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        backward = _traced_backward if torch.compiler.is_compiling() else _attend_backward
        query, key, value, attended, sums, spans = context.saved_tensors
        return *backward(gradient, query, key, value, attended, sums, spans, context.causal), None, None
