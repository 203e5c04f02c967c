"""Every branch against its definition as a dense mask, forward and backward; and what the kernels may never build."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_omega.config.schema import Branch
from megatron_omega.config.schema.model import HAS_SINK
from megatron_omega.model.attention import attend, branch_facts
from megatron_omega.model.kernels import PORTABLE
from megatron_omega.model.stream import Pattern, Stream, positions, share_document, visible

CASES: list[tuple[Branch, bool]] = [
    ("full", False), ("causal", True), ("local", False), ("local", True), ("axial", False), ("axial", True),
]  # fmt: skip


def packed_segments(lengths: list[int], width: int, total: int) -> Tensor:
    """Documents of `lengths`, each at a multiple of `width`, with padding in the gaps and behind."""
    segments, position = torch.zeros(1, total, dtype=torch.long), 0
    for document, length in enumerate(lengths, start=1):
        segments[:, position : position + length] = document
        position += -(-length // width) * width
    return segments


def attended(branch: Branch, pattern: Pattern, parts: list[Tensor], segments: Tensor) -> Tensor:
    query, key, value, *sink = parts
    facts = branch_facts(branch, pattern, Stream(segments, PORTABLE), query.dtype)
    return attend(branch, pattern, query, key, value, facts, PORTABLE, *sink)


def dense_reference(branch: Branch, pattern: Pattern, parts: list[Tensor], segments: Tensor) -> Tensor:
    places = torch.arange(segments.shape[1])
    mask = visible(branch, pattern, places, places, parts[0].shape[1]).unsqueeze(0)
    mask = mask & share_document(segments, segments).unsqueeze(1)
    query, key, value, *sinks = parts
    for sink in sinks:  # a key without a value that everybody sees
        key = torch.cat((key, sink.unsqueeze(1).unsqueeze(0)), dim=2)
        value = torch.cat((value, torch.zeros_like(value[:, :, :1])), dim=2)
        mask = torch.cat((mask, torch.ones_like(mask[..., :1])), dim=-1)
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ value


@given(
    case=st.sampled_from(CASES),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    spare=st.integers(0, 20),
    first_head=st.integers(0, 3),
    heads=st.integers(1, 3),
    sinks=st.booleans(),
)
@settings(max_examples=40)
def test_branches_equal_their_dense_definition(
    case: tuple[Branch, bool], lengths: list[int], spare: int, first_head: int, heads: int, sinks: bool
) -> None:
    branch, causal = case
    sinks = sinks and branch in HAS_SINK
    pattern = Pattern(causal, window=16, width=8, first_head=first_head, has_sinks=sinks)
    total = sum(-(-length // 8) * 8 for length in lengths) + spare
    segments = packed_segments(lengths, 8, total)
    generator = torch.Generator().manual_seed(total)
    parts = [
        torch.randn(1, heads, total, 20, dtype=torch.double, generator=generator).requires_grad_() for _ in range(3)
    ]
    if sinks:
        parts.append(torch.randn(heads, 20, dtype=torch.double, generator=generator).requires_grad_())
    is_text = (segments > 0).view(1, 1, -1, 1)  # what padding attends is of no account
    gradient = torch.randn(1, heads, total, 20, dtype=torch.double, generator=generator) * is_text
    found = attended(branch, pattern, parts, segments)
    expected = dense_reference(branch, pattern, parts, segments)
    assert torch.allclose(found * is_text, expected * is_text, atol=1e-12)
    for left, right in zip(
        torch.autograd.grad(found, parts, gradient), torch.autograd.grad(expected, parts, gradient), strict=True
    ):
        assert torch.allclose(left, right, atol=1e-12)


@pytest.mark.parametrize(("branch", "causal"), CASES)
def test_definitions_in_words(branch: Branch, *, causal: bool) -> None:
    window, width, length = 3, 4, 16
    mask = visible(branch, Pattern(causal, window, width), torch.arange(length), torch.arange(length), 2)
    for head in range(2):
        for i in range(length):
            for j in range(length):
                expected = j <= i or not causal
                if branch == "local":
                    expected = expected and abs(i - j) < window
                if branch == "axial":
                    same_line = i // width == j // width if head % 2 == 0 else i % width == j % width
                    expected = expected and same_line
                assert mask[head, i, j].item() == expected, (head, i, j)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize(("branch", "causal"), CASES)
def test_no_branch_builds_an_n_by_n_mask(branch: Branch, *, causal: bool) -> None:
    length, heads, size = 1024, 2, 4
    parts = [torch.randn(1, heads, length, size, requires_grad=True) for _ in range(3)]
    segments = packed_segments([600, 400], 16, length)
    with LargestTensor() as largest:
        attended(branch, Pattern(causal, 32, 16), parts, segments).sum().backward()
    assert largest.elements < length * length


def test_positions_count_inside_documents() -> None:
    segments = torch.tensor([[1, 1, 1, 0, 2, 2, 0, 0]])
    assert positions(Stream(segments, PORTABLE)).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]


def test_padding_never_gives_a_not_a_number() -> None:
    segments = torch.zeros(1, 40, dtype=torch.long)
    parts = [torch.randn(1, 2, 40, 4) for _ in range(3)]
    for branch, causal in CASES:
        assert attended(branch, Pattern(causal, 16, 8), parts, segments).isfinite().all()
