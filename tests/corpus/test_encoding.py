from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.corpus.encoding import CutEncoder, SentencePieceEncoder, is_cuttable, load_library, open_encoder
from megatron_omega.data.tokenizer import Tokenizer, train_tokenizer

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="the fast encoder needs a C++ compiler"
)


@pytest.fixture(scope="module")
def fast(tokenizer: Tokenizer) -> CutEncoder:
    library = load_library()
    assert library is not None
    return CutEncoder(tokenizer, library)


@needs_compiler
def test_the_fast_encoder_is_chosen_for_our_tokenizers(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert open_encoder(tokenizer, samples=texts[:5]).name == "cut-and-cache"
    assert open_encoder(tokenizer, is_native_allowed=False).name == "sentencepiece"


@needs_compiler
def test_ids_are_sentencepieces_own(tokenizer: Tokenizer, fast: CutEncoder, texts: list[str]) -> None:
    reference = SentencePieceEncoder(tokenizer)
    for _ in range(2):  # the second time from the cache
        assert [fast.encode(text) for text in texts] == [reference.encode(text) for text in texts]


@needs_compiler
@given(
    st.lists(
        st.sampled_from(["the", " ", "  ", "rows", "\n", "é", "日本語", "\U0001f389", "\u2581", "</s>", "x", "\x01"])
    )
)
@settings(max_examples=150)
def test_ids_are_sentencepieces_own_for_any_mixture(tokenizer: Tokenizer, fast: CutEncoder, parts: list[str]) -> None:
    text = "".join(parts)
    assert np.frombuffer(fast.encode(text), dtype=np.uint16).tolist() == tokenizer.encode(text)


def test_an_encoder_that_differs_is_not_used(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CutEncoder, "encode", lambda self, text: b"\0\0")
    assert open_encoder(tokenizer).name == "sentencepiece"


def test_unigram_models_run_on_sentencepiece(texts: list[str]) -> None:
    unigram = Tokenizer(train_tokenizer(texts, vocab_size=450, model_type="unigram"))
    assert not is_cuttable(unigram)
    assert open_encoder(unigram).name == "sentencepiece"


def test_without_a_library_sentencepiece_encodes(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_omega.corpus.encoding.load_library", lambda: None)
    assert open_encoder(tokenizer).name == "sentencepiece"
