"""Stateless shuffles: a keyed bijection of range(n), computed per element, never stored.

A generalised Feistel network on pairs (left, right) of Z_a x Z_b with a·b just above n; results outside range(n) are
walked back in (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_ROUNDS = 4
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def derive_key(*parts: int | str) -> int:
    """Return 64 bits that depend on every part and their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MULTIPLIER_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIER_2) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A bijection of range(size), chosen by `key`."""

    def __init__(self, size: int, key: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, not {size}")
        self.size = size
        self._rows = isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._keys = [_mix((key + (number + 1) * 0x9E3779B97F4A7C15) & _MASK) for number in range(2 * _ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        """Return where `index` goes."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside a permutation of {self.size}")
        rows, columns, keys = self._rows, self._columns, self._keys
        while True:
            left, right = divmod(index, columns)
            for number in range(0, 2 * _ROUNDS, 2):
                left = (left + _mix((right + keys[number]) & _MASK)) % rows
                right = (right + _mix((left + keys[number + 1]) & _MASK)) % columns
            index = left * columns + right
            if index < self.size:
                return index

    def index(self, value: int) -> int:
        """Return which index goes to `value`."""
        if not 0 <= value < self.size:
            raise IndexError(f"{value} is outside a permutation of {self.size}")
        rows, columns, keys = self._rows, self._columns, self._keys
        while True:
            left, right = divmod(value, columns)
            for number in range(2 * _ROUNDS - 2, -1, -2):
                right = (right - _mix((left + keys[number + 1]) & _MASK)) % columns
                left = (left - _mix((right + keys[number]) & _MASK)) % rows
            value = left * columns + right
            if value < self.size:
                return value

    def many(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return where every one of `indices` goes."""
        values = np.asarray(indices).astype(np.uint64)
        outside = np.arange(len(values))
        while len(outside):
            moved = self._step(values[outside])
            values[outside] = moved
            outside = outside[moved >= np.uint64(self.size)]
        return values.astype(np.int64)

    def _step(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        keys = np.asarray(self._keys, dtype=np.uint64)
        left, right = values // columns, values % columns
        for number in range(0, 2 * _ROUNDS, 2):
            left = (left + _mix_array(right + keys[number]) % rows) % rows
            right = (right + _mix_array(left + keys[number + 1]) % columns) % columns
        return left * columns + right
