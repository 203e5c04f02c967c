"""Two streams filled from one window: which piece of text gets which objective, and where its prefix is cut.

Every example starts at a multiple of `width` in both streams. The objectives are drawn by weight; then the prefixes of
prefix examples are moved together (one shift of their log-odds) until encoder and decoder both fit. Text that fits
neither stream is counted as lost, never dropped in silence. All of this is arithmetic on lengths: it sees no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log
from typing import Final, NamedTuple

import numpy as np

from megatron_omega.config.schema import ObjectiveConfig
from megatron_omega.data.objectives import Kind
from megatron_omega.data.tokenizer import NUM_SENTINELS

_MAX_SPANS: Final = NUM_SENTINELS - 1
_SMALLEST_SPAN_TEXT: Final = 16
_EXTREME_RATE: Final = 0.5
_EXTREME_MEAN: Final = 32.0
_STREAM_SHARE: Final = 0.75
_ODDS_REACH: Final = 12.0
_ODDS_STEPS: Final = 14


class Budget(NamedTuple):
    """Room of one sample, in tokens."""

    encoder: int
    decoder: int
    width: int

    def align(self, length: int) -> int:
        return -(-length // self.width) * self.width


class PieceLength(NamedTuple):
    """What planning needs to know of a span of a document."""

    tokens: int
    is_end: bool


@dataclass(frozen=True)
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
    encoder_at: int = 0
    decoder_at: int = 0

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def encoder_length(self) -> int:
        return 1 + (self.tokens - self.noise + self.spans if self.spans else self.prefix)

    @property
    def decoder_length(self) -> int:
        return self.noise + self.spans + 1 if self.spans else self.tokens - self.prefix + self.is_end

    def with_odds(self, shift: float) -> Slot:
        """Return the slot with its prefix at its drawn log-odds plus `shift`; at least one label remains."""
        if not self.is_free:
            return self
        fraction = 1 / (1 + exp(-(self.odds + shift)))
        smallest = 1 if self.kind == "mask" and self.tokens > 1 else 0
        largest = self.tokens - (0 if self.is_end else 1)
        return replace(self, prefix=max(smallest, min(largest, round(fraction * self.tokens))))


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
    """Draw an objective for every piece and cut prefixes so that both streams are full."""
    slots = _draw(pieces, budget, objective, random)
    while True:
        fitted = _balance(slots, budget)
        if fitted is not None:
            return _place(fitted, budget)
        stiff = [slot for slot in slots if not slot.is_free]
        if not stiff:
            return _place(_balance_anyhow(slots, budget), budget)
        largest = max(stiff, key=lambda slot: slot.encoder_length + slot.decoder_length)
        slots[slots.index(largest)] = _freed(largest)


def _draw(
    pieces: Sequence[PieceLength], budget: Budget, objective: ObjectiveConfig, random: np.random.Generator
) -> list[Slot]:
    slack = budget.encoder + budget.decoder - (len(pieces) - 1) * (budget.width - 1)
    slack -= sum(piece.tokens + 1 + piece.is_end for piece in pieces)
    slots: list[Slot] = []
    draws = random.random((len(pieces), 4))
    for number, (piece, (kind, form, odds, last)) in enumerate(zip(pieces, draws.tolist(), strict=True)):
        whole = Slot(number, 0, piece.tokens, piece.is_end, "prefix", odds=_log_odds(odds))
        first = _assign(whole, _choose(objective, kind), (form, last), budget, objective, slack)
        slots.append(first)
        slack -= 2 * first.spans
        if first.stop < piece.tokens:
            slots.append(replace(whole, start=first.stop, odds=_log_odds(last)))
            slack -= budget.width + 1
    return slots


def _choose(objective: ObjectiveConfig, draw: float) -> Kind:
    weights = (objective.prefix_lm, objective.span_corruption, objective.masked_prefix)
    draw *= sum(weights) or 1.0
    if draw < weights[0] or not any(weights):
        return "prefix"
    return "span" if draw < weights[0] + weights[1] else "mask"


def _assign(
    whole: Slot, kind: Kind, draws: tuple[float, float], budget: Budget, objective: ObjectiveConfig, slack: int
) -> Slot:
    form, size = draws
    if kind == "span":
        return _corrupted(whole, form, budget, objective, slack)
    if kind == "prefix" and form < objective.empty_prefix_fraction:
        room = int(budget.decoder * _STREAM_SHARE)
        if whole.tokens <= room:
            return replace(whole, is_free=False)
        cut = max(1, int(room * (1 + 2 * size) / 3))
        return replace(whole, stop=cut, is_end=False, is_free=False)
    return replace(whole, kind=kind)


def _corrupted(whole: Slot, form: float, budget: Budget, objective: ObjectiveConfig, slack: int) -> Slot:
    """Corrupt as much of the piece as sentinels, streams and the room for sentinels allow; the rest becomes prefix text."""
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
    by_slack = (slack - 1) / (2 * density)
    if whole.tokens > min(room, by_slack):
        room = min(room, (slack - budget.width - 2) / (2 * density))
    tokens = min(whole.tokens, int(room))
    if tokens < _SMALLEST_SPAN_TEXT:
        return whole
    noise = min(tokens - 1, max(1, round(tokens * rate)))
    spans = max(1, min(noise, tokens - noise, round(noise / mean), _MAX_SPANS))
    is_whole = tokens == whole.tokens
    return replace(
        whole,
        stop=whole.start + tokens,
        is_end=whole.is_end and is_whole,
        kind=kind,
        is_free=False,
        noise=noise,
        spans=spans,
    )


def _freed(slot: Slot) -> Slot:
    return replace(slot, kind="prefix", is_free=True, noise=0, spans=0)


def _log_odds(fraction: float) -> float:
    fraction = min(1 - 1e-4, max(1e-4, fraction))
    return log(fraction / (1 - fraction))


def _encoder_total(slots: Sequence[Slot], budget: Budget) -> int:
    return sum(budget.align(slot.encoder_length) for slot in slots[:-1]) + slots[-1].encoder_length if slots else 0


def _decoder_total(slots: Sequence[Slot], budget: Budget) -> int:
    return sum(budget.align(slot.decoder_length) for slot in slots[:-1]) + slots[-1].decoder_length if slots else 0


def _moved(slots: Sequence[Slot], shift: float) -> list[Slot]:
    return [slot.with_odds(shift) for slot in slots]


def _largest_shift(slots: Sequence[Slot], budget: Budget) -> float | None:
    """Return the largest shift at which the encoder still fits, by bisection; None where none does."""
    low, high = -_ODDS_REACH, _ODDS_REACH
    if _encoder_total(_moved(slots, low), budget) > budget.encoder:
        return None
    if _encoder_total(_moved(slots, high), budget) <= budget.encoder:
        return high
    for _ in range(_ODDS_STEPS):
        middle = (low + high) / 2
        fits = _encoder_total(_moved(slots, middle), budget) <= budget.encoder
        low, high = (middle, high) if fits else (low, middle)
    return low


def _smallest_shift(slots: Sequence[Slot], budget: Budget, largest: float) -> float | None:
    """Return the smallest shift at which the decoder fits, up to `largest`; None where none does."""
    low, high = -_ODDS_REACH, largest
    if _decoder_total(_moved(slots, high), budget) > budget.decoder:
        return None
    if _decoder_total(_moved(slots, low), budget) <= budget.decoder:
        return low
    for _ in range(_ODDS_STEPS):
        middle = (low + high) / 2
        fits = _decoder_total(_moved(slots, middle), budget) <= budget.decoder
        low, high = (low, middle) if fits else (middle, high)
    return high


def _balance(slots: Sequence[Slot], budget: Budget) -> list[Slot] | None:
    """Cut the prefixes where both streams fit, as near to the drawn fractions as that allows; None where nothing fits."""
    drawn = _moved(slots, 0.0)
    if _encoder_total(drawn, budget) <= budget.encoder and _decoder_total(drawn, budget) <= budget.decoder:
        return drawn
    largest = _largest_shift(slots, budget)
    if largest is None:
        return None
    smallest = _smallest_shift(slots, budget, largest)
    if smallest is None:
        return None
    return _moved(slots, min(max(0.0, smallest), largest))


def _balance_anyhow(slots: Sequence[Slot], budget: Budget) -> list[Slot]:
    largest = _largest_shift(slots, budget)
    return _moved(slots, -_ODDS_REACH if largest is None else largest)


def _place(slots: Sequence[Slot], budget: Budget) -> Plan:
    """Give every example its places; cut off what exceeds a stream."""
    placed: list[Slot] = []
    encoder, decoder, lost = 0, 0, 0
    for slot in slots:
        at = replace(slot, encoder_at=budget.align(encoder), decoder_at=budget.align(decoder))
        fitted = _fitted(at, budget)
        lost += slot.tokens - (fitted.tokens if fitted else 0)
        if fitted:
            placed.append(fitted)
            encoder, decoder = at.encoder_at + fitted.encoder_length, at.decoder_at + fitted.decoder_length
    return Plan(tuple(placed), lost)


def _fitted(slot: Slot, budget: Budget) -> Slot | None:
    encoder, decoder = budget.encoder - slot.encoder_at, budget.decoder - slot.decoder_at
    if slot.encoder_length <= encoder and slot.decoder_length <= decoder:
        return slot
    if encoder < 1 or decoder < 1:
        return None
    slot = _freed(slot) if slot.spans else slot
    prefix = min(slot.prefix, encoder - 1)
    if prefix + decoder >= slot.tokens + slot.is_end:
        return replace(slot, prefix=prefix)
    stop = min(slot.tokens, prefix + decoder)
    return replace(slot, stop=slot.start + stop, prefix=min(prefix, stop - 1), is_end=False)
