"""Checksums of weights in a few kernels, however many tensors they are.

A checksum is the sum of the bytes as 64-bit words, wrapped: one flipped bit always changes it, it is computed where the
weights are, and on a CPU it is twice as fast as xxh3. Copies are compared by sums made in the same way: of tensors of
the same shapes, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_WORD_BYTES = 8
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BUCKET_BYTES = 1 << 26


def checksum(tensor: Tensor) -> Tensor:
    """Return the checksum of a tensor: int64, 0-dim, on its device."""
    flat = tensor.detach().reshape(-1)
    size = flat.element_size()
    whole = flat.numel() * size // _WORD_BYTES * _WORD_BYTES // size
    head, tail = flat[:whole], flat[whole:]
    if head.storage_offset() * size % _WORD_BYTES:
        head = head.clone()  # words count from the first element, wherever it lies in memory
    total = head.view(torch.int64).sum()
    return total if whole == flat.numel() else total + tail.view(_WORDS[size]).sum(dtype=torch.int64)


def row_checksums(rows: Tensor) -> Tensor:
    """Return the checksum of each row of `rows` [count, elements], in one kernel: int64 [count].

    Rows that are no whole number of 64-bit words are summed by narrower ones, which a CPU is slow at.
    """
    width = rows.shape[1] * rows.element_size()
    offset = rows.storage_offset() * rows.element_size()
    word = next(bytes_ for bytes_ in (8, 4, 2, 1) if width % bytes_ == 0 and bytes_ >= rows.element_size())
    if offset % word:
        rows = rows.clone()
    return rows.detach().contiguous().view(_WORDS[word]).sum(dim=1, dtype=torch.int64)


def total_checksum(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tensor | None:
    """Return one checksum of many tensors (as `dtype`), small ones joined first; None for none of them.

    A kernel for each of a thousand gains and biases costs more than reading all of them.
    """
    total: Tensor | None = None
    for bucket in _buckets(tensors):
        joined = (
            bucket[0].detach() if len(bucket) == 1 else torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
        )
        value = checksum(joined if dtype is None else joined.to(dtype))
        total = value if total is None else total + value
    return total


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in their order, many at once where they are small. Cut by elements: casts are cut alike."""
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or filled + tensor.numel() > _BUCKET_BYTES // _WORD_BYTES):
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.numel()
    if bucket:
        yield bucket
