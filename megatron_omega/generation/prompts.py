"""From a text to what the model reads of it.

encoder-decoder   encoder: mode token, prompt     decoder: the prompt's last token, then what is generated
decoder-only                                      decoder: begin, prompt, then what is generated

The decoder begins with the begin token after an empty prompt, and where the model was trained so (model.decoder_start).
"""

from __future__ import annotations

from megatron_omega.data.objectives import first_decoder_id
from megatron_omega.export.loading import TextModel


def prompt_ids(text_model: TextModel, prompt: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what encoder and decoder read before the first token that continues `prompt`."""
    model, special = text_model.config.model, text_model.tokenizer.special
    text = text_model.tokenizer.encode(prompt)
    if model.is_decoder_only:
        return (), (special.bos, *text)
    return (special.modes.prefix, *text), (first_decoder_id(text, special, model.decoder_start),)
