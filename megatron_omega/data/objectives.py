"""Objectives on token arrays: a piece of a document -> an `Example` (encoder ids, decoder ids, labels).

Prefix language modelling, span corruption (T5, 1910.10683; its extreme forms after UL2, 2205.05131), masked prefix and,
without an encoder, plain causal language modelling. Everything is vectorised; randomness comes from the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.data.tokenizer import NUM_SENTINELS, SpecialIds

Kind = Literal["prefix", "span", "extreme", "mask", "causal", "pair", "shots"]
Ids = NDArray[np.int64]
SEPARATOR: Final = "\n\n"
"""Text between examples."""
MOST_SEPARATOR_TOKENS: Final = 2
"""Room between examples."""
_COUNT: Final = np.arange(NUM_SENTINELS)
_ALTERNATING: Final = np.arange(2 * NUM_SENTINELS + 1) % 2 == 1


@dataclass(frozen=True)
class Masking:
    """How a prefix is masked for the MLM head."""

    rate: float
    """Share of the prefix's tokens."""
    span_length: float
    """Mean length of a masked run, tokens."""
    mode: int
    """Token that opens a masked prefix."""


class Opening(NamedTuple):
    """How the decoder begins when it continues a prefix."""

    overlap: int
    """Last tokens of the prefix that it reads first; 0: the begin token."""
    is_asked: bool = False
    """Whether these are asked for too. The encoder shows them: they teach the decoder to look there."""


LAST_TOKEN: Final = Opening(1)


@dataclass(frozen=True)
class Example:
    """What the model sees of one piece of text, and what it has to answer.

    `decoder_ids[t]` predicts `labels[t]`. `mlm_labels` is None, or has one label for each encoder token.
    """

    kind: Kind
    encoder_ids: Ids
    decoder_ids: Ids
    labels: Ids
    mlm_labels: Ids | None = None


def causal_example(tokens: Ids, special: SpecialIds, *, is_end: bool) -> Example:
    """Continue from nothing, without an encoder."""
    labels = _with_end(tokens, special, is_end=is_end)
    return Example("causal", tokens[:0], _shifted(labels, special), labels)


def prefix_example(
    tokens: Ids, prefix: int, special: SpecialIds, *, is_end: bool, opening: Opening = LAST_TOKEN
) -> Example:
    """Read the first `prefix` tokens, continue with the rest."""
    encoder = _after(special.modes.prefix, tokens[:prefix])
    answer = _with_end(tokens[prefix:], special, is_end=is_end)
    return Example("prefix", encoder, *_continuation(tokens[:prefix], answer, special, opening))


def shots_example(
    tokens: Ids,
    prefix: int,
    shots: int,
    separator: Ids,
    special: SpecialIds,
    random: np.random.Generator,
    *,
    opening: Opening = LAST_TOKEN,
) -> Example:
    """Read `shots` parts of a text in any order, then the beginning of another part, and continue that one.

    All parts have the same length, but that the first takes what is left over; `prefix` tokens are read in all.
    """
    length = len(tokens) // (shots + 1)
    first = len(tokens) - shots * length
    parts = [tokens[:first], *np.split(tokens[first:], shots)]
    asked = 1 + int(random.integers(shots))
    others = [part for number, part in enumerate(parts) if number != asked]
    kept = prefix - (len(tokens) - length)
    read = [piece for number in random.permutation(shots) for piece in (others[number], separator)]
    shown = np.concatenate([*read, parts[asked][:kept]])
    spoken = _continuation(shown, parts[asked][kept:], special, opening)
    return Example("shots", _after(special.modes.prefix, shown), *spoken)


def pair_example(
    prompt: Ids, target: Ids, special: SpecialIds, *, is_end: bool, has_encoder: bool, opening: Opening = LAST_TOKEN
) -> Example:
    """Read `prompt`, answer `target`: labels are the target's alone. Without an encoder both are one text."""
    if has_encoder:
        example = prefix_example(np.concatenate((prompt, target)), len(prompt), special, is_end=is_end, opening=opening)
        return replace(example, kind="pair")
    whole = causal_example(np.concatenate((prompt, target)), special, is_end=is_end)
    labels = whole.labels.copy()
    labels[: len(prompt)] = IGNORED_LABEL
    return replace(whole, kind="pair", labels=labels)


def first_decoder_ids(prefix: Sequence[int] | Ids, special: SpecialIds, overlap: int) -> tuple[int, ...]:
    """Return what the decoder reads before it continues `prefix`: its last `overlap` tokens, fewer if it is shorter.

    The begin token where there is no prefix, or no overlap.
    """
    return tuple(map(int, prefix[max(0, len(prefix) - overlap) :])) or (special.bos,)


def _continuation(prefix: Ids, answer: Ids, special: SpecialIds, opening: Opening) -> tuple[Ids, Ids]:
    """Return decoder ids and labels: the end of a prefix as far as the decoder reads it, and the answer behind it."""
    first = np.asarray(first_decoder_ids(prefix, special, opening.overlap), dtype=np.int64)
    shown = first[1:] if opening.is_asked else np.full(len(first) - 1, IGNORED_LABEL)
    return np.concatenate((first, answer[:-1])), np.concatenate((shown, answer))


def masked_example(
    tokens: Ids,
    prefix: int,
    masking: Masking,
    special: SpecialIds,
    text_ids: Ids,
    random: np.random.Generator,
    *,
    is_end: bool,
    opening: Opening = LAST_TOKEN,
) -> Example:
    """As `prefix_example`, with a share of the prefix to be restored by the MLM head.

    Of the chosen runs of tokens 80% become masks, 10% random text tokens, 10% stay (BERT, 1810.04805). The decoder
    begins with the end of the prefix as it was.
    """
    encoder = _after(masking.mode, tokens[:prefix])
    chosen, run = _chosen(prefix, masking, random)
    mlm_labels = np.full(len(encoder), IGNORED_LABEL, dtype=np.int64)
    mlm_labels[chosen] = encoder[chosen]
    fate = random.random(len(chosen))[run]
    masked, replaced = chosen[fate < 0.8], chosen[fate >= 0.9]
    encoder[masked] = special.mask
    encoder[replaced] = text_ids[random.integers(len(text_ids), size=len(replaced))]
    answer = _with_end(tokens[prefix:], special, is_end=is_end)
    return Example("mask", encoder, *_continuation(tokens[:prefix], answer, special, opening), mlm_labels)


def _chosen(prefix: int, masking: Masking, random: np.random.Generator) -> tuple[Ids, Ids]:
    """Return the encoder's places to be masked, and for each the number of its run."""
    if not prefix:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    count = max(1, round(masking.rate * prefix))
    if masking.span_length == 1:
        return 1 + random.permutation(prefix)[:count], np.arange(count)
    spans = max(1, min(count, prefix - count, round(count / masking.span_length)))
    kept, runs = noise_runs(prefix, count, spans, random)
    is_chosen = np.repeat(np.arange(2 * spans + 1) % 2 == 1, _interleaved(kept, runs))
    return 1 + np.flatnonzero(is_chosen), np.repeat(np.arange(spans), runs)


def span_example(
    kind: Literal["span", "extreme"],
    tokens: Ids,
    noise: int,
    spans: int,
    special: SpecialIds,
    random: np.random.Generator,
) -> Example:
    """Replace `spans` spans of `noise` tokens in all by sentinels; the decoder tells what each stood for.

    The answer is sentinel 0, its span, sentinel 1, ..., and closes with the sentinel after the last.
    """
    kept, runs = noise_runs(len(tokens), noise, spans, random)
    mode = special.modes.span if kind == "span" else special.modes.extreme
    sentinels = np.asarray(special.sentinels[: spans + 1], dtype=np.int64)
    is_noise = np.repeat(_ALTERNATING[: 2 * spans + 1], _interleaved(kept, runs))
    encoder = _with_sentinels(tokens[~is_noise], np.cumsum(kept[:-1]), sentinels[:-1])
    labels = _with_sentinels(tokens[is_noise], np.cumsum(runs) - runs, sentinels)
    return Example(kind, _after(mode, encoder), _after(special.bos, labels[:-1]), labels)


def noise_runs(length: int, noise: int, spans: int, random: np.random.Generator) -> tuple[Ids, Ids]:
    """Draw the lengths of the kept runs [spans + 1] (the outer may be 0) and of the noise runs [spans], uniformly."""
    kept = _composition(length - noise + 2, spans + 1, random)
    kept[0] -= 1
    kept[-1] -= 1
    return kept, _composition(noise, spans, random)


def _interleaved(kept: Ids, runs: Ids) -> Ids:
    both = np.empty(len(kept) + len(runs), dtype=np.int64)
    both[0::2] = kept
    both[1::2] = runs
    return both


def _with_sentinels(tokens: Ids, places: Ids, sentinels: Ids) -> Ids:
    """Insert a sentinel before tokens `places[k]`, and one at the end where there is a sentinel more."""
    at = places + _COUNT[: len(places)]
    out = np.empty(len(tokens) + len(sentinels), dtype=np.int64)
    is_token = np.ones(len(out), dtype=np.bool_)
    is_token[at] = False
    out[at] = sentinels[: len(at)]
    if len(sentinels) > len(at):
        is_token[-1] = False
        out[-1] = sentinels[-1]
    out[is_token] = tokens
    return out


def restore(encoder: Ids, answer: Ids, special: SpecialIds) -> Ids:
    """Undo span corruption: put the spans of `answer` back in place of their sentinels."""
    sentinel_numbers = {number: place for place, number in enumerate(special.sentinels)}
    spans: dict[int, list[int]] = {}
    current = -1
    for token in answer.tolist():
        current = sentinel_numbers.get(token, current)
        if token not in sentinel_numbers:
            spans.setdefault(current, []).append(token)
    whole: list[int] = []
    for token in encoder.tolist():
        whole += spans[sentinel_numbers[token]] if token in sentinel_numbers else [token]
    return np.asarray(whole, dtype=np.int64)


def _composition(total: int, parts: int, random: np.random.Generator) -> Ids:
    """Write `total` as a sum of `parts` positive integers, uniformly."""
    bounds = np.empty(parts + 1, dtype=np.int64)
    cuts = random.permutation(total - 1)[: parts - 1]
    cuts.sort()
    bounds[0], bounds[1:-1], bounds[-1] = 0, cuts + 1, total
    return bounds[1:] - bounds[:-1]


def _with_end(tokens: Ids, special: SpecialIds, *, is_end: bool) -> Ids:
    return np.append(tokens, special.eos) if is_end else tokens


def _shifted(labels: Ids, special: SpecialIds) -> Ids:
    return _after(special.bos, labels[:-1])


def _after(first: int, rest: Ids) -> Ids:
    out = np.empty(len(rest) + 1, dtype=np.int64)
    out[0] = first
    out[1:] = rest
    return out
