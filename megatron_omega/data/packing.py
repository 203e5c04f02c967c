"""Two streams filled from one window: which piece of text gets which objective, and where its prefix is cut.

Every example starts at a multiple of `width` in both streams. Span corruption is dealt first, to pieces in random
order, until the room kept for its sentinels is used; the other pieces become prefix examples. Then the prefixes are
moved together (one shift of their log-odds) until encoder and decoder both fit. Text that fits neither stream is
counted as lost, never dropped in silence. All of this is arithmetic on lengths; it sees no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Final, NamedTuple

import numpy as np

from megatron_omega.config.schema import ObjectiveConfig
from megatron_omega.data.objectives import MOST_SEPARATOR_TOKENS, Kind
from megatron_omega.data.tokenizer import NUM_SENTINELS

_MAX_SPANS: Final = NUM_SENTINELS - 1
_SMALLEST_SPAN_TEXT: Final = 32
_EXTREME_RATE: Final = 0.5
_EXTREME_MEAN: Final = 32.0
_STREAM_SHARE: Final = 0.75
_LEAST_SPANS_KEPT: Final = 0.7
_ODDS_REACH: Final = 12.0
_ODDS_STEPS: Final = 14
MOST_SHOTS: Final = 4
LEAST_SHOWN: Final = 12
"""Tokens of a part that is shown, at least."""
_LEAST_ANSWER: Final = 0.25
"""Share of a part that is to be said, at least; as much is always shown of it."""


class Budget(NamedTuple):
    """Room of one sample, in tokens."""

    encoder: int
    decoder: int
    width: int
    overlap: int = 1
    """Most tokens of a prefix that the decoder reads too."""

    def align(self, length: int) -> int:
        return -(-length // self.width) * self.width


class PieceLength(NamedTuple):
    """What planning needs to know of a span of a document."""

    tokens: int
    is_end: bool


@dataclass(slots=True)
class Slot:
    """One planned example: tokens start..stop of piece `piece`.

    `prefix` tokens go to the encoder (prefix kinds); `noise` tokens in `spans` spans to the decoder (span kinds).
    """

    piece: int
    start: int
    stop: int
    is_end: bool
    kind: Kind
    odds: float = 0.0
    """Log-odds of the drawn prefix fraction."""
    is_free: bool = True
    """Whether the prefix may be moved to fill the streams."""
    prefix: int = 0
    noise: int = 0
    spans: int = 0
    shots: int = 0
    """Pieces that the encoder reads before the one that is continued."""
    overlap: int = 1
    """Most tokens of the prefix that the decoder reads too."""
    encoder_at: int = 0
    decoder_at: int = 0

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def encoder_length(self) -> int:
        gaps = self.shots * MOST_SEPARATOR_TOKENS
        return 1 + (self.tokens - self.noise + self.spans if self.spans else self.prefix + gaps)

    @property
    def decoder_length(self) -> int:
        if self.spans:
            return self.noise + self.spans + 1
        again = min(self.prefix + self.shots * MOST_SEPARATOR_TOKENS, self.overlap) - 1
        return (again if again > 0 else 0) + self.stop - self.start - self.prefix + self.is_end

    @property
    def repeated(self) -> int:
        """Tokens that the decoder reads before the one that predicts its first label."""
        return 0 if self.spans else self.decoder_length - (self.tokens - self.prefix + self.is_end)

    def move(self, shift: float) -> None:
        """Put a free prefix at its drawn log-odds plus `shift`; at least one label remains."""
        if self.is_free:
            tokens = self.stop - self.start
            prefix = round(tokens / (1 + exp(-(self.odds + shift))))
            smallest = 1 if self.kind == "mask" and tokens > 1 else 0
            self.prefix = max(smallest, min(tokens - (not self.is_end), prefix))

    def free(self) -> None:
        """Become a prefix example."""
        self.kind, self.is_free, self.noise, self.spans, self.shots = "prefix", True, 0, 0, 0


@dataclass(frozen=True)
class Plan:
    """The slots of one sample, and the tokens that found no room."""

    slots: tuple[Slot, ...]
    lost_tokens: int


def plan_causal(pieces: Sequence[PieceLength], budget: Budget) -> Plan:
    """Put every piece into the decoder stream, one example each."""
    slots: list[Slot] = []
    place, lost = 0, 0
    for number, piece in enumerate(pieces):
        at = budget.align(place)
        kept = min(piece.tokens, budget.decoder - at)
        if kept <= 0:
            lost += piece.tokens
            continue
        is_end = piece.is_end and kept == piece.tokens and at + kept < budget.decoder
        slots.append(Slot(number, 0, kept, is_end, "causal", is_free=False, decoder_at=at))
        lost += piece.tokens - kept
        place = at + kept + is_end
    return Plan(tuple(slots), lost)


def plan_two_streams(
    pieces: Sequence[PieceLength], budget: Budget, objective: ObjectiveConfig, random: np.random.Generator
) -> Plan:
    """Give every piece an objective and cut prefixes so that both streams are full."""
    slots = _draw(pieces, budget, objective, random)
    while not _balance(slots, budget) and _relax(slots, budget):
        pass
    return _place(slots, budget)


def _relax(slots: Sequence[Slot], budget: Budget) -> bool:
    """Make room by fewer spans, or by turning a fixed example into a prefix example; tell whether there was one."""
    stiff = [slot for slot in slots if not slot.is_free]
    if not stiff:
        return False
    excess = sum(_excess(slots, budget, None))
    most = max(stiff, key=lambda slot: slot.spans)
    fewer = most.spans - max(1, (excess + 1) // 2)
    if excess > 0 and fewer > _LEAST_SPANS_KEPT * most.spans:
        most.spans = fewer
    else:
        max(stiff, key=lambda slot: slot.encoder_length + slot.decoder_length).free()
    return True


def span_overhead(objective: ObjectiveConfig) -> float:
    """Return the sentinels, in both streams together, that a token of the whole text costs on average."""
    weights = (objective.prefix_lm, objective.span_corruption, objective.masked_prefix, objective.in_context)
    if not objective.span_corruption:
        return 0.0
    rate, mean, extreme = objective.span_rate, objective.span_mean_length, objective.extreme_span_fraction
    plain = (1 - extreme) * rate / mean
    return (
        objective.span_corruption
        / sum(weights)
        * 2
        * (plain + extreme / 2 * (_EXTREME_RATE / mean + rate / _EXTREME_MEAN))
    )


def _draw(
    pieces: Sequence[PieceLength], budget: Budget, objective: ObjectiveConfig, random: np.random.Generator
) -> list[Slot]:
    slack = budget.encoder + budget.decoder - (len(pieces) - 1) * (budget.width - 1) - budget.width // 4
    slack -= sum(piece.tokens + 1 + piece.is_end for piece in pieces)
    draws: list[list[float]] = random.random((len(pieces), 5)).tolist()
    heads: dict[int, Slot] = {}
    if objective.span_corruption:
        for number in sorted(range(len(pieces)), key=lambda number: draws[number][0]):
            whole = Slot(number, 0, pieces[number].tokens, pieces[number].is_end, "prefix", overlap=budget.overlap)
            slack = _corrupt_some(whole, draws[number][1], budget, objective, slack)
            if whole.spans:
                heads[number] = whole
    slots: list[Slot] = []
    for number, piece in enumerate(pieces):
        head = heads.get(number)
        if head is not None:
            slots.append(head)
        if head is None or head.stop < piece.tokens:
            rest = Slot(number, head.stop if head else 0, piece.tokens, piece.is_end, "prefix", overlap=budget.overlap)
            slots += _prefixed(rest, draws[number][2:], budget, objective)
    return slots


def _prefixed(whole: Slot, draws: list[float], budget: Budget, objective: ObjectiveConfig) -> list[Slot]:
    """Make a masked, an open or an empty prefix of a piece; a long piece with an empty prefix is cut in two."""
    kind, form, odds = draws
    whole.odds = _log_odds(odds)
    total = objective.prefix_lm + objective.masked_prefix + objective.in_context
    if objective.in_context and kind * total >= total - objective.in_context:
        if _show(whole, form, odds, budget):
            return [whole]
    elif kind * total >= objective.prefix_lm and objective.masked_prefix:
        whole.kind = "mask"
        return [whole]
    if form >= objective.empty_prefix_fraction:
        return [whole]
    room = int(budget.decoder * _STREAM_SHARE)
    if whole.tokens <= room:
        whole.is_free = False
        return [whole]
    cut = whole.start + max(1, int(room * (1 + 2 * odds) / 3))
    empty = Slot(whole.piece, whole.start, cut, is_end=False, kind="prefix", is_free=False, overlap=budget.overlap)
    whole.start = cut
    return [empty, whole]


def _show(whole: Slot, form: float, odds: float, budget: Budget) -> bool:
    """Make an in-context example of a piece: equal parts of it, the last part of one is to be said; tell if it can be.

    The encoder takes most of it, so a piece that is longer than an encoder's share is none.
    """
    shots = min(1 + int(form * MOST_SHOTS), whole.tokens // LEAST_SHOWN - 1)
    if shots < 1 or whole.tokens > _STREAM_SHARE * budget.encoder:
        return False
    part = whole.tokens // (shots + 1)
    answer = max(1, round(part * (_LEAST_ANSWER + (1 - 2 * _LEAST_ANSWER) * odds)))
    whole.kind, whole.is_free, whole.is_end, whole.shots = "shots", False, False, shots
    whole.prefix = whole.tokens - answer
    return True


def _corrupt_some(whole: Slot, form: float, budget: Budget, objective: ObjectiveConfig, slack: int) -> int:
    """Corrupt as much of the piece as sentinels, streams and slack allow; return the slack that remains."""
    rate, mean, kind = objective.span_rate, objective.span_mean_length, "span"
    if form < objective.extreme_span_fraction:
        kind = "extreme"
        rate, mean = (_EXTREME_RATE, mean) if form < objective.extreme_span_fraction / 2 else (rate, _EXTREME_MEAN)
    density = rate / mean
    room = min(
        (_MAX_SPANS - 1) / density,
        (_STREAM_SHARE * budget.encoder - 1) / (1 - rate + density),
        (_STREAM_SHARE * budget.decoder - 2) / (rate + density),
    )
    cut_cost = 0
    if whole.tokens > min(room, (slack - 1) / (2 * density)):
        cut_cost = budget.width + 1
        room = min(room, (slack - 1 - cut_cost) / (2 * density))
    tokens = min(whole.tokens, int(room))
    if tokens < _SMALLEST_SPAN_TEXT:
        return slack
    whole.noise = min(tokens - 1, max(1, round(tokens * rate)))
    whole.spans = max(1, min(whole.noise, tokens - whole.noise, round(whole.noise / mean), _MAX_SPANS))
    whole.is_end = whole.is_end and tokens == whole.tokens
    whole.stop = whole.start + tokens
    whole.kind, whole.is_free = kind, False
    return slack - 2 * whole.spans - 1 - cut_cost


def _log_odds(fraction: float) -> float:
    fraction = min(1 - 1e-4, max(1e-4, fraction))
    return log(fraction / (1 - fraction))


def _excess(slots: Sequence[Slot], budget: Budget, shift: float | None) -> tuple[int, int]:
    """Move the prefixes (None: leave them) and return by how much encoder and decoder overflow (negative: room)."""
    width, encoder, decoder = budget.width, 0, 0
    for slot in slots:
        if shift is not None:
            slot.move(shift)
        encoder += -encoder % width + slot.encoder_length
        decoder += -decoder % width + slot.decoder_length
    return encoder - budget.encoder, decoder - budget.decoder


def _balance(slots: Sequence[Slot], budget: Budget) -> bool:
    """Move the prefixes so that both streams fit, as near to the drawn fractions as possible; tell whether they do.

    The larger the shift, the more text stands in the encoder. Where nothing fits, the encoder is left full.
    """
    encoder, decoder = _excess(slots, budget, 0.0)
    if encoder <= 0 and decoder <= 0:
        return True
    if encoder > 0:
        low, high = -_ODDS_REACH, 0.0
        if _excess(slots, budget, low)[0] > 0:
            return False
        for _ in range(_ODDS_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if _excess(slots, budget, middle)[0] <= 0 else (low, middle)
        return _excess(slots, budget, low)[1] <= 0
    low, high = 0.0, _ODDS_REACH
    if _excess(slots, budget, high)[1] <= 0:
        for _ in range(_ODDS_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if _excess(slots, budget, middle)[1] <= 0 else (middle, high)
    if _excess(slots, budget, high)[0] <= 0:
        return _excess(slots, budget, high)[1] <= 0
    low = 0.0
    for _ in range(_ODDS_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _excess(slots, budget, middle)[0] <= 0 else (low, middle)
    return _excess(slots, budget, low)[1] <= 0


def _place(slots: Sequence[Slot], budget: Budget) -> Plan:
    """Give every example its places; cut off what exceeds a stream."""
    placed: list[Slot] = []
    encoder, decoder, lost = 0, 0, 0
    for slot in slots:
        before = slot.tokens
        slot.encoder_at, slot.decoder_at = budget.align(encoder), budget.align(decoder)
        if _fit(slot, budget):
            placed.append(slot)
            lost += before - slot.tokens
            encoder, decoder = slot.encoder_at + slot.encoder_length, slot.decoder_at + slot.decoder_length
        else:
            lost += before
    return Plan(tuple(placed), lost)


def _fit(slot: Slot, budget: Budget) -> bool:
    """Shorten the slot to the room that is left; tell whether any is."""
    encoder, decoder = budget.encoder - slot.encoder_at, budget.decoder - slot.decoder_at
    if slot.encoder_length <= encoder and slot.decoder_length <= decoder:
        return True
    if encoder < 1 or decoder < 1:
        return False
    if slot.spans or slot.shots:
        slot.free()
    slot.prefix = min(slot.prefix, encoder - 1)
    if slot.decoder_length > decoder:
        slot.is_end = False
        slot.prefix = min(slot.prefix, decoder)  # one label at least behind what is read again
        slot.stop = slot.start + slot.prefix + min(decoder - slot.repeated, slot.tokens - slot.prefix)
        if slot.prefix == slot.tokens:
            slot.prefix -= 1
    return True
