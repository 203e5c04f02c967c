"""The tokenizer of GPT-Omega for Transformers: what a user may write into a text, and how an answer ends."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast


class GPTOmegaTokenizerFast(PreTrainedTokenizerFast):
    """A fast tokenizer in whose texts `<mask>` alone is read as what it spells: `</s>` and the like stay text.

    With `split_special_tokens=True` even `<mask>` does. Answers (`text_target`) have no mode token, and end.
    """

    _masking: Any = None  # with an __init__ of its own, the library would build the class from pieces and merges alone
    _answers = False

    def _encode_plus(self, *args: Any, split_special_tokens: bool | None = None, **kwargs: Any) -> Any:
        is_literal = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        whole: Any = self._tokenizer
        chosen = whole if is_literal else self._with_mask(whole)
        opening = chosen.post_processor
        if self._answers:
            chosen.post_processor = self._closing()
        self._tokenizer = chosen
        try:
            return super()._encode_plus(*args, split_special_tokens=True, **kwargs)
        finally:
            chosen.post_processor = opening
            self._tokenizer = whole

    def _with_mask(self, whole: Any) -> Any:
        """Return the tokenizer in which the mask is no special token, so that it is read where those are not."""
        if self._masking is None:
            content = json.loads(whole.to_str())
            for token in content["added_tokens"]:
                token["special"] = token["special"] and token["content"] != self.mask_token
            self._masking = Tokenizer.from_str(json.dumps(content))
        return self._masking

    def _add_tokens(self, *args: Any, **kwargs: Any) -> int:
        self._masking = None
        return super()._add_tokens(*args, **kwargs)

    def _closing(self) -> Any:
        eos: Any = self.eos_token
        return processors.TemplateProcessing(
            single=f"$A {eos}", pair=f"$A $B {eos}", special_tokens=[(eos, self.convert_tokens_to_ids(eos))]
        )

    def _switch_to_target_mode(self) -> None:
        self._answers = True

    def _switch_to_input_mode(self) -> None:
        self._answers = False
