"""The stacks of GPT-Omega for Transformers: encoder, decoder, and both on one token table. No heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, Seq2SeqModelOutput

from .configuration_gpt_omega import GPTOmegaConfig
from .layers_gpt_omega import (
    GPTOmegaCrossAttention,
    GPTOmegaInputPositions,
    GPTOmegaLayer,
    GPTOmegaMaskedHead,
    GPTOmegaRMSNorm,
    GPTOmegaSelfAttention,
)
from .sight_gpt_omega import Sight, look, text_positions

IGNORED = -100


class GPTOmegaPreTrainedModel(PreTrainedModel):
    """What all classes share: how they are configured, initialised and loaded."""

    config: GPTOmegaConfig
    config_class = GPTOmegaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTOmegaLayer"]  # noqa: RUF012 - the name and form are the library's
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.hidden_size**-0.5)
        elif isinstance(module, GPTOmegaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, GPTOmegaCrossAttention | GPTOmegaSelfAttention):
            init.ones_(module.qk_gains)
            for name, parameter in module.named_parameters():
                if name.startswith(("sinks", "dynamic")):  # starts as plain attention
                    init.zeros_(parameter)
        elif isinstance(module, GPTOmegaInputPositions) and module.weight is not None:
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, GPTOmegaMaskedHead):
            init.zeros_(module.output_bias)

    @staticmethod
    def cross_entropy(logits: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
        """Return the mean over labels that are not -100; over `num_items`, where a trainer counts them itself."""
        total = F.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten(), reduction="sum")
        return total / ((labels != IGNORED).sum() if num_items is None else num_items)


class GPTOmegaStack(GPTOmegaPreTrainedModel):
    """The table, layers and last norm of an encoder or a decoder."""

    def __init__(self, config: GPTOmegaConfig, name: str, num_layers: int) -> None:
        super().__init__(config)
        self.token_table = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GPTOmegaLayer(config, name, index) for index in range(num_layers))
        self.norm = GPTOmegaRMSNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.token_table

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_table = value


class GPTOmegaEncoder(GPTOmegaStack):
    """Token ids -> memory."""

    def __init__(self, config: GPTOmegaConfig) -> None:
        super().__init__(config, "encoder", config.encoder_layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """input_ids [b, s], attention_mask [b, s] (1 = text, 0 = padding, on either side) -> memory [b, s, d]."""
        hidden = embedded(self.token_table, input_ids, inputs_embeds)
        valid = hidden.new_ones(hidden.shape[:2]).bool() if attention_mask is None else attention_mask.bool()
        positions = text_positions(valid)
        sight = look(self.config, "encoder", positions, positions, valid)
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, sight)
            states.append(hidden)
        return BaseModelOutput(self.norm(hidden), tuple(states) if output_hidden_states else None)


class GPTOmegaDecoder(GPTOmegaStack):
    """Token ids and, if there is an encoder, its memory -> hidden states."""

    def __init__(self, config: GPTOmegaConfig) -> None:
        super().__init__(config, "decoder", config.decoder_layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [b, s] behind what `past_key_values` holds; attention_mask [b, all tokens so far]."""
        hidden = embedded(self.token_table, input_ids, inputs_embeds)
        past_key_values = self._cache(past_key_values, use_cache)
        sight = self._sight(hidden, attention_mask, past_key_values)
        memory_mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()[:, None, None, :]
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, sight, encoder_hidden_states, memory_mask, past_key_values=past_key_values)
            states.append(hidden)
        return BaseModelOutputWithPast(
            self.norm(hidden), past_key_values, tuple(states) if output_hidden_states else None
        )

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.training and self.gradient_checkpointing:
            return None
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        if given is not None or not wanted:
            return given
        return EncoderDecoderCache(DynamicCache(), DynamicCache()) if self.config.is_encoder_decoder else DynamicCache()

    def _sight(self, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Sight:
        """Return what the new tokens see of all tokens in the cache, filled or not yet."""
        batch, new = hidden.shape[:2]
        seen: Any = 0 if cache is None else cache.get_seq_length()
        total = new if cache is None else cache.get_mask_sizes(new, 0)[0]
        places = torch.arange(new, device=hidden.device) + seen
        if attention_mask is None:
            valid = (torch.arange(total, device=hidden.device) < seen + new).expand(batch, -1)
        else:
            valid = F.pad(attention_mask.bool(), (0, total - attention_mask.shape[1]))
        positions = text_positions(valid)
        return look(self.config, "decoder", positions.index_select(1, places), positions, valid)


class GPTOmegaModel(GPTOmegaPreTrainedModel):
    """Encoder and decoder, or the decoder alone, on one token table."""

    def __init__(self, config: GPTOmegaConfig, *, has_decoder: bool = True) -> None:
        super().__init__(config)
        self.token_table = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.encoder = GPTOmegaEncoder(config) if config.is_encoder_decoder else None
        self.decoder = GPTOmegaDecoder(config) if has_decoder else None
        stacks = [name for name in ("encoder", "decoder") if getattr(self, name) is not None]
        self._tied_weights_keys = {f"{stack}.token_table.weight": "token_table.weight" for stack in stacks}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.token_table

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_table = value
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                stack.token_table = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> Seq2SeqModelOutput | BaseModelOutputWithPast:
        """Return hidden states that the tied table turns into logits. A decoder-only model takes `input_ids` alone."""
        assert self.decoder is not None
        shared: dict[str, Any] = {"use_cache": use_cache, "output_hidden_states": output_hidden_states}
        if self.encoder is None:
            return self.decoder(input_ids, attention_mask, None, None, past_key_values, inputs_embeds, **shared)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds, output_hidden_states)
        decoded = self.decoder(
            decoder_input_ids, decoder_attention_mask, encoder_outputs[0], attention_mask, past_key_values,
            decoder_inputs_embeds, **shared,
        )  # fmt: skip
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
        )


def embedded(table: Any, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    """Return `embeds`, or the rows of the table for `ids`, scaled to unit variance: [b, s, d]."""
    return table(ids) * table.weight.shape[1] ** 0.5 if embeds is None else embeds
