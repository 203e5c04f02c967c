"""What a model makes of rows of text, with each shared part read once.

The encoder reads each context once. Where several rows have one context (the choices of a question), the decoder reads
what they begin with once too, and each row goes on from there; that takes `DecoderLayer.extend`, whose masks are dense,
so rows without company, which may be long, go through the kernels of training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from megatron_omega.export.loading import TextModel
from megatron_omega.model.attention_mix import LayerCache
from megatron_omega.model.layers import DecoderLayer, Head
from megatron_omega.model.stream import Continued, Stream

Ids = tuple[int, ...]
_DECODER_TOKENS = 1024
"""Tokens that go on from openings at once, of rows alike in length: fewer are slower, more have more padding."""


class Read(NamedTuple):
    """What encoder and decoder read of one row."""

    context: Ids
    """Of the encoder, without its mode token; empty for a decoder-only model."""
    ids: Ids
    first: int
    """Place in `ids` from which the first label is predicted; what stands before it, other rows may begin with too."""


class Finished(NamedTuple):
    """The decoder's last hidden states of some rows."""

    rows: Sequence[int]
    hidden: Tensor
    """[rows, s, d]."""
    firsts: Sequence[int]
    """Place in `hidden` from which the first label of each row is predicted."""


class _Part(NamedTuple):
    """Rows that go on from their openings together."""

    rows: list[int]
    opening: Tensor
    """[rows]: number of the opening of each."""
    new: Continued


def finished(model: TextModel, reads: Sequence[Read]) -> Iterator[Finished]:
    """Run rows through the model; yield all of them, some at a time, in any order."""
    omega, everything = model.model, range(len(reads))
    firsts = [read.first for read in reads]
    if model.config.model.is_decoder_only:
        yield Finished(everything, omega.hidden(padded([read.ids for read in reads], model.device))[0], firsts)
        return
    places = {context: place for place, context in enumerate(dict.fromkeys(read.context for read in reads))}
    memory, segments = encoded(model, [(model.tokenizer.special.modes.prefix, *context) for context in places])
    memory_of = torch.tensor([places[read.context] for read in reads], device=model.device)
    if len(places) == len(reads):
        yield Finished(everything, _alone(model, reads, memory[memory_of], segments[memory_of]), firsts)
        return
    by_length: dict[int, list[int]] = defaultdict(list)
    for row, first in enumerate(firsts):
        by_length[first].append(row)
    for rows in by_length.values():
        yield from _from_openings(model, reads, rows, memory, segments, memory_of.tolist())


def _alone(model: TextModel, reads: Sequence[Read], memory: Tensor, memory_segments: Tensor) -> Tensor:
    """Return hidden states [rows, s, d] of rows with a memory each."""
    kernels = model.model.context.kernels
    ids, segments = padded([read.ids for read in reads], model.device)
    stream, memory_stream = Stream(segments, kernels), Stream(memory_segments, kernels)
    hidden = model.model.table(ids)
    for layer in _layers(model):
        hidden = layer(hidden, stream, memory, memory_stream)
    return _norm(model, hidden)


def _from_openings(
    model: TextModel, reads: Sequence[Read], rows: Sequence[int], memory: Tensor, segments: Tensor,
    memory_of: Sequence[int],
) -> Iterator[Finished]:  # fmt: skip
    """Read the openings of `rows`, all of one length, once; let each row go on from its own."""
    length, device, table = reads[rows[0]].first, model.device, model.model.table
    keys = {row: (memory_of[row], reads[row].ids[:length]) for row in rows}
    openings = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
    at = torch.tensor([place for place, _ in openings], device=device)
    read, mask = memory[at], segments[at, None, None] != 0
    opening = table(torch.tensor([ids for _, ids in openings], dtype=torch.long, device=device))
    parts, hidden = list[_Part](), list[Tensor]()
    for part in _alike(rows, reads):
        ids, _ = padded([reads[row].ids[length:] for row in part], device)
        mine = torch.tensor([openings[keys[row]] for row in part], device=device)
        parts.append(_Part(part, mine, Continued(length, ids.shape[1], device)))
        hidden.append(table(ids))
    start = Continued(0, length, device)
    for layer in _layers(model):
        assert layer.cross is not None, "a decoder with an encoder attends its memory"
        cache = LayerCache(memory_keys_values=layer.cross.project_memory(read))
        if length:
            opening = layer.extend(opening, cache, start, None, mask)
        hidden = [
            layer.extend(one, cache.of(part.opening), part.new, None, mask[part.opening])
            for one, part in zip(hidden, parts, strict=True)
        ]
    for one, part in zip(hidden, parts, strict=True):
        yield Finished(part.rows, _norm(model, one), [0] * len(part.rows))


def _alike(rows: Sequence[int], reads: Sequence[Read]) -> Iterator[list[int]]:
    """Part rows with openings of one length into such of like length, about `_DECODER_TOKENS` behind the openings."""
    part, most = list[int](), 0
    for row in sorted(rows, key=lambda row: -len(reads[row].ids)):
        if len(part) == most:
            if part:
                yield part
            part, most = [], max(1, _DECODER_TOKENS // (len(reads[row].ids) - reads[row].first))
        part.append(row)
    yield part


def _layers(model: TextModel) -> list[DecoderLayer]:
    count = model.config.model.decoder_layers
    return [cast(DecoderLayer, model.model.module_named(f"decoder.layers.{index}")) for index in range(count)]


def _norm(model: TextModel, hidden: Tensor) -> Tensor:
    return cast(Head, model.model.module_named("head")).norm(hidden)


def encoded(model: TextModel, texts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Return the memory [b, s, d] of texts (ids with their mode token), and its segments [b, s]."""
    omega = model.model
    ids, segments = padded(texts, model.device)
    stream = Stream(segments, omega.context.kernels)
    hidden = omega.module_named("embedding")(ids)
    for index in range(omega.context.model.encoder_layers):
        hidden = omega.module_named(f"encoder.layers.{index}")(hidden, stream)
    return omega.module_named("bridge")(hidden), segments


def padded(texts: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and segments [b, s] of one text a row, padded behind."""
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
    segments = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
    return ids, segments
