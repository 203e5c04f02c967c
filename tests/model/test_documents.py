"""Attention inside documents, by spans (CPU) and by bounds (CUDA's kernels, played here), against masks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_omega.model import documents
from megatron_omega.model.documents import (
    attend_bounds,
    attend_spans,
    cross_bounds,
    cross_spans,
    self_bounds,
    self_spans,
)
from megatron_omega.model.kernels import PORTABLE
from megatron_omega.model.stream import PADDING, Pattern, Stream, cross_mask, dense_mask

WIDTH = 8
Rows = list[list[int]]
PAIRS = st.lists(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3), min_size=1, max_size=3
)


def stream_of(rows: Rows) -> Stream:
    """Rows of documents of given lengths, each at a multiple of WIDTH, padded to the longest row."""
    places = [[-(-length // WIDTH) * WIDTH for length in row] for row in rows]
    segments = torch.zeros(len(rows), max(map(sum, places)) + 3, dtype=torch.long)
    for index, (row, rooms) in enumerate(zip(rows, places, strict=True)):
        for document, length in enumerate(row):
            start = sum(rooms[:document])
            segments[index, start : start + length] = document + 1
    return Stream(segments, PORTABLE)


def parts_of(stream: Stream, memory: Stream, *, size: int = 8) -> list[Tensor]:
    """q, k, v of two branches with two heads."""
    lengths = (stream.segments.shape[1], *[memory.segments.shape[1]] * 2)
    rows = stream.segments.shape[0]
    return [torch.randn(rows, 2, 2, length, size, dtype=torch.double, requires_grad=True) for length in lengths]


def played_kernel(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, longest_query: int, longest_key: int,
    window: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Play a variable-length flash kernel: one sequence after the other."""
    attended = torch.zeros_like(query)
    for (q0, q1), (k0, k1) in zip(_pairs(queries), _pairs(keys), strict=True):
        assert q1 - q0 <= longest_query and k1 - k0 <= longest_key
        if q0 < q1 and k0 < k1:
            distance = torch.arange(k1 - k0) - torch.arange(q1 - q0).unsqueeze(1)
            sees = (window[0] < 0) | (distance >= -window[0])
            sees = sees & ((window[1] < 0) | (distance <= window[1]))
            mine = [part.movedim(0, -2) for part in (query[q0:q1], key[k0:k1], value[k0:k1])]
            part = F.scaled_dot_product_attention(*mine, attn_mask=sees).movedim(-2, 0)
            attended = torch.cat((attended[:q0], part, attended[q1:]))
    return attended


def _pairs(bounds: Tensor) -> list[tuple[int, int]]:
    edges = bounds.tolist()
    assert edges == sorted(edges)
    return list(pairwise(edges))


def compare(
    found: Callable[[list[Tensor]], tuple[Tensor, ...]], mask: Tensor, stream: Stream, parts: list[Tensor]
) -> None:
    """Compare values and gradients of text; what padding attends is of no account."""
    is_text = (stream.segments > 0)[:, None, None, :, None]
    expected = F.scaled_dot_product_attention(*parts, attn_mask=mask.unsqueeze(1))
    values = [torch.stack(found(parts), dim=1) * is_text, expected * is_text]
    gradient = torch.randn_like(values[0])
    gradients = [torch.autograd.grad(value, parts, gradient) for value in values]
    for left, right in zip([values[0], *gradients[0]], [values[1], *gradients[1]], strict=True):
        assert torch.allclose(left, right, atol=1e-10)


@given(rows=PAIRS, causal=st.booleans())
@settings(max_examples=25)
def test_self_attention_by_spans_and_by_bounds_is_the_masked_one(
    rows: list[list[tuple[int, int]]], causal: bool
) -> None:
    stream = stream_of([[length for length, _ in row] for row in rows])
    mask, parts = dense_mask(stream, Pattern(causal, 16, WIDTH), torch.double), parts_of(stream, stream)
    spans, bounds = self_spans(stream), self_bounds(stream, WIDTH)
    compare(lambda given: attend_spans(given[0], given[1], given[2], spans, causal=causal), mask, stream, parts)
    window = (-1, 0 if causal else -1)
    compare(
        lambda given: attend_bounds(played_kernel, given[0], given[1], given[2], bounds, window), mask, stream, parts
    )


@given(rows=PAIRS)
@settings(max_examples=25)
def test_cross_attention_by_spans_and_by_bounds_is_the_masked_one(rows: list[list[tuple[int, int]]]) -> None:
    stream, memory = (stream_of([[pair[side] for pair in row] for row in rows]) for side in range(2))
    mask, parts = cross_mask(stream, memory, torch.double), parts_of(stream, memory)
    mask = torch.where(mask.isinf().all(dim=-1, keepdim=True), 0.0, mask)  # padding before an encoder without any
    spans, bounds = cross_spans(stream, memory), cross_bounds(stream, memory, WIDTH)
    compare(lambda given: attend_spans(given[0], given[1], given[2], spans, causal=False), mask, stream, parts)
    compare(
        lambda given: attend_bounds(played_kernel, given[0], given[1], given[2], bounds, (-1, -1)), mask, stream, parts
    )


def test_a_document_that_one_stream_lacks_leaves_the_others_in_place() -> None:
    stream, memory = (Stream(torch.tensor([row]), PORTABLE) for row in ([1] * 8 + [3] * 8, [1] * 8 + [2] * 8 + [3] * 8))
    bounds = cross_bounds(stream, memory, 8)
    pairs = [list(zip(_pairs(bounds[0]), _pairs(bounds[1]), strict=True))[index] for index in (1, 3, 5)]
    assert pairs == [((0, 8), (0, 8)), ((8, 8), (8, 16)), ((8, 16), (16, 24))]


@pytest.mark.parametrize("make", [self_spans, lambda stream: self_bounds(stream, WIDTH)[0]])
def test_shapes_of_facts_do_not_depend_on_the_documents(make: Callable[[Stream], Tensor]) -> None:
    """Else a compiled layer would be compiled again, and a device would be waited for."""
    assert make(stream_of([[5, 9, 13]])).shape == make(stream_of([[37]])).shape


class Calls(TorchDispatchMode):
    """Notes the queries of every call of the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[int] = []

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:  # pyright: ignore[reportMissingTypeArgument]
        if "flash_attention_for_cpu" in str(function) and "backward" not in str(function):
            self.queries.append(args[0].shape[2])
        return function(*args, **(kwargs or {}))  # pyright: ignore[reportCallIssue]


def test_rows_of_one_document_are_a_call_for_each_branch_and_others_one_for_each_document() -> None:
    whole, packed = Stream(torch.ones(3, 16, dtype=torch.long), PORTABLE), stream_of([[16, 8], [24]])
    for stream, expected in (
        (whole, [16, 16]),
        (packed, [16, 8, 3, 24, 3]),
    ):  # one for each of two branches, or for both
        query, key, value = parts_of(stream, stream)
        with Calls() as calls:
            attend_spans(query, key, value, self_spans(stream), causal=True)
        assert calls.queries == expected


@pytest.mark.parametrize(("size", "heads"), [(20, [4]), (16, [2, 2])])
def test_what_is_padded_for_the_kernel_is_one_call_and_anything_else_is_not_copied(size: int, heads: list[int]) -> None:
    stream, seen, storages = stream_of([[16, 8], [24]]), [], []

    def kernel(query: Tensor, *rest: Any) -> Tensor:
        seen.append(query.shape[1] * query.shape[2])
        storages.append(query.untyped_storage().data_ptr())
        return played_kernel(query, *rest)

    query, key, value = (  # laid out token by token, as a projection is
        part.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4) for part in parts_of(stream, stream, size=size)
    )
    attended = attend_bounds(kernel, query, key, value, self_bounds(stream, WIDTH), (-1, -1))
    assert seen == heads and [part.shape[1] for part in attended] == [2, 2]
    assert {*storages} == {query.untyped_storage().data_ptr()}, "the kernel is given views; it pads them itself"


@pytest.mark.parametrize("lengths", [[16], [9, 7], [5, 8]], ids=["one document", "two", "padding"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_compiler_is_told_the_layout_that_it_gets(batch: int, lengths: list[int]) -> None:
    """Inputs are views of what one product gave, [b, s, branches, 3, h, d], as the attention mix has them."""
    row = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
    stream = Stream(torch.tensor([[*row, *[PADDING] * (16 - len(row))]] * batch), PORTABLE)
    spans = self_spans(stream)
    parts = torch.randn(batch, 16, 2, 3, 3, 8).permute(3, 0, 2, 4, 1, 5).unbind()
    attended, sums = documents._traced_attend(*parts, spans, False)
    gradients = documents._traced_backward(torch.randn_like(attended), *parts, attended, sums, spans, False)
    for found, told in zip((attended, sums, *gradients), (
        *documents._room_for_attended(parts[0]), *documents._room_for_gradients(*parts)
    ), strict=True):  # fmt: skip
        assert found.shape == told.shape
        strides = [(a, b) for a, b, size in zip(found.stride(), told.stride(), found.shape, strict=True) if size > 1]
        assert all(a == b for a, b in strides)
