"""Windows of a corpus: window k -> spans of documents, by a search of the memory-mapped pointers.

A sample is a window of fixed length on the concatenated corpus, where every document counts for its tokens plus a
constant `overhead` (what its specials and its alignment cost in a packed row): windows with many short documents hold
fewer tokens, so that the packed row is as full. Nothing is stored; opening takes the same time for any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_omega.data.indexed import IndexedShard
from megatron_omega.data.permutation import Permutation, derive_key
from megatron_omega.errors import DataError

_PROBES = 64


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one document."""

    corpus: int
    """Place of the corpus in the blend."""
    document: int
    """Number of the document in its shard."""
    offset: int
    """Tokens of the document before this span."""
    tokens: NDArray[np.int64]
    is_end: bool
    """Whether the document ends with this span (its stored end token, if any, is not among the tokens)."""


@dataclass(frozen=True)
class WindowShape:
    """How long a window is, and what a document costs in it beside its tokens."""

    tokens: int
    overhead: int


def split_documents(documents: int, weights: Sequence[float]) -> list[range]:
    """Cut range(documents) into consecutive parts of the given relative sizes."""
    total, cumulative, bounds = sum(weights), 0.0, [0]
    for weight in weights:
        cumulative += weight
        bounds.append(round(documents * cumulative / total))
    return [range(start, stop) for start, stop in pairwise(bounds)]


def probe_lengths(shard: IndexedShard, documents: range) -> list[int]:
    """Return the lengths of a few evenly spaced documents."""
    step = max(1, len(documents) // _PROBES)
    return [shard.start(document + 1) - shard.start(document) for document in documents[::step][:_PROBES]]


class WindowSource(Protocol):
    """Windows of one corpus, in some order."""

    shard: IndexedShard
    documents: range
    shape: WindowShape

    @property
    def num_tokens(self) -> int: ...

    def __len__(self) -> int: ...

    def take(self, ordinal: int, key: int) -> tuple[int, list[Span]]: ...

    def ordinals_of(self, document: int, key: int, stop: int) -> list[int]: ...


class Windows:
    """The windows of consecutive documents of one shard, shuffled anew every epoch."""

    def __init__(
        self,
        shard: IndexedShard,
        documents: range,
        shape: WindowShape,
        *,
        vocab_size: int,
        eos_id: int,
        corpus: int = 0,
    ) -> None:
        self.shard, self.documents, self.shape = shard, documents, shape
        self._corpus, self._eos_id, self._vocab_size = corpus, eos_id, vocab_size
        first_token = shard.start(documents.start) if len(shard) else 0
        self._origin = first_token + documents.start * shape.overhead
        self._length = self._virtual(documents.stop) if len(documents) else 0

    def __len__(self) -> int:
        """Windows of one epoch."""
        return self._length // self.shape.tokens

    @property
    def num_tokens(self) -> int:
        return self._length - len(self.documents) * self.shape.overhead

    def take(self, ordinal: int, key: int) -> tuple[int, list[Span]]:
        """Return (epoch, spans) of the `ordinal`-th sample in the order that `key` chooses; epochs roll over."""
        epoch, place = divmod(ordinal, len(self))
        permutation, shift = _epoch_order(len(self), self._length - len(self) * self.shape.tokens, key, epoch)
        return epoch, self.spans(shift + permutation[place] * self.shape.tokens)

    def ordinals_of(self, document: int, key: int, stop: int) -> list[int]:
        """Return, ascending, the samples before the `stop`-th that hold text of `document`."""
        if document not in self.documents or not len(self):
            return []
        begin, end = self._virtual(document), self._virtual(document + 1) - self.shape.overhead
        found: list[int] = []
        for epoch in range(-(-stop // len(self))):
            permutation, shift = _epoch_order(len(self), self._length - len(self) * self.shape.tokens, key, epoch)
            windows = range((begin - shift) // self.shape.tokens, (end - 1 - shift) // self.shape.tokens + 1)
            inside = [window for window in windows if 0 <= window < len(self)] if end > begin else []
            found += [epoch * len(self) + permutation.index(window) for window in inside]
        return sorted(ordinal for ordinal in found if ordinal < stop)

    def spans(self, start: int) -> list[Span]:
        """Return the document spans of the window that begins at virtual position `start`."""
        stop = start + self.shape.tokens
        document = self.shard.find_weighted(start + self._origin, self.shape.overhead, self.documents)
        first = document
        begin = self._virtual(document)
        pieces: list[tuple[int, int, int, bool]] = []
        while document < self.documents.stop and begin < stop:
            following = self._virtual(document + 1)
            length = following - begin - self.shape.overhead
            if length < 0:
                raise DataError(f"{self.shard.prefix}.idx is damaged near document {document}: pointers do not ascend")
            piece = max(0, start - begin), min(length, stop - begin)
            if piece[0] < piece[1]:
                pieces.append((document, *piece, piece[1] == length))
            document, begin = document + 1, following
        self.shard.check_index(first, document)
        return self._read(pieces)

    def _read(self, pieces: list[tuple[int, int, int, bool]]) -> list[Span]:
        """Read (document, start, stop, is its end) pieces that stand side by side in the shard."""
        if not pieces:
            return []
        start = self.shard.start(pieces[0][0]) + pieces[0][1]
        block = self.shard.ids(start, start + sum(stop - begin for _, begin, stop, _ in pieces), self._vocab_size)
        found: list[Span] = []
        place = 0
        for document, begin, stop, is_end in pieces:
            length = stop - begin
            tokens = block[place : place + length - (is_end and block[place + length - 1] == self._eos_id)]
            place += length
            if len(tokens):
                found.append(Span(self._corpus, document, begin, tokens, is_end))
        return found

    def _virtual(self, document: int) -> int:
        return self.shard.start(document) + document * self.shape.overhead - self._origin


@lru_cache(maxsize=64)
def _epoch_order(windows: int, spare: int, key: int, epoch: int) -> tuple[Permutation, int]:
    """Return the order of an epoch, and how far its windows are shifted into the spare tokens."""
    shift = derive_key(key, epoch, "shift") % (spare + 1)
    return Permutation(windows, derive_key(key, epoch, "order")), shift
