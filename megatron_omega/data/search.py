"""Search in values that ascend about evenly, such as the places of documents in a shard.

A bisection of 10^9 documents reads 30 places, most of them on pages that nothing else needs. Guessing by proportion
reads a handful, near the goal; where the guesses are bad (very uneven documents) it degrades to doubling and halving.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from math import isqrt

_FEW = 16


def last_not_above(value: Callable[[int], int], wanted: int, first: int, stop: int, end: int) -> int:
    """Return the last index of [first, stop) with value(index) <= wanted, by some calls of `value`.

    `value` does not descend, value(first) <= wanted, and `end` is no less than any value. Raises nothing: where values
    do descend, the result is some index.
    """
    low, high = first, stop  # value(low) <= wanted < value(high), or high is the end
    at_low, at_high = value(first), end
    while high - low > _FEW and at_low < at_high:
        guess = low + (high - low) * (wanted - at_low) // (at_high - at_low)
        guess, step = min(max(guess, low + 1), high - 1), isqrt(high - low)
        at_guess = value(guess)
        if at_guess <= wanted:
            low, at_low = guess, at_guess
            while low + step < high:
                at_next = value(low + step)
                if at_next > wanted:
                    high, at_high = low + step, at_next
                    break
                low, at_low, step = low + step, at_next, 2 * step
        else:
            high, at_high = guess, at_guess
            while high - step > low:
                at_next = value(high - step)
                if at_next <= wanted:
                    low, at_low = high - step, at_next
                    break
                high, at_high, step = high - step, at_next, 2 * step
    return low + bisect_right(range(low + 1, high), wanted, key=value)
