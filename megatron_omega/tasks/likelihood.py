"""How probable given texts are: log p(continuation | context), in nats, of token ids. docs/likelihoods.md defines it.

    encoder-decoder   encoder: mode token, context    decoder: start, before, continuation without its last token
    decoder-only                                      decoder: begin, context, before, the same

The start is what generation begins with (`generation.prompts`). What is longer than the model's streams is scored in
windows: each token given as many of those before it as there is room for. Rows of a batch are alike in length, one
text each; what texts of a batch have in common is read once (`tasks.reading`). Batches do not depend on who computes
them, so any number of ranks finds the same figures, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_omega.data.objectives import first_decoder_ids
from megatron_omega.export.loading import TextModel
from megatron_omega.model.omega import vocabulary_logits
from megatron_omega.tasks.reading import Ids, Read, finished
from megatron_omega.tasks.sharing import ALONE, Share

_BATCH_TOKENS = 8192
"""Tokens that a model reads at once, with their padding."""
_CACHED_TOKENS = 2048
"""The same on a CPU, where what does not stay in its cache costs more than small products do."""
_LOGIT_ROWS = 1024
"""Tokens of which logits are held at once."""


class Asked(NamedTuple):
    """A continuation, what stands before it, and what the decoder reads (and does not predict) between both."""

    context: Ids
    continuation: Ids
    before: Ids = ()


class Likelihood(NamedTuple):
    """How probable a continuation is."""

    nats: float
    """log p of all of its tokens."""
    is_greedy: bool
    """Whether each token is the most probable one."""


class Room(NamedTuple):
    """Tokens of a text that the streams of a model take."""

    encoder: int
    """Beside the mode token; 0 without an encoder."""
    decoder: int


@dataclass
class Row:
    """What the decoder reads of a text, and all continuations that begin with it: they differ in their last token."""

    context: Ids
    before: Ids
    read: Ids
    last: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    """Number of each continuation."""


@torch.inference_mode()
def likelihoods(
    model: TextModel, asked: Sequence[Asked], share: Share = ALONE, batch_tokens: int | None = None
) -> list[Likelihood]:
    """Return the likelihood of every continuation, of one token or more each."""
    room = room_of(model)
    rows = _rows((number, part) for number, one in enumerate(asked) for part in windows(one, room))
    most = batch_tokens or tokens_together(model.device)
    batches = list(_batches(rows, has_encoder=room.encoder > 0, most_tokens=most))
    found = share.collect(batches, lambda mine: [_score(model, batch) for batch in mine])
    nats, greedy = [0.0] * len(asked), [True] * len(asked)
    for batch, scores in zip(batches, found, strict=True):
        for number, (value, is_best) in zip((n for row in batch for n in row.asked), scores, strict=True):
            nats[number] += value
            greedy[number] &= is_best
    return [Likelihood(*pair) for pair in zip(nats, greedy, strict=True)]


def tokens_together(device: torch.device) -> int:
    """Return how many tokens are best read at once."""
    return _CACHED_TOKENS if device.type == "cpu" else _BATCH_TOKENS


def room_of(model: TextModel) -> Room:
    """Return what the streams take: as much as in training, less what the decoder reads of the context again."""
    settings, data = model.config.model, model.config.data
    if settings.is_decoder_only:
        return Room(0, data.decoder_seq_length)
    return Room(data.encoder_seq_length - 1, max(1, data.decoder_seq_length - max(0, settings.resolved_overlap - 1)))


def windows(asked: Asked, room: Room) -> Iterator[Asked]:
    """Cut a continuation into what the decoder takes at once, each part behind as much of the text as fits.

    With an encoder a part fills the decoder, and what was before it stands in the encoder. Without one the parts after
    the first are half as long as the stream, so that every token sees half a stream or more.
    """
    context, continuation, before = asked
    assert continuation, "there is nothing to score"
    before = before[max(0, len(before) - room.decoder // 2) :]
    stream = room.decoder - len(before)
    text, at = context + continuation, len(context)
    while at < len(text):
        if room.encoder:
            stop, first = min(len(text), at + stream), max(0, at - room.encoder)
        else:
            stop = min(len(text), at + max(stream - at, stream // 2))
            first = max(0, stop - stream)
        yield Asked(text[first:at], text[at:stop], before)
        at = stop


def is_cut(asked: Asked, room: Room) -> bool:
    """Tell whether the first token to be scored does not see all that stands before it."""
    first = next(windows(asked, room))
    return len(first.context) < len(asked.context) or len(first.before) < len(asked.before)


def _rows(parts: Iterator[tuple[int, Asked]]) -> list[Row]:
    rows: dict[tuple[Ids, Ids, Ids], Row] = {}
    for number, (context, continuation, before) in parts:
        key = (context, before, continuation[:-1])
        row = rows.setdefault(key, Row(*key))
        row.last.append(continuation[-1])
        row.asked.append(number)
    return list(rows.values())


def _batches(rows: Sequence[Row], *, has_encoder: bool, most_tokens: int) -> Iterator[list[Row]]:
    """Put rows of like length together, those of one context beside each other; padding counts."""

    def lengths(row: Row) -> tuple[int, int]:
        decoder = len(row.before) + len(row.read) + 1
        return (len(row.context) + 1, decoder) if has_encoder else (0, len(row.context) + decoder)

    ordered = sorted(rows, key=lambda row: (lengths(row)[0], row.context if has_encoder else (), lengths(row)[1]))
    batch: list[Row] = []
    contexts: set[Ids] = set()
    longest = [0, 0]
    for row in reversed(ordered):
        size = [max(pair) for pair in zip(longest, lengths(row), strict=True)]
        together = contexts | {row.context} if has_encoder else contexts
        if batch and len(together) * size[0] + (len(batch) + 1) * size[1] > most_tokens:
            yield batch
            batch, together, size = [], {row.context} if has_encoder else set(), list(lengths(row))
        batch.append(row)
        contexts, longest = together, size
    if batch:
        yield batch


def _score(model: TextModel, batch: Sequence[Row]) -> list[tuple[float, bool]]:
    """Return log p and whether it is the greedy one, of every continuation of every row."""
    found: list[list[tuple[float, bool]]] = [[] for _ in batch]
    for numbers, hidden, firsts in finished(model, [_read(model, row) for row in batch]):
        rows = [batch[number] for number in numbers]
        for part in _chunks(rows):
            places = [(row, firsts[row] + step) for row in part for step in range(len(rows[row].read) + 1)]
            at, steps = torch.tensor(places, device=hidden.device).T
            picked = iter(_picked(vocabulary_logits(model.model, hidden[at, steps]), [rows[row] for row in part]))
            for row in part:
                found[numbers[row]] = [next(picked) for _ in rows[row].last]
    return [one for row in found for one in row]


def _read(model: TextModel, row: Row) -> Read:
    """Return what encoder and decoder read of a row."""
    special, settings = model.tokenizer.special, model.config.model
    if settings.is_decoder_only:
        return Read((), (special.bos, *row.context, *row.before, *row.read), len(row.context) + len(row.before))
    start = first_decoder_ids(row.context, special, settings.resolved_overlap)
    return Read(row.context, (*start, *row.before, *row.read), len(start) - 1 + len(row.before))


def _picked(logits: Tensor, rows: Sequence[Row]) -> list[tuple[float, bool]]:
    """Add up what logits [tokens, vocab_size], of all rows in their order, say of each continuation."""
    totals, best = logits.logsumexp(dim=-1), logits.argmax(dim=-1)
    places, tokens, counts, start = list[int](), list[int](), list[int](), 0
    for row in rows:
        for last in row.last:
            places += range(start, start + len(row.read) + 1)
            tokens += [*row.read, last]
            counts.append(len(row.read) + 1)
        start += len(row.read) + 1
    at, wanted = (torch.tensor(values, device=logits.device) for values in (places, tokens))
    nats = (logits[at, wanted] - totals[at]).double().cpu().split(counts)
    greedy = (best[at] == wanted).cpu().split(counts)
    return [(float(one.sum()), bool(other.all())) for one, other in zip(nats, greedy, strict=True)]


def _chunks(batch: Sequence[Row]) -> Iterator[list[int]]:
    """Yield numbers of rows that have about `_LOGIT_ROWS` tokens together."""
    rows: list[int] = []
    tokens = 0
    for number, row in enumerate(batch):
        if rows and tokens + len(row.read) + 1 > _LOGIT_ROWS:
            yield rows
            rows, tokens = [], 0
        rows.append(number)
        tokens += len(row.read) + 1
    yield rows
