"""Words that findings share: what would be legal instead."""

from __future__ import annotations

from collections.abc import Sequence


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, ascending."""
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def one_of(choices: Sequence[int | str]) -> str:
    """Return `1, 2 or 4`."""
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def nearest_multiples(number: int, unit: int) -> str:
    below = number // unit * unit
    return one_of([below, below + unit] if below else [unit])
