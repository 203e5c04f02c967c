from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.data.blending import Blend

weights_of = st.lists(st.floats(0.01, 100), min_size=1, max_size=7)


@given(weights_of)
@settings(max_examples=50)
def test_every_sample_comes_once_and_in_proportion_at_every_prefix(weights: list[float]) -> None:
    blend = Blend(weights)
    given_so_far = [0] * len(weights)
    total = sum(map(Fraction, weights))
    for sample in range(150):
        corpus, number = blend.locate(sample)
        assert number == given_so_far[corpus]
        given_so_far[corpus] += 1
        assert blend.counts(sample + 1) == given_so_far
        assert all(abs(n - (sample + 1) * Fraction(w) / total) < 2 for n, w in zip(given_so_far, weights, strict=True))


def test_two_corpora_are_never_off_by_more_than_a_half() -> None:
    blend = Blend([0.7, 0.3])
    assert all(abs(blend.counts(n)[0] - n * 0.7) <= 0.5 + 1e-9 for n in range(2000))


def test_proportions_do_not_drift() -> None:
    samples = 10**15 + 7
    counts = Blend([3, 2, 1]).counts(samples)
    assert sum(counts) == samples
    assert all(abs(n - Fraction(samples * w, 6)) < 2 for n, w in zip(counts, [3, 2, 1], strict=True))


@given(weights_of, st.data())
@settings(max_examples=40)
def test_new_weights_in_mid_run_neither_repeat_nor_lose(weights: list[float], data: st.DataObject) -> None:
    at = data.draw(st.integers(1, 60))
    others = data.draw(st.lists(st.floats(0, 9), min_size=len(weights), max_size=len(weights)).filter(any))
    blend = Blend(weights, [(at, others)])
    found = [blend.locate(sample) for sample in range(140)]
    for corpus in range(len(weights)):
        numbers = [number for where, number in found if where == corpus]
        assert numbers == list(range(len(numbers)))
    assert found[:at] == [Blend(weights).locate(sample) for sample in range(at)]


@given(weights_of, st.integers(0, 300))
@settings(max_examples=40)
def test_samples_are_found_again(weights: list[float], sample: int) -> None:
    blend = Blend(weights)
    corpus, number = blend.locate(sample)
    assert blend.sample_of(corpus, number, 301) == sample
    assert blend.sample_of(corpus, number, sample) is None


def test_impossible_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one above zero"):
        Blend([0.0, 0.0])
    with pytest.raises(ValueError, match="ascending"):
        Blend([1.0], [(5, [1.0]), (5, [1.0])])
