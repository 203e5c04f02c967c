from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.config.schema import ObjectiveConfig
from megatron_omega.data.packing import Budget, PieceLength, Plan, plan_causal, plan_two_streams

pieces_of = st.lists(st.builds(PieceLength, st.integers(1, 900), st.booleans()), min_size=1, max_size=25)


def check(plan: Plan, pieces: list[PieceLength], budget: Budget) -> None:
    """Everything that must hold of a plan, whatever it was made from."""
    encoder = decoder = 0
    covered = [0] * len(pieces)
    for slot in plan.slots:
        assert slot.encoder_at % budget.width == 0 and slot.decoder_at % budget.width == 0
        assert slot.encoder_at >= encoder and slot.decoder_at >= decoder, "examples overlap"
        if budget.encoder:
            encoder = slot.encoder_at + slot.encoder_length
            assert slot.encoder_length >= 1
        decoder = slot.decoder_at + slot.decoder_length
        assert slot.decoder_length - slot.repeated >= 1, "an example needs a label"
        assert 0 <= slot.start <= slot.stop <= pieces[slot.piece].tokens
        assert not slot.is_end or (slot.stop == pieces[slot.piece].tokens and pieces[slot.piece].is_end)
        if slot.spans:
            assert 1 <= slot.spans <= min(slot.noise, slot.tokens - slot.noise, 99)
        covered[slot.piece] += slot.tokens
    assert encoder <= budget.encoder and decoder <= budget.decoder
    assert sum(piece.tokens for piece in pieces) == sum(covered) + plan.lost_tokens
    assert all(n <= piece.tokens for n, piece in zip(covered, pieces, strict=True))


@given(
    pieces_of,
    st.sampled_from([(64, 64, 16), (256, 256, 32), (512, 128, 32), (96, 640, 16), (2048, 2048, 32)]),
    st.tuples(*[st.sampled_from([0.0, 0.2, 1.0])] * 4).filter(any),
    st.integers(0, 2**32),
    st.sampled_from([0, 1, 8, 40]),
)
@settings(max_examples=150)
def test_any_plan_keeps_the_rules(
    pieces: list[PieceLength],
    room: tuple[int, int, int],
    weights: tuple[float, float, float, float],
    seed: int,
    overlap: int,
) -> None:
    objective = ObjectiveConfig(
        prefix_lm=weights[0], span_corruption=weights[1], masked_prefix=weights[2], in_context=weights[3]
    )
    budget = Budget(*room, overlap)
    plan = plan_two_streams(pieces, budget, objective, np.random.Generator(np.random.PCG64(seed)))
    check(plan, pieces, budget)


@given(pieces_of, st.sampled_from([(64, 16), (256, 32), (2048, 32)]))
@settings(max_examples=50)
def test_any_plan_without_an_encoder_keeps_the_rules(pieces: list[PieceLength], room: tuple[int, int]) -> None:
    budget = Budget(0, *room)
    check(plan_causal(pieces, budget), pieces, budget)


def test_prefixes_are_balanced_to_fill_both_streams() -> None:
    budget = Budget(2048, 2048, 32)
    objective = ObjectiveConfig(span_corruption=0, masked_prefix=0, empty_prefix_fraction=0)
    random = np.random.Generator(np.random.PCG64(0))
    for _ in range(50):
        plan = plan_two_streams([PieceLength(1100, True), PieceLength(2900, False)], budget, objective, random)
        assert plan.lost_tokens == 0
        assert sum(slot.encoder_length + slot.decoder_length for slot in plan.slots) == 4003


def test_prefix_fractions_stay_as_drawn_where_there_is_room() -> None:
    objective = ObjectiveConfig(span_corruption=0, masked_prefix=0, empty_prefix_fraction=0)
    random = np.random.Generator(np.random.PCG64(0))
    budget = Budget(2048, 2048, 32)
    fractions = [
        plan_two_streams([PieceLength(1000, True)], budget, objective, random).slots[0].prefix / 1000
        for _ in range(2000)
    ]
    assert np.allclose(np.quantile(fractions, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.04)


@pytest.mark.parametrize(
    ("weights", "kinds"), [((1, 0, 0), {"prefix"}), ((0, 0, 1), {"mask"}), ((1, 1, 0), {"prefix", "span", "extreme"})]
)
def test_weights_of_zero_are_kept(weights: tuple[float, float, float], kinds: set[str]) -> None:
    objective = ObjectiveConfig(
        prefix_lm=weights[0], span_corruption=weights[1], masked_prefix=weights[2], empty_prefix_fraction=0
    )
    random = np.random.Generator(np.random.PCG64(1))
    plans = [
        plan_two_streams([PieceLength(700, True)] * 5, Budget(2048, 2048, 32), objective, random) for _ in range(40)
    ]
    assert {slot.kind for plan in plans for slot in plan.slots} == kinds
