from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.data.tokenizer import CONTROL_PIECES, Tokenizer, train_tokenizer
from megatron_omega.errors import DataError


def test_special_ids_stand_first_and_in_order(tokenizer: Tokenizer) -> None:
    special = tokenizer.special
    assert (special.pad, special.bos, special.eos, special.mask) == (0, 2, 3, 4)
    assert [*special.modes] == [5, 6, 7, 8]
    assert special.sentinels == tuple(range(9, 109))
    assert min(tokenizer.text_ids) == 109 and len(tokenizer.text_ids) == tokenizer.vocab_size - 109


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\u2581")))
@settings(max_examples=60)
def test_decoding_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("piece", ["</s>", "<s>", "<pad>", "<unk>", *CONTROL_PIECES[:7], CONTROL_PIECES[-1]])
def test_text_that_spells_a_control_symbol_stays_text(tokenizer: Tokenizer, piece: str) -> None:
    ids = tokenizer.encode(f"a {piece} b")
    assert min(ids) >= 109
    assert tokenizer.decode(ids) == f"a {piece} b"


def test_render_writes_control_symbols_out(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.special.modes.span, *tokenizer.encode("one"), tokenizer.special.sentinels[7], tokenizer.eos_id]
    assert tokenizer.render(ids) == "<mode_span>one<extra_id_7></s>"
    assert tokenizer.decode(ids) == "one"


def test_another_process_gets_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.fingerprint == tokenizer.fingerprint and other.encode("some text") == tokenizer.encode("some text")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.model cannot be read .*train-tokenizer"):
        Tokenizer.open(tmp_path / "nowhere.model")
    (tmp_path / "other").write_bytes(b"no model")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        Tokenizer.open(tmp_path / "other")


def test_too_small_a_vocabulary_or_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match="has no room"):
        train_tokenizer(texts, vocab_size=300)
    with pytest.raises(DataError, match=r"no tokenizer of 5000 pieces .*it gives at most 3\d\d; ask for fewer"):
        train_tokenizer(["ab ab"], vocab_size=5000)
