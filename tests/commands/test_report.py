"""What is said of a run: a masked word is shown only if its text is why it was found."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from written_models import VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer

from megatron_omega.commands import report
from megatron_omega.studies import held_out
from megatron_omega.studies.held_out import HeldOut, found_tokens

SPECIAL = tiny_tokenizer().special


def windows() -> HeldOut:
    tokens = np.random.default_rng(0).integers(150, VOCAB_SIZE, (4, 20))
    masked = np.zeros((4, 12), dtype=np.bool_)
    masked[:, 5] = True
    return HeldOut(tokens[:, :12], tokens[:, 12:], masked, 50)


def answering(own: list[bool], elsewhere: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the head answer rightly for such windows: in their own text, and in another's."""
    held = windows()

    def logits(_: object, prefixes: Any, *__: object) -> torch.Tensor:
        right = own if np.array_equal(prefixes, held.prefixes) else elsewhere
        made = torch.zeros(4, VOCAB_SIZE)
        for row, is_right in enumerate(right):
            made[row, held.prefixes[row, 5] if is_right else 3] = 9.0 + row
        return made

    monkeypatch.setattr(held_out, "masked_logits", logits)


def test_a_word_counts_as_found_only_if_another_text_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answering([True, True, False, True], [True, False, False, False], monkeypatch)
    found = found_tokens(cast(Any, None), windows(), SPECIAL)
    assert [(token.window, token.place) for token in found] == [(3, 5), (1, 5)]
    assert found[0].probability > 4 * found[0].elsewhere


def test_one_answer_for_every_mask_finds_nothing() -> None:
    model = tiny_model(tiny_config())
    head: Any = model.module_named("head")
    head.output_bias[int(windows().prefixes[0, 5])] = 1e3
    assert found_tokens(model, windows(), SPECIAL) == []


def test_a_text_is_shown_on_one_line_with_its_mask() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog.")
    shown = report.snippet(tokenizer, ids, 3)
    assert "<mask>" in shown and "\n" not in shown and shown.startswith("The qu")
