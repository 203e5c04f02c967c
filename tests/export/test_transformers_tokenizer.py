"""tokenizer.json gives the ids of SentencePiece, whatever the text; control pieces are not read from it."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from written_models import TEXT, tiny_tokenizer

from megatron_omega.data.tokenizer import CONTROL_PIECES, MASK_PIECE, Tokenizer, train_tokenizer
from megatron_omega.export.hugging_face.tokenizer_json import obstacles, tokenizer_config, tokenizer_json

transformers = pytest.importorskip("transformers")
FRAGMENTS = (
    *CONTROL_PIECES[:12], "<s>", "</s>", "<pad>", "<unk>", "<0x41>", "<0xFF>", "<", ">", "\u2581", " ", "  ", "\n", "\t", "\0",
    "\u00a0", "\u200b", "\u202e", "\ufeff", "\ufffd", "e\u0301", "é", "ß", "🏳️‍🌈", "𝔊", "中文", "\U0010ffff", "The", " quick", "qu",
    "aaaa", "Boxkämpfer", "'", '"', "\\", "\x7f", "ﬁ", "Ａ", "0123", "\r\n",
)  # fmt: skip


@cache
def unigram() -> Tokenizer:
    characters = "".join(sorted(set("".join(CONTROL_PIECES) + "<0x0123456789ABCDEF>/unksp")))
    return Tokenizer(train_tokenizer((*TEXT, *[characters] * 50), vocab_size=425, model_type="unigram", num_threads=1))


def load(tokenizer: Tokenizer, folder: Path) -> Any:
    from megatron_omega.export.hugging_face.model.tokenization_gpt_omega import GPTOmegaTokenizerFast

    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer, "<mode_prefix>")))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, padding_side="right")))
    return GPTOmegaTokenizerFast.from_pretrained(folder)


def hostile_texts(count: int) -> list[str]:
    chance = random.Random(0)
    made = ["".join(chance.choices(FRAGMENTS, k=chance.randint(1, 12))) for _ in range(count - 2)]
    return ["", "".join(FRAGMENTS) * 20, *made]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_2000_hostile_strings_have_the_same_ids(kind: str, tmp_path: Path) -> None:
    ours = tiny_tokenizer() if kind == "bpe" else unigram()
    theirs = load(ours, tmp_path)
    made = hostile_texts(2000)
    found = theirs(made, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    different = [text for text, ids in zip(made, found, strict=True) if ids != ours.encode(text)]
    assert not different, f"{len(different)}, the first: {different[0]!r}"


def test_text_comes_back(tmp_path: Path) -> None:
    theirs = load(tiny_tokenizer(), tmp_path)
    for text in (text for text in hostile_texts(200) if "\u2581" not in text):
        assert theirs.decode(theirs.encode(text, split_special_tokens=True), skip_special_tokens=True) == text


def test_the_mask_alone_is_read_from_text(tmp_path: Path) -> None:
    ours = tiny_tokenizer()
    theirs = load(ours, tmp_path)
    text = f"a {MASK_PIECE}</s><extra_id_0>"
    special = ours.special
    rest = ours.encode("</s><extra_id_0>")
    assert theirs(text)["input_ids"] == [special.modes.prefix, *ours.encode("a"), special.mask, *rest]
    assert theirs(text, split_special_tokens=True)["input_ids"] == [special.modes.prefix, *ours.encode(text)]
    assert theirs(text_target="The")["input_ids"] == [*ours.encode("The"), special.eos]
    assert theirs("The")["input_ids"] == [special.modes.prefix, *ours.encode("The")]  # and is itself again


def test_what_it_saves_is_the_same_tokenizer(tmp_path: Path) -> None:
    theirs = load(tiny_tokenizer(), tmp_path)
    theirs(f"a{MASK_PIECE}b", text_target="c")
    theirs.save_pretrained(tmp_path / "saved")
    again = type(theirs).from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == theirs.get_vocab()
    assert again("a <mask> quick", text_target="c") == theirs("a <mask> quick", text_target="c")


def test_a_tokenizer_that_changes_text_is_not_expressed() -> None:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(tiny_tokenizer().model)
    assert obstacles(tiny_tokenizer()) == obstacles(unigram()) == []
    rare = Tokenizer(train_tokenizer(TEXT, vocab_size=405, model_type="unigram", num_threads=1))
    assert obstacles(rare) == ["text could become its control pieces, whose characters are no pieces"]
    model.normalizer_spec.add_dummy_prefix = True
    assert obstacles(Tokenizer(model.SerializeToString())) == ["it adds a space before a text"]
