"""Searching by proportion finds what bisection finds, by fewer looks."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from megatron_omega.data.search import last_not_above

LENGTHS = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 10**9)), min_size=1, max_size=300)


@given(LENGTHS, st.integers(0, 10), st.data())
def test_finds_what_bisection_finds(lengths: list[int], skipped: int, data: st.DataObject) -> None:
    starts = list(accumulate(lengths, initial=0))
    end = starts.pop()
    first = min(skipped, len(starts) - 1)
    wanted = data.draw(st.integers(starts[first], max(starts[first], end)))
    found = last_not_above(starts.__getitem__, wanted, first, len(starts), end)
    assert found == bisect_right(starts, wanted) - 1


def test_reads_a_handful_of_even_places_and_not_all_of_uneven_ones() -> None:
    def looks(value: list[int] | None, size: int, wanted: int, end: int) -> int:
        seen: list[int] = []

        def noted(index: int) -> int:
            seen.append(index)
            return value[index] if value else 1000 * index + index * 7919 % 500

        last_not_above(noted, wanted, 0, size, end)
        return len(seen)

    even = [looks(None, 10**9, 10**12 * k // 101 + 12345, 10**12) for k in range(101)]
    assert max(even) <= 20 and sum(even) / len(even) < 12
    doubling = [2**index for index in range(1000)]
    assert max(looks(doubling, 1000, 2**k, 2**1000) for k in range(1000)) < 60
