"""Movement of activations is the same at every width and depth; sizes beyond these are `make coordinates`."""

from __future__ import annotations

import pytest

from megatron_omega.studies.coordinates import gradients_over_epsilon, movement, proportioned, spread

STEPS = (1, 5, 20)
RATE = 3e-3
FLAT = 1.5


@pytest.fixture(scope="module")
def widths() -> dict[int, dict[str, list[float]]]:
    return {width: movement(proportioned(width, 2, ffn_ratio=2), STEPS, RATE) for width in (64, 128, 256, 512)}


@pytest.fixture(scope="module")
def depths() -> dict[int, dict[str, list[float]]]:
    return {layers: movement(proportioned(64, layers, ffn_ratio=2), STEPS, RATE) for layers in (2, 6, 24)}


def test_everything_moves_alike_at_all_widths(widths: dict[int, dict[str, list[float]]]) -> None:
    """The label's MLM logit is judged from the fifth step on: the batch has ten such labels, and after one step their
    small sample stands at 1.52."""
    found = spread(widths)
    assert len(found) == 11
    found["label's MLM logit"] = found["label's MLM logit"][1:]
    assert {kind: factors for kind, factors in found.items() if max(factors) > FLAT} == {}


def test_everything_moves_alike_at_all_depths(depths: dict[int, dict[str, list[float]]]) -> None:
    """The first step is judged from 6 + 6 layers on: 2 + 2 start far from the limit, and arrive after 5 steps."""
    found = spread(depths)
    assert {kind: factors for kind, factors in found.items() if max(factors[1:]) > FLAT} == {}
    deep = spread({layers: moved for layers, moved in depths.items() if layers > 2})
    assert {kind: factors for kind, factors in deep.items() if max(factors) > FLAT} == {}


def test_the_check_finds_a_parametrization_that_does_not_transfer() -> None:
    """Version 1 left the table's rate and the logits as they are at every width."""
    sizes = {width: proportioned(width, 2, ffn_ratio=2, parametrization=1) for width in (64, 256)}
    found = spread({width: movement(model, STEPS[:1], RATE) for width, model in sizes.items()})
    assert max(found["embedding"]) > FLAT and max(found["label's logit"]) > FLAT


def test_gradients_of_the_deepest_model_stand_well_above_epsilon() -> None:
    found = gradients_over_epsilon(proportioned(64, 96, ffn_ratio=2))
    encoder = [ratio for name, ratio in found.items() if name.startswith("encoder.")]
    assert len(encoder) >= 96 * 4 and min(encoder) > 1000
