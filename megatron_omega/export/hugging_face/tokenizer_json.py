"""A SentencePiece model as tokenizer.json, which the tokenizers library reads: the same ids for the same text.

All control pieces are special tokens there. That text which spells one stays text, but for `<mask>`, is the doing of
the class that is named beside it (`model.tokenization_gpt_omega`); without it, encode with encode_special_tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from megatron_omega.data.tokenizer import MASK_PIECE, Tokenizer

_MODULE, _CLASS = "tokenization_gpt_omega", "GPTOmegaTokenizerFast"
_SPACE = "\u2581"
_NEVER = -1e6
"""Score of a piece that no text may become; what is worth choosing lies above -100."""


def obstacles(tokenizer: Tokenizer) -> list[str]:
    """Return what of a SentencePiece model tokenizer.json cannot say; nothing for those of train-tokenizer."""
    model = _proto(tokenizer)
    trainer, normalizer, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    found = {
        "it is neither BPE nor unigram": trainer.model_type not in (trainer.BPE, trainer.UNIGRAM),
        "text could become its control pieces, whose characters are no pieces": (
            trainer.model_type == trainer.UNIGRAM and not _can_spell_controls(tokenizer.processor)
        ),
        "it has no byte pieces": not trainer.byte_fallback,
        "it changes text before it encodes it": bool(normalizer.precompiled_charsmap),
        "it adds a space before a text": normalizer.add_dummy_prefix,
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it keeps spaces as they are": not normalizer.escape_whitespaces,
        "it has pieces of a user's own": any(p.type in (kinds.USER_DEFINED, kinds.UNUSED) for p in model.pieces),
    }
    return [reason for reason, is_so in found.items() if is_so]


def tokenizer_json(tokenizer: Tokenizer, opening: str) -> dict[str, Any]:
    """Return the content of tokenizer.json; `opening` is the control piece before every text."""
    processor = tokenizer.processor
    first = {"SpecialToken": {"id": opening, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    of_opening = {"id": opening, "ids": [processor.piece_to_id(opening)], "tokens": [opening]}
    spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(processor, number) for number in _specials(processor)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text[0]],
            "pair": [first, *text],
            "special_tokens": {opening: of_opening},
        },
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": _bpe(processor) if _is_bpe(tokenizer) else _unigram(processor),
    }


def tokenizer_config(tokenizer: Tokenizer, *, padding_side: str) -> dict[str, Any]:
    """Return the content of tokenizer_config.json."""
    special, piece = tokenizer.special, tokenizer.processor.id_to_piece
    return {
        "tokenizer_class": _CLASS,
        "auto_map": {"AutoTokenizer": [None, f"{_MODULE}.{_CLASS}"]},
        "pad_token": piece(special.pad),
        "unk_token": piece(tokenizer.processor.unk_id()),
        "bos_token": piece(special.bos),
        "eos_token": piece(special.eos),
        "mask_token": piece(special.mask),
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": padding_side,
        "clean_up_tokenization_spaces": False,
    }


def _proto(tokenizer: Tokenizer) -> Any:
    model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(tokenizer.model)
    return model


def _can_spell_controls(processor: SentencePieceProcessor) -> bool:
    """Tell whether text can spell every other piece without an unknown character, which would cost more than that."""
    pieces = list(_pieces(processor))
    of_text = {piece for number, piece, _ in pieces if _is_of_text(processor, number)}
    others = {piece for number, piece, _ in pieces if not _is_of_text(processor, number)}
    return {character for piece in others for character in piece} <= of_text


def _is_bpe(tokenizer: Tokenizer) -> bool:
    model = _proto(tokenizer)
    return model.trainer_spec.model_type == model.trainer_spec.BPE


def _specials(processor: SentencePieceProcessor) -> Iterator[int]:
    for number in range(processor.get_piece_size()):
        if processor.is_control(number) or processor.is_unknown(number):
            yield number


def _added(processor: SentencePieceProcessor, number: int) -> dict[str, Any]:
    """Describe a control piece. A space before a mask belongs to what is masked, since pieces begin with theirs."""
    piece = processor.id_to_piece(number)
    return {
        "id": number, "content": piece, "single_word": False, "lstrip": piece == MASK_PIECE, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip


def _bpe(processor: SentencePieceProcessor) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": processor.id_to_piece(processor.unk_id()),
        "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True,
        "ignore_merges": False, "vocab": {piece: number for number, piece, _ in _pieces(processor)},
        "merges": _merges(processor),
    }  # fmt: skip


def _merges(processor: SentencePieceProcessor) -> list[tuple[str, str]]:
    """Return every pair that makes a piece, in the order in which the model merges: by the score of what they make."""
    texts = {piece: score for number, piece, score in _pieces(processor) if _is_of_text(processor, number)}
    order = {piece: place for place, piece in enumerate(texts)}
    pairs = [
        (-score, order[piece[:cut]], order[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in texts.items()
        for cut in range(1, len(piece))
        if piece[:cut] in texts and piece[cut:] in texts
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _unigram(processor: SentencePieceProcessor) -> dict[str, Any]:
    vocabulary = [
        (piece, score if _is_of_text(processor, number) else _NEVER) for number, piece, score in _pieces(processor)
    ]
    return {"type": "Unigram", "unk_id": processor.unk_id(), "vocab": vocabulary, "byte_fallback": True}


def _pieces(processor: SentencePieceProcessor) -> Iterator[tuple[int, str, float]]:
    for number in range(processor.get_piece_size()):
        yield number, processor.id_to_piece(number), processor.get_score(number)


def _is_of_text(processor: SentencePieceProcessor, number: int) -> bool:
    return not (processor.is_control(number) or processor.is_unknown(number) or processor.is_byte(number))
