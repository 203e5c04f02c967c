"""One text that grows: `generate`, which works with the scheduler, and `Continuation`, which says what it has to give.

A continuation reads ids with the layers as they are and keeps all that they have seen: no pages, no company, no few
operations. What the scheduler computes is tested against it and against the forward pass of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from megatron_omega.export.loading import TextModel
from megatron_omega.generation.encoder import encode
from megatron_omega.generation.prompts import prompt_ids
from megatron_omega.generation.requests import Limits, Request, Token
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.generation.texts import stream_text
from megatron_omega.model.attention_mix import LayerCache
from megatron_omega.model.layers import DecoderLayer, Head
from megatron_omega.model.omega import Omega, vocabulary_logits
from megatron_omega.model.stream import Continued

__all__ = ["Continuation", "encode", "generate", "stream_text"]

BLOCK_TOKENS = 256


class Continuation:
    """The decoder in the middle of one text."""

    def __init__(self, model: Omega, memory: Tensor | None) -> None:
        count = model.context.model.decoder_layers
        self._model = model
        self._memory = memory
        self._layers = [cast(DecoderLayer, model.module_named(f"decoder.layers.{index}")) for index in range(count)]
        self._caches = [LayerCache() for _ in self._layers]
        self._norm = cast(Head, model.module_named("head")).norm

    def read(self, ids: Sequence[int]) -> Tensor:
        """Read one or more tokens, in blocks; return the logits [vocab_size] of the one that follows."""
        assert ids, "there is nothing to read"
        hidden = torch.empty(0)
        for start in range(0, len(ids), BLOCK_TOKENS):
            hidden = self._extend(ids[start : start + BLOCK_TOKENS])
        return vocabulary_logits(self._model, self._norm(hidden[0, -1]))

    def _extend(self, ids: Sequence[int]) -> Tensor:
        """Run ids [t] after what was read -> hidden states [1, t, d]."""
        table = self._model.table
        hidden = table(torch.tensor([list(ids)], device=table.weight.device))
        new = Continued(self._caches[0].self_attention.length, len(ids), hidden.device)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            hidden = layer.extend(hidden, cache, new, self._memory)
        return hidden


def generate(
    text_model: TextModel, prompt: str, sampling: Sampling, *, max_new_tokens: int, seed: int
) -> Iterator[int]:
    """Yield the ids that continue `prompt`, one by one: ids of text, at last the end token if the text ends in time.

    Raises:
        ConfigError: max_new_tokens is less than 1.
        DataError: the prompt is longer than the model's learned positions.
    """
    encoder_ids, decoder_ids = prompt_ids(text_model, prompt)
    request = Request(encoder_ids, decoder_ids, max_new_tokens, sampling, seed=seed)
    scheduler = Scheduler(text_model, limits_for([request]))
    scheduler.submit(request)
    while not scheduler.idle:
        for event in scheduler.step():
            if isinstance(event, Token):
                yield event.id


def limits_for(requests: Sequence[Request], sequences: int = 1) -> Limits:
    """Return what is enough for `requests`, if so many texts grow at the same time (more, if one request has more)."""
    sequences = max([sequences, *(max(request.samples, request.beams) for request in requests)])
    page = 512  # more than any row of a grid: what is rounded up to pages has room
    longest = max(len(request.decoder_ids) + request.max_new_tokens + page for request in requests)
    memory = max(len(request.encoder_ids) for request in requests)
    return Limits(sequences, sequences * longest, max(1, sequences * memory), prefixes=0)
