"""A text that grows: the encoder reads the prompt once, the decoder keeps keys and values of what it has seen.

encoder-decoder   encoder: mode token, prompt     decoder: the prompt's last token, then what is generated
decoder-only                                      decoder: begin, prompt, then what is generated

The decoder begins with the begin token after an empty prompt, and where the model was trained so (model.decoder_start).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from megatron_omega.config.schema import RunConfig
from megatron_omega.data.objectives import first_decoder_id
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import ConfigError, DataError
from megatron_omega.export.loading import TextModel
from megatron_omega.generation.sampling import Sampling, choose
from megatron_omega.log import get_logger
from megatron_omega.model.attention_mix import LayerCache
from megatron_omega.model.layers import DecoderLayer, Head
from megatron_omega.model.omega import Omega, vocabulary_logits
from megatron_omega.model.stream import Continued, Stream

BLOCK_TOKENS = 256
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"

logger = get_logger(__name__)


def encode(model: Omega, ids: Sequence[int]) -> Tensor:
    """Return the memory [1, s, d] of one document."""
    tokens = torch.tensor([list(ids)], device=model.table.weight.device)
    stream = Stream(torch.ones_like(tokens), model.context.kernels)
    hidden = model.module_named("embedding")(tokens)
    for index in range(model.context.model.encoder_layers):
        hidden = model.module_named(f"encoder.layers.{index}")(hidden, stream)
    return model.module_named("bridge")(hidden)


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


@torch.inference_mode()
def generate(
    text_model: TextModel, prompt: str, sampling: Sampling, *, max_new_tokens: int, seed: int
) -> Iterator[int]:
    """Yield the ids that continue `prompt`, one by one: ids of text, at last the end token if the text ends in time.

    Raises:
        DataError: the prompt is longer than the model's learned positions.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    model, config, tokenizer = text_model.model, text_model.config, text_model.tokenizer
    special = tokenizer.special
    text = tokenizer.encode(prompt)
    if config.model.is_decoder_only:
        memory, start = None, [special.bos, *text]
    else:
        encoder_ids = [special.modes.prefix, *text]
        check_length(encoder_ids, config, "encoder")
        start = [first_decoder_id(text, special, config.model.decoder_start)]
        memory = encode(model, encoder_ids)
    check_length(start, config, "decoder")
    allowed = _allowed_ids(text_model)
    generator = torch.Generator().manual_seed(seed)
    continuation = Continuation(model, memory)
    new = start
    for _ in range(_room(config, len(start), max_new_tokens)):
        logits = continuation.read(new)
        new = [int(allowed[choose(logits[allowed], sampling, generator)])]
        yield new[0]
        if new[0] == special.eos:
            return


def _allowed_ids(text_model: TextModel) -> Tensor:
    """Return the ids that may be generated: those of text, and the end."""
    tokenizer = text_model.tokenizer
    return torch.tensor([*tokenizer.text_ids, tokenizer.special.eos], device=text_model.device)


def _room(config: RunConfig, start: int, wanted: int) -> int:
    """Return how many tokens may follow `start` ones; the last one is not read any more."""
    trained = config.data.decoder_seq_length + 1 - start
    if wanted <= trained:
        return wanted
    if config.model.positions == "learned":
        logger.warning("at most %d tokens are generated: the model's learned positions end there", trained)
        return trained
    logger.warning(
        "the text may grow beyond %d tokens, the longest this model was trained on", config.data.decoder_seq_length
    )
    return wanted


def check_length(ids: Sequence[int], config: RunConfig, stack: str) -> None:
    """Refuse what is longer than learned positions; warn where it is longer than what the model was trained on."""
    longest = config.data.encoder_seq_length if stack == "encoder" else config.data.decoder_seq_length
    if len(ids) <= longest:
        return
    if config.model.positions == "learned":
        raise DataError(f"the text has {len(ids):,} tokens, the {stack}'s learned positions end at {longest:,}; cut it")
    logger.warning("the text has %d tokens, the %s was trained on at most %d", len(ids), stack, longest)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield text as its ids come. Together they are `tokenizer.decode` of all ids; no character comes in halves."""
    seen: list[int] = []
    shown = ""
    for number in ids:
        seen.append(number)
        text = tokenizer.decode(seen)
        if not text.endswith(_UNFINISHED) and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(seen)[len(shown) :]
    if rest:
        yield rest
