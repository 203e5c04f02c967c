"""Checksums of a shard by blocks: `{prefix}.sums` holds the XXH3-64 of every 64 KiB of .bin, then of .idx.

Blocks are small, so that reading a sample can check exactly what it reads; a damaged bit anywhere is found before it
is trained on, and the message says where it is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_omega.errors import DataError

BLOCK_BYTES = 1 << 16


def file_sums(path: Path) -> NDArray[np.uint64]:
    """Return the checksums of all blocks of a file, holding one block at a time."""
    with path.open("rb", buffering=16 * BLOCK_BYTES) as file:
        blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
        return np.fromiter((xxhash.xxh3_64_intdigest(block) for block in blocks), dtype=np.uint64)


def num_blocks(size: int) -> int:
    """Return the number of blocks of `size` bytes."""
    return -(-size // BLOCK_BYTES)


def block_range(start: int, stop: int) -> tuple[int, int]:
    """Return bytes start..stop widened to whole blocks."""
    return start // BLOCK_BYTES * BLOCK_BYTES, num_blocks(stop) * BLOCK_BYTES


class CheckedFile:
    """Checks the blocks of one mapped file against their sums, each once, when they are first read."""

    def __init__(self, path: str, data: memoryview, sums: NDArray[np.uint64]) -> None:
        self._path, self._data, self._sums = path, data, sums
        self._is_checked = bytearray(len(sums))

    def check(self, start: int, stop: int) -> None:
        """Raise DataError if a block that holds bytes start..stop is damaged."""
        for block in range(start // BLOCK_BYTES, num_blocks(stop)):
            if not self._is_checked[block]:
                self._check_block(block)

    def _check_block(self, block: int) -> None:
        start = block * BLOCK_BYTES
        if xxhash.xxh3_64_intdigest(self._data[start : start + BLOCK_BYTES]) != self._sums[block]:
            raise DataError(
                f"{self._path} is damaged between bytes {start} and {min(start + BLOCK_BYTES, len(self._data))} "
                "(checksum differs); restore the file or make the shard again"
            )
        self._is_checked[block] = 1
