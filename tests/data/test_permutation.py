from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.data.permutation import Permutation, derive_key


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
@settings(max_examples=60)
def test_it_is_a_bijection_with_its_inverse(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    values = [permutation[index] for index in range(size)]
    assert sorted(values) == list(range(size))
    assert [permutation.index(value) for value in values] == list(range(size))
    assert permutation.many(np.arange(size)).tolist() == values


@given(st.integers(10**9, 10**15), st.integers(0, 2**64 - 1), st.integers(0, 10**9 - 1))
@settings(max_examples=60)
def test_large_sizes_agree_element_by_element(size: int, key: int, index: int) -> None:
    permutation = Permutation(size, key)
    value = permutation[index]
    assert 0 <= value < size
    assert permutation.index(value) == index
    assert permutation.many(np.array([index])).tolist() == [value]


def test_keys_give_unrelated_orders() -> None:
    orders = np.stack([Permutation(4096, derive_key(7, epoch)).many(np.arange(4096)) for epoch in range(40)])
    assert len(np.unique(orders, axis=0)) == 40
    assert (orders == np.arange(4096)).sum(axis=1).mean() < 4  # one fixed point is expected
    correlation = np.asarray(np.corrcoef(np.vstack([np.arange(4096), orders])))
    assert np.abs(correlation[np.triu_indices(41, 1)]).max() < 0.08


def test_keys_depend_on_type_and_order() -> None:
    assert len({derive_key(1, 2), derive_key(2, 1), derive_key("1", 2), derive_key(12), derive_key(1)}) == 5


def test_outside_is_refused() -> None:
    with pytest.raises(IndexError):
        Permutation(5, 0)[5]
    with pytest.raises(ValueError, match="at least one"):
        Permutation(0, 0)
