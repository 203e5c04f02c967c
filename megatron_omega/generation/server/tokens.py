"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: clients that measure texts ask how they are cut."""

from __future__ import annotations

from typing import Any

from megatron_omega.generation.server.questions import DetokenizeQuestion, TokenizeQuestion
from megatron_omega.generation.server.refusals import Refusal
from megatron_omega.generation.server.served import Served


def tokenized(served: Served, question: TokenizeQuestion) -> dict[str, Any]:
    """Return the ids of a text. A text that is a begin or end token and nothing else is that token."""
    processor, special = served.text_model.tokenizer.processor, served.text_model.tokenizer.special
    named = {processor.id_to_piece(number): [number] for number in (special.bos, special.eos)}
    ids = named.get(question.prompt) or served.text_model.tokenizer.encode(question.prompt)
    if question.add_special_tokens:
        ids = [special.bos, *ids]
    return {"tokens": ids, "count": len(ids), "max_model_len": served.bounds.prompt_tokens}


def detokenized(served: Served, question: DetokenizeQuestion) -> dict[str, Any]:
    """Return the text of ids; control symbols have none. Raises Refusal."""
    size = served.text_model.tokenizer.vocab_size
    if any(number >= size for number in question.tokens):
        raise Refusal(400, f"tokens has the id {max(question.tokens)}; ids end at {size - 1}", param="tokens")
    return {"prompt": served.text_model.tokenizer.decode(question.tokens)}


def tokenizer_card(served: Served) -> dict[str, Any]:
    """Return the pieces that open, end and fill texts."""
    processor, special = served.text_model.tokenizer.processor, served.text_model.tokenizer.special
    return {
        "tokenizer_class": "SentencePiece",
        "bos_token": processor.id_to_piece(special.bos),
        "eos_token": processor.id_to_piece(special.eos),
        "pad_token": processor.id_to_piece(special.pad),
        "fingerprint": served.text_model.tokenizer.fingerprint,
    }
