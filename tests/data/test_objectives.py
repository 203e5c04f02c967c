from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.data.objectives import (
    Masking,
    Opening,
    causal_example,
    masked_example,
    noise_runs,
    prefix_example,
    restore,
    shots_example,
    span_example,
)
from megatron_omega.data.tokenizer import SpecialIds, Tokenizer


@pytest.fixture(scope="module")
def special(tokenizer: Tokenizer) -> SpecialIds:
    return tokenizer.special


def tokens_of(length: int) -> np.ndarray:
    return np.arange(200, 200 + length)


def _woven(kept: np.ndarray, runs: np.ndarray) -> list[int]:
    return [*(length for pair in zip(kept, runs, strict=False) for length in pair), kept[-1]]


def noise_mask(length: int, noise: int, spans: int, random: np.random.Generator) -> np.ndarray:
    kept, runs = noise_runs(length, noise, spans, random)
    assert len(kept) == spans + 1 and len(runs) == spans
    return np.repeat([number % 2 == 1 for number in range(2 * spans + 1)], _woven(kept, runs))


def random_of(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@given(st.integers(2, 400), st.integers(0, 2**32), st.data())
@settings(max_examples=80)
def test_span_corruption_inverts(special: SpecialIds, length: int, seed: int, data: st.DataObject) -> None:
    noise = data.draw(st.integers(1, length - 1))
    spans = data.draw(st.integers(1, min(noise, length - noise, 99)))
    tokens = tokens_of(length)
    example = span_example("span", tokens, noise, spans, special, random_of(seed))
    assert example.encoder_ids[0] == special.modes.span
    assert len(example.encoder_ids) == 1 + length - noise + spans
    assert len(example.labels) == noise + spans + 1
    assert restore(example.encoder_ids[1:], example.labels, special).tolist() == tokens.tolist()
    assert example.labels[-1] == special.sentinels[spans]


@given(st.integers(2, 300), st.integers(0, 2**32), st.data())
@settings(max_examples=60)
def test_noise_has_the_number_of_tokens_and_of_separate_spans(length: int, seed: int, data: st.DataObject) -> None:
    noise = data.draw(st.integers(1, length - 1))
    spans = data.draw(st.integers(1, min(noise, length - noise, 99)))
    mask = noise_mask(length, noise, spans, random_of(seed))
    assert len(mask) == length and mask.sum() == noise
    assert np.count_nonzero(mask & ~np.concatenate([[False], mask[:-1]])) == spans


def test_noise_falls_everywhere_alike() -> None:
    random = random_of(0)
    share = np.mean([noise_mask(40, 6, 2, random) for _ in range(4000)], axis=0)
    assert abs(share[3:-3] - 0.15).max() < 0.04
    assert min(share[0], share[-1]) > 0.03, "spans reach the borders"


@given(st.integers(1, 50), st.booleans(), st.data())
@settings(max_examples=40)
def test_prefix_and_continuation_are_the_text(
    special: SpecialIds, length: int, is_end: bool, data: st.DataObject
) -> None:
    prefix = data.draw(st.integers(0, length - (not is_end)))
    tokens = tokens_of(length)
    overlap, is_asked = data.draw(st.integers(0, 12)), data.draw(st.booleans())
    example = prefix_example(tokens, prefix, special, is_end=is_end, opening=Opening(overlap, is_asked))
    opening = [*tokens[max(0, prefix - overlap) : prefix]] or [special.bos]
    answer = [*tokens[prefix:], *([special.eos] if is_end else [])]
    assert example.encoder_ids.tolist() == [special.modes.prefix, *tokens[:prefix]]
    asked = opening[1:] if is_asked else [IGNORED_LABEL] * (len(opening) - 1)
    assert example.labels.tolist() == asked + answer
    assert example.decoder_ids.tolist() == [*opening, *answer[:-1]]


def test_causal_has_no_encoder(special: SpecialIds) -> None:
    example = causal_example(tokens_of(3), special, is_end=True)
    assert len(example.encoder_ids) == 0
    assert example.decoder_ids.tolist() == [special.bos, 200, 201, 202]
    assert example.labels.tolist() == [200, 201, 202, special.eos]


def test_masks_are_80_10_10_and_only_where_asked(special: SpecialIds) -> None:
    tokens, text_ids = tokens_of(20000), np.arange(30000, 60000)
    example = masked_example(
        tokens, 20000, Masking(0.15, 1, special.modes.mask), special, text_ids, random_of(3), is_end=True
    )
    labels = example.mlm_labels
    assert labels is not None
    asked = np.flatnonzero(labels != IGNORED_LABEL)
    assert len(asked) == 3000 and asked[0] >= 1
    original = np.concatenate([[special.modes.mask], tokens])
    seen = example.encoder_ids
    assert (labels[asked] == original[asked]).all()
    untouched = np.setdiff1d(np.arange(len(original)), asked)
    assert (seen[untouched] == original[untouched]).all()
    shares = [
        np.mean(seen[asked] == special.mask),
        np.mean(seen[asked] >= 30000),
        np.mean(seen[asked] == original[asked]),
    ]
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.03)


@given(
    length=st.integers(2, 80), rate=st.floats(0.05, 0.6), span=st.sampled_from([1.0, 3.0, 9.0]), seed=st.integers(0),
    overlap=st.integers(1, 9),
)  # fmt: skip
def test_masked_runs_have_a_share_of_the_prefix_and_the_decoder_sees_its_end_as_it_was(
    length: int, rate: float, span: float, seed: int, overlap: int, special: SpecialIds
) -> None:
    tokens, masking = tokens_of(length), Masking(rate, span, special.modes.prefix)
    prefix = length - 1
    example = masked_example(
        tokens, prefix, masking, special, np.arange(300, 310), random_of(seed), is_end=False, opening=Opening(overlap)
    )
    assert example.mlm_labels is not None and example.encoder_ids[0] == special.modes.prefix
    asked = np.flatnonzero(example.mlm_labels != IGNORED_LABEL)
    count = max(1, round(rate * prefix))
    assert len(asked) == count and asked[0] >= 1
    if span > 1:
        runs = np.count_nonzero(np.diff(asked, prepend=-1) > 1)
        assert runs <= max(1, round(count / span))
    assert example.decoder_ids.tolist() == tokens[max(0, prefix - overlap) : prefix].tolist()
    assert example.labels.tolist() == [IGNORED_LABEL] * (len(example.decoder_ids) - 1) + [tokens[-1]]


def test_a_masked_example_without_prefix_has_no_masks(special: SpecialIds) -> None:
    masking = Masking(0.15, 3, special.modes.mask)
    example = masked_example(tokens_of(2), 0, masking, special, np.arange(300, 310), random_of(0), is_end=False)
    assert example.mlm_labels is not None and (example.mlm_labels == IGNORED_LABEL).all()


@given(st.integers(1, 4), st.integers(4, 60), st.integers(0, 10), st.integers(0, 2**32), st.data())
@settings(max_examples=80)
def test_in_context_examples_show_whole_parts_and_ask_for_the_end_of_another(
    special: SpecialIds, shots: int, length: int, more: int, seed: int, data: st.DataObject
) -> None:
    tokens = tokens_of((shots + 1) * length + min(more, shots))
    answer = data.draw(st.integers(1, length - 1))
    separator = np.array([11, 12])
    example = shots_example(tokens, len(tokens) - answer, shots, separator, special, random_of(seed))
    *shown, begun = np.split(example.encoder_ids[1:], 2 + np.flatnonzero(example.encoder_ids[1:] == 11))
    shown = [part[:-2] for part in shown]
    assert example.encoder_ids[0] == special.modes.prefix and example.mlm_labels is None
    assert len(shown) == shots and len(example.labels) == answer and example.decoder_ids[0] == begun[-1]
    asked = [*begun, *example.labels]
    assert len(asked) == length and sorted([*np.concatenate(shown), *asked]) == tokens.tolist()
    assert all((np.diff(part) == 1).all() for part in (*shown, np.array(asked)))
    assert (example.decoder_ids[1:] == example.labels[:-1]).all()
