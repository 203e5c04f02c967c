"""GPT-Omega for Transformers: encoder-decoder, decoder-only, and the encoder with its masked-language head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, Seq2SeqLMOutput

from .configuration_gpt_omega import GPTOmegaConfig
from .layers_gpt_omega import GPTOmegaMaskedHead
from .stacks_gpt_omega import IGNORED, GPTOmegaModel, GPTOmegaPreTrainedModel


class GPTOmegaWithHead(GPTOmegaPreTrainedModel, GenerationMixin):
    """What both language models share: the head, and a cache whose masks the decoder makes itself."""

    _tied_weights_keys = {"lm_head.weight": "model.token_table.weight"}  # noqa: RUF012

    def __init__(self, config: GPTOmegaConfig) -> None:
        super().__init__(config)
        self.model = GPTOmegaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(config: Any, inputs_embeds: Any, attention_mask: Any, *_: Any, **__: Any) -> Any:
        """Return the mask as it is, [b, s]: the decoder makes one for each branch (static caches ask for this)."""
        return attention_mask

    def _logits(self, hidden: Tensor, keep: int | Tensor = 0) -> Tensor:
        """[b, s, d] -> fp32 [b, s or the last `keep`, vocab_size]."""
        kept = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return self.lm_head(kept)[..., : self.config.vocab_size].float() * self.config.logit_multiplier


class GPTOmegaForConditionalGeneration(GPTOmegaWithHead):
    """Encoder-decoder with its language-model head."""

    _keys_to_ignore_on_load_unexpected = [r"^mlm\."]  # noqa: RUF012

    def get_encoder(self, *_: Any, **__: Any) -> Any:
        return self.model.encoder

    def get_decoder(self, *_: Any, **__: Any) -> Any:
        return self.model.decoder

    def opening(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return what the decoder reads before it continues a text: ids and mask [b, k], padded on the left.

        Those are the text's last `decoder_overlap` tokens, if the model was trained so; the begin token where there is
        no text, or where spans are to be filled in. None where the text is not known.
        """
        config: Any = self.config
        if input_ids is None:
            return None
        valid = input_ids != config.pad_token_id if attention_mask is None else attention_mask.bool()
        first = valid.int().argmax(1, keepdim=True)
        mode = input_ids.gather(1, first)
        continues = (mode == config.prefix_mode_token_id) | (mode == config.mask_mode_token_id)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        from_end = valid.flip(1).cumsum(1).flip(1)
        wanted = continues & valid & (places > first) & (from_end <= config.decoder_overlap)
        if config.decoder_start == "begin":
            wanted = torch.zeros_like(valid)
        last = wanted.int().argsort(dim=1, stable=True)[:, -max(1, int(wanted.sum(1).max())) :]
        mask = wanted.gather(1, last)
        ids = input_ids.gather(1, last).masked_fill(~mask, config.pad_token_id)
        is_empty = ~mask.any(1)
        ids[is_empty, -1], mask[is_empty, -1] = config.decoder_start_token_id, True
        return ids, mask.to(torch.long)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin` does; the decoder first reads what it read in training (`opening`).

        What is returned begins with `decoder_start_token_id` in its place.
        """
        ids = kwargs.get("input_ids") if inputs is None else inputs
        opening = self.opening(ids, kwargs.get("attention_mask"))
        if opening is None or kwargs.get("decoder_start_token_id") is not None:
            return super().generate(inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        more = opening[0].shape[1] - 1
        given, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
        if given is not None:
            mask = torch.ones_like(given) if mask is None else mask
            opening = torch.cat((opening[0], given), dim=1), torch.cat((opening[1], mask), dim=1)
        if kwargs.get("max_length") is not None:
            kwargs["max_length"] += more
        kwargs |= {"decoder_input_ids": opening[0], "decoder_attention_mask": opening[1]}
        kwargs["decoder_start_token_id"] = opening[0][:, 0].tolist()  # else one more is put before them
        found = super().generate(inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        sequences = (found if isinstance(found, Tensor) else found.sequences)[:, more:].clone()
        config: Any = self.config
        sequences[:, 0] = config.decoder_start_token_id
        if isinstance(found, Tensor):
            return sequences
        found.sequences = sequences
        return found

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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """`labels` [b, s_d] alone are enough: the decoder reads its opening and then them, and logits are theirs."""
        repeated = 0
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids, decoder_attention_mask = self._read(labels, self.opening(input_ids, attention_mask))
            repeated = decoder_input_ids.shape[1] - labels.shape[1]
        found: Any = self.model(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache, output_hidden_states,
        )  # fmt: skip
        logits = self._logits(found.last_hidden_state[:, repeated:], logits_to_keep)
        return Seq2SeqLMOutput(
            loss=None if labels is None else self.cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            past_key_values=found.past_key_values,
            decoder_hidden_states=found.decoder_hidden_states,
            encoder_last_hidden_state=found.encoder_last_hidden_state,
            encoder_hidden_states=found.encoder_hidden_states,
        )

    def _read(self, labels: Tensor, opening: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return the decoder's ids and mask: an opening, then all labels but the last."""
        config: Any = self.config
        before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, config.pad_token_id)
        if opening is None:
            begin = torch.full_like(labels[:, :1], config.decoder_start_token_id)
            opening = begin, torch.ones_like(begin)
        return torch.cat((opening[0], before), dim=1), torch.cat((opening[1], torch.ones_like(before)), dim=1)


class GPTOmegaForCausalLM(GPTOmegaWithHead):
    """Decoder-only language model."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """`labels` [b, s] are shifted here: each token is predicted from those before it."""
        found: Any = self.model(
            input_ids, attention_mask, past_key_values=past_key_values, inputs_embeds=inputs_embeds,
            use_cache=use_cache, output_hidden_states=output_hidden_states,
        )  # fmt: skip
        logits = self._logits(found.last_hidden_state, 0 if labels is not None else logits_to_keep)
        return CausalLMOutputWithPast(
            loss=None if labels is None else self.cross_entropy(logits[:, :-1], labels[:, 1:], num_items_in_batch),
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
        )


class GPTOmegaForMaskedLM(GPTOmegaPreTrainedModel):
    """The encoder with its masked-language head."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.decoder\."]  # noqa: RUF012

    def __init__(self, config: GPTOmegaConfig) -> None:
        super().__init__(config)
        self.model = GPTOmegaModel(config, has_decoder=False)
        self.mlm = GPTOmegaMaskedHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """The mode token of a text that is to be continued is taken for that of a text with masks."""
        config: Any = self.config
        if input_ids is not None and config.prefix_mode_token_id is not None and not config.shared_mode_token:
            input_ids = input_ids.masked_fill(input_ids == config.prefix_mode_token_id, config.mask_mode_token_id)
        encoder: Any = self.model.encoder
        found = encoder(input_ids, attention_mask, inputs_embeds, output_hidden_states)
        size = config.vocab_size
        table: Any = self.model.token_table
        logits = F.linear(self.mlm(found.last_hidden_state), table.weight)[..., :size].float()
        logits = logits * config.logit_multiplier + self.mlm.output_bias[:size].float()
        return MaskedLMOutput(
            loss=None if labels is None else self.cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=found.hidden_states,
        )
