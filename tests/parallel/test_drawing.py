"""A slice drawn alone is the slice of the whole, and the whole is normal."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_omega.parallel import drawing
from megatron_omega.parallel.drawing import normal_slice


@st.composite
def slices(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    axis = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[axis]))
    return shape, axis, start, draw(st.integers(start, shape[axis]))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
@given(slices(), st.integers(-(2**40), 2**40))
def test_a_slice_is_the_slice_of_the_whole_whatever_the_chunk(
    chunk: int, cut: tuple[tuple[int, ...], int, int, int], seed: int
) -> None:
    shape, axis, start, stop = cut
    whole = normal_slice(seed, "weight", shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(drawing._CHUNK_ELEMENTS, "cpu", chunk)
        alone = normal_slice(seed, "weight", shape, axis, start, stop)
    assert torch.equal(alone, whole.narrow(axis, start, stop - start))


def test_the_counter_goes_through_splitmix64() -> None:
    mask = (1 << 64) - 1
    key = drawing._key(5, "name")

    def reference(place: int) -> int:
        z = ((place + 1) * 0x9E3779B97F4A7C15 + key) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z >> 32

    places = [0, 1, 2, 1000, 2**31, 2**40]
    assert drawing._hash(torch.tensor(places), key).tolist() == [reference(place) for place in places]


def test_the_whole_is_normal() -> None:
    values = normal_slice(1, "weight", (1000, 1000)).double().flatten()
    error = 1 / math.sqrt(len(values))
    assert abs(values.mean()) < 5 * error
    assert abs(values.var() - 1) < 5 * math.sqrt(2) * error
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96) * error
    assert abs((values[1:] * values[:-1]).mean()) < 5 * error
    shares = torch.histc(values.float(), 5, -2.5, 2.5) / len(values)
    expected = [0.0606, 0.2417, 0.3829, 0.2417, 0.0606]
    assert torch.allclose(shares, torch.tensor(expected), atol=5 * error)


def test_names_and_seeds_draw_independently() -> None:
    first, second, third = (normal_slice(seed, name, (100_000,)) for seed, name in ((1, "a"), (1, "b"), (2, "a")))
    for other in (second, third):
        assert abs((first * other).mean()) < 5 / math.sqrt(len(first))


def test_the_bits_are_the_same_everywhere() -> None:
    """A change of these numbers is a new version: runs that start anew would start elsewhere."""
    drawn = normal_slice(1234, "encoder.layers.0.attention.qkv.weight", (3, 5)).flatten().view(torch.int32).tolist()
    assert drawn[:4] == [-1078181095, -1097795716, -1071289284, -1078758093]


def test_narrow_tensors_of_a_surrounding_context_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, empty = normal_slice(1, "weight", (100,)), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options).bfloat16())
    assert torch.equal(normal_slice(1, "weight", (100,)), expected)
