"""What the encoder makes of prompts: the memory, and the keys and values that every decoder layer takes of it.

A prompt is encoded layer by layer, so that others can grow meanwhile. Several prompts can be packed into one stream, as
in training: each is a document of its own, and nothing is padded but to the next row of the axial grid.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from megatron_omega.data.tokenizer import SpecialIds
from megatron_omega.errors import ConfigError
from megatron_omega.export.loading import TextModel
from megatron_omega.model.layers import DecoderLayer, Head
from megatron_omega.model.omega import Omega
from megatron_omega.model.stream import PADDING, Stream

Work = Generator[int, None, Tensor]
"""Yields the tokens that went through one layer more; returns the memory."""


@dataclass(frozen=True)
class Memory:
    """What a prompt is to the decoder: keys and values [1, heads, s_e, head_dim] of every layer's cross-attention."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    tokens: int


def encode(model: Omega, ids: Sequence[int]) -> Tensor:
    """Return the memory [1, s, d] of one document."""
    return finish(encoding(model, [ids]))


def encoding(model: Omega, texts: Sequence[Sequence[int]]) -> Work:
    """Encode documents that are packed into one stream [1, s, d], one layer after the other."""
    ids, segments = _packed(texts, 1 if len(texts) == 1 else model.context.model.axial_width)
    tokens = torch.tensor([ids], device=model.table.weight.device)
    stream = Stream(torch.tensor([segments], device=tokens.device), model.context.kernels)
    hidden = model.module_named("embedding")(tokens)
    for index in range(model.context.model.encoder_layers):
        hidden = model.module_named(f"encoder.layers.{index}")(hidden, stream)
        yield len(ids)
    return model.module_named("bridge")(hidden)


def finish(work: Work) -> Tensor:
    """Do all of the work at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def _packed(texts: Sequence[Sequence[int]], multiple: int) -> tuple[list[int], list[int]]:
    """Return the ids and segments of documents that begin at multiples, padding between them."""
    ids: list[int] = []
    segments: list[int] = []
    for number, text in enumerate(texts, start=1):
        missing = -len(text) % multiple
        ids += [*text, *[0] * missing]
        segments += [number] * len(text) + [PADDING] * missing
    return ids, segments


def apart(model: Omega, memory: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return what each document has of a packed memory [1, s, d]: [s_i, d] each."""
    if len(lengths) == 1:
        return [memory[0]]
    width, start, found = model.context.model.axial_width, 0, []
    for length in lengths:
        found.append(memory[0, start : start + length])
        start += -(-length // width) * width
    return found


def project(model: Omega, memory: Tensor) -> Memory:
    """Return the keys and values of a memory [s, d]."""
    layers = []
    for index in range(model.context.model.decoder_layers):
        cross = cast(DecoderLayer, model.module_named(f"decoder.layers.{index}")).cross
        assert cross is not None, "a decoder-only model has no memory"
        keys, values = cross.project_memory(memory.unsqueeze(0))
        layers.append((keys.contiguous(), values.contiguous()))
    return Memory(tuple(layers), len(memory))


def groups(texts: Sequence[Sequence[int]], most_tokens: int) -> list[list[int]]:
    """Return the indices of texts that are encoded together: neighbours, of so many tokens at most, or one alone."""
    found: list[list[int]] = []
    room = 0
    for index, text in enumerate(texts):
        if not found or len(text) > room:
            found.append([])
            room = most_tokens
        found[-1].append(index)
        room -= len(text)
    return found


@torch.inference_mode()
def memories(model: Omega, texts: Sequence[Sequence[int]], most_tokens: int) -> list[Tensor]:
    """Return the memory [s_i, d] of each text; as many tokens as said are encoded together."""
    found: list[Tensor] = []
    for group in groups(texts, most_tokens):
        together = [texts[index] for index in group]
        found += apart(model, finish(encoding(model, together)), [len(text) for text in together])
    return found


@torch.inference_mode()
def embed(model: Omega, texts: Sequence[Sequence[int]], most_tokens: int) -> Tensor:
    """Return the mean of each text's memory, [texts, d] in fp32."""
    return torch.stack([memory.float().mean(dim=0) for memory in memories(model, texts, most_tokens)])


@torch.inference_mode()
def fill(model: Omega, special: SpecialIds, texts: Sequence[Sequence[int]], most_tokens: int) -> list[Tensor]:
    """Return the logits [masks, vocab_size] of what stands at each text's masks, by the MLM head."""
    head = cast(Head, model.module_named("head"))
    found = []
    for ids, memory in zip(texts, memories(model, texts, most_tokens), strict=True):
        places = [place for place, number in enumerate(ids) if number == special.mask]
        found.append(_masked_logits(model, head, head.transform(memory[places])))
    return found


def _masked_logits(model: Omega, head: Head, hidden: Tensor) -> Tensor:
    """[masks, d] -> fp32 [masks, vocab_size], equal on all tensor-parallel ranks."""
    settings, parallel, table = model.context.model, model.context.parallel, model.table
    mine = (hidden @ table.weight.t()).float() * settings.logit_multiplier + head.output_bias.float()
    if parallel.size > 1:
        whole = mine.new_zeros(len(mine), settings.padded_vocab_size)
        whole[:, table.start : table.stop] = mine
        mine = parallel.all_reduce(whole)
    return mine[:, : settings.vocab_size]


def require_mlm_head(text_model: TextModel) -> None:
    """Raise ConfigError if a model cannot fill masks."""
    model = text_model.config.model
    if not model.has_mlm_head:
        reason = "is decoder-only" if model.is_decoder_only else "was built with model.mlm_head: false"
        raise ConfigError(f"{text_model.path} has no MLM head (the model {reason}); use megatron-omega generate")
