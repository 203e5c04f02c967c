"""A model with the room for its texts: what all requests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_omega.export.loading import TextModel
from megatron_omega.generation.attending import Growing, Reading
from megatron_omega.generation.cache import Cache, Held
from megatron_omega.generation.decoder import Decoder, padded
from megatron_omega.generation.encoder import Memory
from megatron_omega.generation.matrices import Weigh, plain
from megatron_omega.generation.requests import Limits


class Row(NamedTuple):
    """The token that a text's decoder reads next."""

    id: int
    held: Held
    memory: Memory | None


class Following(NamedTuple):
    """What may follow texts, a row for each; on the CPU. Rows behind those of texts mean nothing."""

    logits: Tensor
    """The model's own [rows, vocab_size], in fp32."""
    totals: list[float]
    """A logit less its row's total is a log-probability."""
    permitted: Tensor
    """Logits [rows, vocab_size], -inf for ids that are neither text nor the end."""
    likeliest: list[int]
    """The ids of the largest permitted logits."""


class Engine:
    """Decoder, cache and tokenizer."""

    def __init__(self, text_model: TextModel, limits: Limits, weigh: Weigh = plain) -> None:
        self.text_model, self.limits = text_model, limits
        self.tokenizer = text_model.tokenizer
        model = text_model.model
        context = model.context
        width = context.model.axial_width
        prefixes = limits.prefixes if context.model.is_decoder_only else 0
        self.cache = Cache(
            context.model, context.local_heads, like=model.table.weight,
            pages=-(-limits.cache_tokens // width), slots=limits.sequences + prefixes,
        )  # fmt: skip
        self.decoder = Decoder(model, self.cache.parts, weigh)
        self.has_company = limits.sequences > 1
        self._allowed = self._penalty_of_others()

    @torch.inference_mode()
    def grow(self, rows: Sequence[Row]) -> Tensor:
        """Read one token of each text; return the logits of those that follow, with rows behind that mean nothing."""
        ids, positions = self._padded([row.id for row in rows]), self._padded([row.held.length for row in rows])
        attending = Growing(self.decoder, self.cache, [(row.held, row.memory) for row in rows], len(ids))
        hidden = self.decoder.run(ids, positions, attending)
        attending.end()
        return self.decoder.logits(hidden).cpu()

    def following(self, logits: Tensor) -> Following:
        """Return what is chosen from, for all texts at once: in as many rows as `grow` gave none feels the others."""
        permitted = logits + self._allowed
        return Following(logits, logits.logsumexp(dim=-1).tolist(), permitted, permitted.argmax(dim=-1).tolist())

    @torch.inference_mode()
    def read(self, ids: Sequence[int], held: Held, memory: Memory | None) -> Tensor:
        """Read the next tokens of one text; return their hidden states [tokens, d]."""
        positions = self._padded(range(held.length, held.length + len(ids)))
        attending = Reading(self.decoder, self.cache, (held, memory), len(ids), len(positions))
        hidden = self.decoder.run(self._padded(ids), positions, attending)
        attending.end()
        return hidden[: len(ids)]

    def allowed(self, end_ids: Sequence[int]) -> Tensor:
        """Return what is added to logits: 0 for ids that may be generated (text, the end, `end_ids`), else -inf."""
        if not end_ids:
            return self._allowed
        allowed = self._allowed.clone()
        allowed[list(end_ids)] = 0
        return allowed

    def _padded(self, rows: Sequence[int]) -> Sequence[int]:
        """Return the rows; where texts may have company, in a number at which none feels it."""
        return padded(rows) if self.has_company else rows

    def _penalty_of_others(self) -> Tensor:
        allowed = torch.full((self.text_model.config.model.vocab_size,), float("-inf"))
        allowed[[*self.tokenizer.text_ids, self.tokenizer.special.eos]] = 0
        return allowed
