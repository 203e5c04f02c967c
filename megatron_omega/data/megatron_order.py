"""The sample order of megatron-core's GPTDataset, bit for bit: `data.order: megatron`.

Documents of all epochs are shuffled by numpy's RandomState, laid end to end, cut every `seq_length` tokens, and the
cuts are shuffled again; the last epoch is kept apart where less than 80% of it is needed. Unlike the flat order it
takes time and memory that grow with the corpus (12 bytes a document, 4 or 8 a sample) and the length of the run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_omega.data.indexed import IndexedShard
from megatron_omega.data.windows import Span, WindowShape
from megatron_omega.errors import DataError

_SEPARATE_BELOW = 0.80


class MegatronWindows:
    """Samples of `seq_length` + 1 tokens; each begins with the last token of the one before it in the shuffled stream.

    The shuffle of documents and cuts depends on `seed`; `num_samples` is how many the whole run draws.
    """

    def __init__(
        self,
        shard: IndexedShard,
        documents: range,
        *,
        seq_length: int,
        num_samples: int,
        seed: int,
        corpus: int,
        vocab_size: int,
        eos_id: int | None,
    ) -> None:
        if not shard.is_one_sequence_per_document:
            raise DataError(f"{shard.prefix} splits documents into sequences; data.order megatron needs one for each")
        self.shard, self.documents, self.shape = shard, documents, WindowShape(seq_length, 0)
        self._arguments = (seq_length, num_samples, seed, corpus, vocab_size, eos_id)
        lengths = shard.lengths()[documents.start : documents.stop]
        self._num_tokens = int(lengths.sum())
        self._order, self._cuts = _indices(len(documents), self._num_tokens, seq_length, num_samples, seed)
        self._ends = np.cumsum(lengths[self._order])

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.shard, self.documents, *self._arguments)

    def __len__(self) -> int:
        return len(self._cuts)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def take(self, ordinal: int, key: int) -> tuple[int, list[Span]]:
        """Return (lap over the whole order, spans) of a sample; the order is its own key."""
        seq_length = self._arguments[0]
        lap, place = divmod(ordinal, len(self))
        start = int(self._cuts[place]) * seq_length
        stop = start + seq_length + 1
        first = int(np.searchsorted(self._ends, start, side="right"))
        found: list[Span] = []
        while start < stop:
            document = self.documents.start + int(self._order[first])
            length = self.shard.start(document + 1) - self.shard.start(document)
            offset = start - (int(self._ends[first]) - length)
            kept = min(stop - start, length - offset)
            if kept:
                found += self._span(document, offset, kept, length)
            start, first = start + kept, first + 1
        return lap, found

    def ordinals_of(self, document: int, key: int, stop: int) -> list[int]:
        """Return, ascending, the samples before the `stop`-th that hold text of `document`."""
        seq_length = self._arguments[0]
        places = np.flatnonzero(self._order == document - self.documents.start)
        ends = self._ends[places]
        starts = ends - (self.shard.start(document + 1) - self.shard.start(document))
        cuts = [
            range((start - 1) // seq_length, (end - 1) // seq_length + 1)
            for start, end in zip(starts, ends, strict=True)
        ]
        wanted = np.asarray([max(0, int(cut)) for several in cuts for cut in several], dtype=np.int64)
        inside = np.flatnonzero(np.isin(self._cuts, wanted))
        laps = range(-(-stop // max(1, len(self))))
        return [ordinal for lap in laps for ordinal in (inside + lap * len(self)).tolist() if ordinal < stop]

    def _span(self, document: int, offset: int, kept: int, length: int) -> list[Span]:
        _, _, _, corpus, vocab_size, eos_id = self._arguments
        self.shard.check_index(document, document + 1)
        first = self.shard.start(document) + offset
        tokens = self.shard.ids(first, first + kept, vocab_size)
        is_end = offset + kept == length
        if is_end and eos_id is not None and tokens[-1] == eos_id:
            tokens = tokens[:-1]
        return [Span(corpus, document, offset, tokens, is_end)] if len(tokens) else []


def _rebuild(
    shard: IndexedShard,
    documents: range,
    seq_length: int,
    samples: int,
    seed: int,
    corpus: int,
    vocab: int,
    eos: int | None,
) -> MegatronWindows:
    return MegatronWindows(
        shard,
        documents,
        seq_length=seq_length,
        num_samples=samples,
        seed=seed,
        corpus=corpus,
        vocab_size=vocab,
        eos_id=eos,
    )


def _indices(
    documents: int, tokens: int, seq_length: int, num_samples: int, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.integer]]:
    """Return the order of documents over all epochs, and the order of the cuts."""
    per_epoch = (tokens - 1) // seq_length
    if per_epoch < 1:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    epochs = max(1, -(-(num_samples * seq_length + 1) // tokens))
    before_last = ((epochs - 1) * tokens - 1) // seq_length
    is_last_apart = epochs > 1 and num_samples - before_last < int(_SEPARATE_BELOW * per_epoch)
    total = (epochs * tokens - 1) // seq_length
    random = np.random.RandomState(seed)
    if is_last_apart:
        order = np.concatenate([_shuffled(documents, epochs - 1, random), _shuffled(documents, 1, random)])
    else:
        order = _shuffled(documents, epochs, random)
    kind = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    cuts = np.arange(total, dtype=kind)
    border = before_last if is_last_apart else total
    random.shuffle(cuts[:border])
    if is_last_apart:
        random.shuffle(cuts[border:])
    return order, cuts


def _shuffled(documents: int, epochs: int, random: np.random.RandomState) -> NDArray[np.int32]:
    order = np.tile(np.arange(documents, dtype=np.int32), epochs)
    random.shuffle(order)
    return order
