"""Samples and batches: fixed-size rows of integers, as the model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.data.objectives import Example, Kind

IntArray = NDArray[np.int64]
Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of b rows. Segment k > 0 is the same document in both streams; 0 is padding.

    Every example starts at a multiple of the model's axial width in both streams. `lm_labels[i, t]` is what
    `decoder_ids[i, t]` predicts; -100 is ignored. Decoder-only models get encoder arrays of width 0.
    """

    encoder_ids: IntArray  # [b, encoder_seq_length]
    encoder_segments: IntArray  # [b, encoder_seq_length]
    decoder_ids: IntArray  # [b, decoder_seq_length]
    decoder_segments: IntArray  # [b, decoder_seq_length]
    lm_labels: IntArray  # [b, decoder_seq_length]
    mlm_labels: IntArray  # [b, encoder_seq_length]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding, of both streams."""
        return int(np.count_nonzero(self.encoder_segments) + np.count_nonzero(self.decoder_segments))


@dataclass(frozen=True)
class Origin:
    """Where one example of a row came from."""

    segment: int
    kind: Kind
    corpus: int
    document: int
    offset: int
    """Tokens of the document before this example."""
    num_tokens: int
    """Source tokens of the example."""


@dataclass(frozen=True)
class Sample:
    """One row of a batch, and where its text came from."""

    index: int
    epoch: int
    row: Batch
    """A batch of one row."""
    origins: tuple[Origin, ...]
    lost_tokens: int
    """Tokens of the window that found no room."""


def pack_row(
    examples: Sequence[tuple[Example, int, int]], *, encoder_seq_length: int, decoder_seq_length: int, pad: int
) -> Batch:
    """Lay (example, place in the encoder, place in the decoder) into one row; the k-th becomes segment k + 1."""
    encoder = np.full((3, encoder_seq_length), [[pad], [0], [IGNORED_LABEL]], dtype=np.int64)
    decoder = np.full((3, decoder_seq_length), [[pad], [0], [IGNORED_LABEL]], dtype=np.int64)
    for segment, (example, encoder_at, decoder_at) in enumerate(examples, start=1):
        encoder_end = encoder_at + len(example.encoder_ids)
        encoder[0, encoder_at:encoder_end] = example.encoder_ids
        encoder[1, encoder_at:encoder_end] = segment
        if example.mlm_labels is not None:
            encoder[2, encoder_at:encoder_end] = example.mlm_labels
        decoder_end = decoder_at + len(example.decoder_ids)
        decoder[0, decoder_at:decoder_end] = example.decoder_ids
        decoder[1, decoder_at:decoder_end] = segment
        decoder[2, decoder_at:decoder_end] = example.labels
    return Batch(encoder[:1], encoder[1:2], decoder[:1], decoder[1:2], decoder[2:], encoder[2:])


def stack(rows: Sequence[Batch]) -> Batch:
    """Join rows to one batch."""
    return Batch(*(np.concatenate([getattr(row, name) for row in rows]) for name in Batch.__dataclass_fields__))
