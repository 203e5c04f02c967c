"""Predict masked tokens with the encoder and its MLM head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_omega.data.tokenizer import MASK_PIECE, Tokenizer
from megatron_omega.errors import ConfigError, DataError
from megatron_omega.export.loading import TextModel
from megatron_omega.generation.encoder import fill, require_mlm_head
from megatron_omega.generation.prompts import check_length

_TOGETHER = 1024  # tokens that go through the encoder at the same time
_MASK = re.compile(rf" ?(?:{re.escape(MASK_PIECE)}|\[MASK\])")


@dataclass(frozen=True)
class Candidate:
    """One piece that may replace a mask."""

    piece: str
    token_id: int
    probability: float


@dataclass(frozen=True)
class Filled:
    """The answer for one text: the candidates of each mask, the most probable first, and the text with the first."""

    text: str
    masks: tuple[tuple[Candidate, ...], ...]


def fill_mask(text_model: TextModel, text: str, *, top_k: int = 5) -> Filled:
    """Fill every <mask> or [MASK] of `text` on its own; see `fill_masks`."""
    return fill_masks(text_model, [text], top_k=top_k)[0]


def fill_masks(text_model: TextModel, texts: Sequence[str], *, top_k: int = 5) -> list[Filled]:
    """Fill every <mask> or [MASK] of each text on its own; texts are encoded together.

    A space before a mask belongs to what is masked, since pieces begin with their space.

    Raises:
        ConfigError: the model has no MLM head.
        DataError: a text has no mask, or is longer than the model's learned positions.
    """
    config, tokenizer = text_model.config, text_model.tokenizer
    require_mlm_head(text_model)
    if top_k < 1:
        raise ConfigError(f"top_k={top_k} must be 1 or more")
    special = tokenizer.special
    mode = special.modes.prefix if config.model.shared_mode_token else special.modes.mask
    asked = [[mode, *masked_ids(tokenizer, text)] for text in texts]
    for ids in asked:
        check_length(ids, config, "encoder")
    found = fill(text_model.model, special, asked, _TOGETHER)
    return [
        _filled(tokenizer, ids, logits.softmax(dim=-1).cpu(), top_k) for ids, logits in zip(asked, found, strict=True)
    ]


def _filled(tokenizer: Tokenizer, ids: list[int], found: torch.Tensor, top_k: int) -> Filled:
    masks = tuple(_best(tokenizer, row, top_k) for row in found)
    places = [place for place, number in enumerate(ids) if number == tokenizer.special.mask]
    for place, candidates in zip(places, masks, strict=True):
        ids[place] = candidates[0].token_id
    return Filled(tokenizer.decode(ids), masks)


def masked_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of `text` with the mask's in the place of each <mask> or [MASK]."""
    first, *rest = _MASK.split(text)
    if not rest:
        raise DataError(f"the text has no mask; write {MASK_PIECE} or [MASK] where a piece is to be found")
    ids = tokenizer.encode(first)
    for part in rest:
        ids += [tokenizer.special.mask, *tokenizer.encode(part)]
    return ids


def _best(tokenizer: Tokenizer, probabilities: torch.Tensor, top_k: int) -> tuple[Candidate, ...]:
    text_ids = torch.tensor(tokenizer.text_ids)
    best = probabilities[text_ids].topk(min(top_k, len(text_ids)))
    return tuple(
        Candidate(tokenizer.decode([number]), number, probability)
        for number, probability in zip(text_ids[best.indices].tolist(), best.values.tolist(), strict=True)
    )
