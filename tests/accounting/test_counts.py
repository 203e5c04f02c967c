"""Closed forms of parameters and FLOPs, and the cuts of the layer list."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.accounting import (
    LayerCost,
    attention_kernel_flops,
    layer_costs,
    layer_names,
    parameter_count,
    stage_boundaries,
    tokens_per_sample,
    training_flops_per_sample,
    training_flops_per_token,
)
from megatron_omega.config.schema import Branches, DataConfig, ModelConfig, RunConfig

DECODER_ONLY = RunConfig(
    model=ModelConfig(
        hidden_size=64, ffn_hidden_size=256, num_attention_heads=4, encoder_layers=0, decoder_layers=3,
        decoder_branches=("causal",), vocab_size=1000,
    ),
    data=DataConfig(encoder_seq_length=0, decoder_seq_length=128),
)  # fmt: skip


def test_the_model_card_has_exactly_11_934_059_264_parameters() -> None:
    assert parameter_count(ModelConfig()) == 11_934_059_264
    assert round(parameter_count(ModelConfig()) / 1e9, 1) == 11.9


def test_five_modules_of_head_dim_32_have_the_same_matrices() -> None:
    wide = ModelConfig(
        num_attention_heads=30,
        encoder_branches=("dynamic", "local", "axial"),
        decoder_branches=("causal",),
    )
    assert wide.resolved_head_dim == 32
    per_layer = 3 * 4 * 960**2 + 2 * 4 * 960**2  # encoder + decoder with cross-attention
    attention = 96 * per_layer
    assert attention < parameter_count(wide) < parameter_count(ModelConfig())


def test_an_encoder_layer_and_a_decoder_layer_of_the_card() -> None:
    by_kind = {cost.kind: cost.parameters for cost in layer_costs(RunConfig())}
    assert by_kind["encoder"] == 62_033_376
    assert by_kind["decoder"] == 61_942_080
    assert by_kind["embedding"] == 32768 * 960
    assert by_kind["head"] + by_kind["bridge"] == 2 * 960 + 960**2 + 2 * 960 + 32768


@given(
    heads=st.integers(1, 6), head_dim=st.sampled_from([2, 4, 20]), ffn=st.integers(1, 300), encoder=st.integers(0, 4),
    decoder=st.integers(1, 4), vocab=st.integers(1, 1000), mlm=st.booleans(),
)  # fmt: skip
@settings(max_examples=40)
def test_the_layers_add_up_to_the_model(
    heads: int,
    head_dim: int,
    ffn: int,
    encoder: int,
    decoder: int,
    vocab: int,
    mlm: bool,
) -> None:
    model = ModelConfig(
        hidden_size=48, num_attention_heads=heads, head_dim=head_dim, ffn_hidden_size=ffn, encoder_layers=encoder,
        decoder_layers=decoder, vocab_size=vocab, mlm_head=mlm,
    )  # fmt: skip
    costs = layer_costs(RunConfig(model=model))
    assert [cost.name for cost in costs] == layer_names(model)
    assert sum(cost.parameters for cost in costs) == parameter_count(model)


def test_learned_positions_belong_to_the_first_layer_of_each_stack() -> None:
    learned = RunConfig(model=ModelConfig(positions="learned"))
    extra = parameter_count(learned.model, encoder_seq_length=2048, decoder_seq_length=2048) - parameter_count(
        ModelConfig()
    )
    assert extra == 2 * 2048 * 960
    assert sum(cost.parameters for cost in layer_costs(learned)) == 11_934_059_264 + extra


def test_a_decoder_only_layer_by_hand() -> None:
    d, f, n, vocabulary = 64, 256, 128, 1024
    assert parameter_count(DECODER_ONLY.model) == 3 * (4 * d * d + 3 * d * f + 2 * d + 2 * d) + vocabulary * d + d
    by_kind = {cost.kind: cost.forward_flops for cost in layer_costs(DECODER_ONLY)}
    assert by_kind["decoder"] == 2 * n * (4 * d * d + 3 * d * f) + 4 * n * n * d
    assert by_kind["output"] == 2 * n * vocabulary * d
    assert by_kind["head"] == by_kind["embedding"] == 0
    assert tokens_per_sample(DECODER_ONLY) == n
    assert training_flops_per_sample(DECODER_ONLY) == 3 * (3 * by_kind["decoder"] + by_kind["output"])


def test_a_token_visits_one_half_of_an_encoder_decoder() -> None:
    config = RunConfig()
    matrices = 6 * parameter_count(config.model) / 2
    assert matrices < training_flops_per_token(config) < 1.2 * matrices


def test_local_and_axial_attention_do_not_grow_with_the_square_of_the_length() -> None:
    model = ModelConfig(local_window=128, axial_width=32)
    per_key = 4 * 4096 * 960  # both products, all heads
    assert attention_kernel_flops(model, "causal", 4096, causal=True) == per_key * 4096
    assert attention_kernel_flops(model, "local", 4096, causal=True) == per_key * 256
    assert attention_kernel_flops(model, "local", 4096, causal=False) == per_key * 384
    assert attention_kernel_flops(model, "local", 4000, causal=False) == per_key * 384  # filled to whole chunks
    assert attention_kernel_flops(model, "axial", 4096, causal=True) == per_key * (32 + 128) // 2


def test_axial_heads_of_a_slice_are_told_apart_by_their_global_index() -> None:
    model = ModelConfig(axial_width=32)
    slices = [attention_kernel_flops(model, "axial", 2048, causal=True, heads=range(i, i + 3)) for i in range(0, 48, 3)]
    assert sum(slices) == attention_kernel_flops(model, "axial", 2048, causal=True)
    assert slices[0] < slices[1]  # two rows and a column; a row and two columns (64 rows > 32 columns)


def _layers(loads: list[int]) -> list[LayerCost]:
    return [LayerCost(f"decoder.layers.{i}", load + 1, 0, load, "decoder") for i, load in enumerate(loads)]


def _stages(loads: list[int], cuts: tuple[int, ...]) -> list[int]:
    edges = [0, *cuts, len(loads)]
    assert edges == sorted(set(edges)), "every stage holds a layer"
    return [sum(loads[i:j]) for i, j in pairwise(edges)]


@given(loads=st.lists(st.integers(0, 9), min_size=1, max_size=9), data=st.data())
@settings(max_examples=150)
def test_the_heaviest_stage_is_as_light_as_any_cut_makes_it(loads: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(loads)))
    cuts = stage_boundaries(_layers(loads), stages)
    assert len(cuts) == stages - 1
    best = min(max(_stages(loads, every)) for every in combinations(range(1, len(loads)), stages - 1))
    assert max(_stages(loads, cuts)) == best


def test_the_cut_falls_in_front_of_the_bridge_where_that_is_nearly_free() -> None:
    costs = layer_costs(RunConfig())
    bridge = [cost.kind for cost in costs].index("bridge")
    for stages in (2, 4, 8, 16, 64):
        assert bridge in stage_boundaries(costs, stages)
    lopsided = layer_costs(RunConfig(model=ModelConfig(encoder_layers=2, decoder_layers=60)))
    assert stage_boundaries(lopsided, 2)[0] > 3  # in front of the bridge the second stage would carry everything


def test_equal_layers_leave_the_lighter_stages_in_front() -> None:
    assert _stages([1] * 10, stage_boundaries(_layers([1] * 10), 4)) == [2, 2, 3, 3]


def test_head_and_output_stay_together() -> None:
    costs = layer_costs(DECODER_ONLY)
    assert max(stage_boundaries(costs, 5)) <= len(costs) - 2
    with pytest.raises(ValueError, match="use 1 to 5"):
        stage_boundaries(costs, 6)


def test_another_load_moves_the_cut() -> None:
    loads = [1] * 8
    cuts = stage_boundaries(_layers(loads), 2, weight=lambda cost: 7.0 if cost.name.endswith(".0") else 1.0)
    assert cuts == (1,)


def test_a_pattern_costs_what_its_layers_cost_and_moves_the_cuts() -> None:
    """A layer costs what it does in a stack of its own kind; dense layers in front leave fewer to their stage."""
    data = DataConfig(encoder_seq_length=2048, decoder_seq_length=2048)
    dense: Branches = ("causal", "local", "axial")
    sparse: Branches = ("local",)
    shape: dict[str, Any] = {"hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8, "encoder_layers": 0}
    shape |= {"decoder_layers": 8, "vocab_size": 512}
    alike = [
        layer_costs(RunConfig(model=ModelConfig(**shape, decoder_branches=branches), data=data))[1]
        for branches in (dense, sparse)
    ]
    model = ModelConfig(**shape, decoder_branches=(dense,) * 4 + (sparse,) * 4)
    costs = layer_costs(RunConfig(model=model, data=data))
    assert [(c.parameters, c.forward_flops) for c in costs[1:9]] == [
        (c.parameters, c.forward_flops) for c in [alike[0]] * 4 + [alike[1]] * 4
    ]
    assert [costs[i].kind for i in (1, 8)] == ["decoder [causal, local, axial]", "decoder [local]"]
    assert parameter_count(model) == sum(cost.parameters for cost in costs)
    assert stage_boundaries(costs, 2)[0] < stage_boundaries([costs[0], *[alike[0]] * 8, *costs[9:]], 2)[0]
