"""The select branch against its definition, token by token; no future; and what growing a text makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_patterns import LargestTensor, attended, packed_segments
from torch import Tensor

from megatron_omega.config.schema import ModelConfig
from megatron_omega.model.attention_mix import LayerCache, SelfAttention
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import PORTABLE
from megatron_omega.model.select import select_visible
from megatron_omega.model.stream import Continued, Pattern, Stream

WIDTH = 8


def pattern(blocks: int) -> Pattern:
    return Pattern(causal=True, window=16, width=WIDTH, blocks=blocks)


def chosen_by_definition(blocks: int, query: Tensor, key: Tensor, segments: Tensor) -> Tensor:
    """bool [b, h, s, s]: the words of the definition, one block after the other."""
    batch, heads, length, _ = query.shape
    sees = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row in range(batch):
        for begin in range(0, length, WIDTH):
            document, own = segments[row, begin].item(), range(begin, min(begin + WIDTH, length))
            earlier = [b for b in range(0, begin, WIDTH) if document > 0 and segments[row, b] == document]
            for head in range(heads):
                scores = {
                    b: (query[row, head, begin] @ key[row, head, b : b + WIDTH].mean(dim=0)).item() for b in earlier
                }
                best = sorted(scores, key=lambda b: scores[b], reverse=True)[:blocks]
                for i in own:
                    sees[row, head, i, begin : i + 1] = segments[row, begin : i + 1] == segments[row, i]
                    if segments[row, i] == 0:
                        sees[row, head, i, begin : i + 1] = True
                    for b in best:
                        sees[row, head, i, b : b + WIDTH] = segments[row, i] == document
    return sees


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3), spare=st.integers(0, 20), blocks=st.integers(1, 5),
    heads=st.integers(1, 3), batch=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=25)
def test_it_equals_its_definition(lengths: list[int], spare: int, blocks: int, heads: int, batch: int) -> None:
    total = sum(-(-length // WIDTH) * WIDTH for length in lengths) + spare
    rows = [packed_segments(order, WIDTH, total) for order in (lengths, lengths[::-1])[:batch]]
    segments = torch.cat(rows)
    generator = torch.Generator().manual_seed(total)
    shape = (batch, heads, total, 12)
    parts = [torch.randn(shape, dtype=torch.double, generator=generator).requires_grad_() for _ in range(3)]
    gradient = torch.randn(shape, dtype=torch.double, generator=generator)
    found = attended("select", pattern(blocks), parts, segments)
    query, key, value = parts
    mask = chosen_by_definition(blocks, query, key, segments)
    scores = (query @ key.transpose(-1, -2) / 12**0.5).masked_fill(~mask, float("-inf"))
    is_text = (segments > 0)[:, None, :, None]  # padding behind a document sees the choice of its block or not
    expected = scores.softmax(dim=-1) @ value
    assert torch.allclose(torch.where(is_text, found, 0), torch.where(is_text, expected, 0), atol=1e-12)
    gradient = torch.where(is_text, gradient, 0)
    for left, right in zip(
        torch.autograd.grad(found, parts, gradient), torch.autograd.grad(expected, parts, gradient), strict=True
    ):
        assert torch.allclose(left, right, atol=1e-12)


def test_in_single_precision_it_is_within_rounding() -> None:
    segments = packed_segments([130, 90], WIDTH, 256)
    parts = [torch.randn(1, 4, 256, 20, requires_grad=True) for _ in range(3)]
    mask = chosen_by_definition(3, parts[0], parts[1], segments)
    scores = (parts[0] @ parts[1].transpose(-1, -2) / 20**0.5).masked_fill(~mask, float("-inf"))
    found, expected = attended("select", pattern(3), parts, segments), scores.softmax(dim=-1) @ parts[2]
    is_text = (segments > 0)[:, None, :, None].float()
    assert ((found - expected) * is_text).abs().max() < 1e-5
    for left, right in zip(
        torch.autograd.grad((found * is_text).square().sum(), parts),
        torch.autograd.grad((expected * is_text).square().sum(), parts),
        strict=True,
    ):
        assert (left - right).abs().max() < 1e-5 * right.abs().max()  # the largest is about 10


def test_no_token_moves_one_before_it_or_of_another_document() -> None:
    segments = packed_segments([60, 50], WIDTH, 128)
    parts = [torch.randn(1, 2, 128, 12) for _ in range(3)]
    before = attended("select", pattern(2), parts, segments)
    for place in (*range(0, 60, 7), 63, 64, 71, 100):
        changed = [part.clone() for part in parts]
        for part in changed:
            part[:, :, place] += 5
        after = attended("select", pattern(2), changed, segments)
        assert torch.equal(before[:, :, :place], after[:, :, :place]), "the future was seen"
        if place < 60:
            assert torch.equal(before[:, :, 64:], after[:, :, 64:]), "another document was seen"
        if segments[0, place]:
            assert not torch.equal(before[:, :, place], after[:, :, place])


def test_it_never_builds_an_n_by_n_mask() -> None:
    parts = [torch.randn(1, 1, 1024, 4, requires_grad=True) for _ in range(3)]
    with LargestTensor() as largest:
        attended("select", pattern(2), parts, packed_segments([600, 400], WIDTH, 1024)).sum().backward()
    assert largest.elements < 1024 * 1024 / 4


@pytest.mark.parametrize("steps", [[1] * 41, [41], [5, 1, 1, 12, 22], [16, 8, 1, 16]])
def test_a_text_that_grows_sees_what_the_whole_text_sees(steps: list[int]) -> None:
    query, key = (torch.randn(1, 2, sum(steps), 12) for _ in range(2))
    expected = chosen_by_definition(2, query, key, torch.ones(1, sum(steps), dtype=torch.long))
    routes, seen = None, 0
    for step in steps:
        mask, routes = select_visible(pattern(2), routes, query[:, :, seen : seen + step], key[:, :, : seen + step])
        assert torch.equal(mask, expected[:, :, seen : seen + step, : seen + step])
        seen += step


@pytest.mark.parametrize("sinks", [False, True])
def test_a_mix_with_select_and_sinks_grows_like_the_whole(sinks: bool) -> None:
    model = ModelConfig(
        hidden_size=48, num_attention_heads=6, local_window=16, axial_width=WIDTH, select_blocks=2,
        attention_sinks=sinks, decoder_branches=("select", "local", "axial"),
    )  # fmt: skip
    mix = SelfAttention("mix", ("select", "local", "axial"), ModelContext(model, seed=3), causal=True)
    if mix.sinks is not None:
        torch.nn.init.normal_(mix.sinks)
    hidden = torch.randn(1, 75, 48)
    stream = Stream(torch.ones(1, 75, dtype=torch.long), PORTABLE)
    whole = mix(hidden, mix.facts(stream, hidden.dtype))
    cache, grown = LayerCache().self_attention, []
    for first, end in ((0, 20), (20, 21), (21, 22), (22, 50), (50, 75)):
        grown.append(mix.extend(hidden[:, first:end], cache, Continued(first, end - first, hidden.device)))
    assert torch.allclose(torch.cat(grown, dim=1), whole, atol=1e-5)


def test_sinks_are_parameters_of_local_and_axial_heads_and_start_as_a_score_of_zero() -> None:
    fields: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6, "local_window": 16, "axial_width": WIDTH}
    made = {flag: ModelContext(ModelConfig(**fields, attention_sinks=flag), seed=3) for flag in (False, True)}
    plain, sunk = (SelfAttention("mix", ("causal", "local"), made[flag], causal=True) for flag in (False, True))
    assert plain.sinks is None and sunk.sinks is not None and sunk.sinks.shape == (1, 6, 8)
    hidden, stream = torch.randn(1, 24, 48), Stream(torch.ones(1, 24, dtype=torch.long), PORTABLE)
    outputs = [mix(hidden, mix.facts(stream, hidden.dtype)) for mix in (plain, sunk)]
    assert not torch.allclose(*outputs, atol=1e-4), "a score of zero takes its share of the weight"
    outputs[1].sum().backward()
    assert sunk.sinks.grad is not None and sunk.sinks.grad.abs().sum() > 0
