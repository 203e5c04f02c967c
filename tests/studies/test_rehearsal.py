"""The plan against the real model code: every quantity of every distinct stage, on fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_omega.accounting import layer_costs
from megatron_omega.config.schema import (
    DECODER_BRANCHES,
    ENCODER_BRANCHES,
    BatchConfig,
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
)
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import flow, omega_layers
from megatron_omega.planner.activations import Shape, decoder_layer, encoder_layer, facts
from megatron_omega.planner.candidates import parse_label
from megatron_omega.studies.rehearsal import Comparison, Rehearsal, count_stage, fake_world

CARD = ModelConfig(encoder_layers=3, decoder_layers=3)
T5 = ModelConfig(
    hidden_size=128, ffn_hidden_size=512, num_attention_heads=8, encoder_layers=2, decoder_layers=2,
    encoder_branches=("full",), decoder_branches=("causal",), positions="learned", vocab_size=500, mlm_head=False,
)  # fmt: skip
LLAMA = ModelConfig(
    hidden_size=128, ffn_hidden_size=512, num_attention_heads=8, encoder_layers=0, decoder_layers=4,
    decoder_branches=("causal", "local"), vocab_size=500,
)  # fmt: skip

PATTERN = ModelConfig(
    hidden_size=96, ffn_hidden_size=256, num_attention_heads=8, encoder_layers=3, decoder_layers=4, vocab_size=500,
    encoder_branches=(("full", "local"), ("local", "axial", "dynamic")), decoder_branches=(("causal",), ("local", "axial")),
    local_window=32, positions="learned",
)  # fmt: skip

SPARSE = ModelConfig(
    hidden_size=96, ffn_hidden_size=256, num_attention_heads=8, encoder_layers=2, decoder_layers=4, vocab_size=500,
    encoder_branches=("full", "local", "axial"), decoder_branches=(("select",), ("select", "local"), ("causal", "axial")),
    local_window=32, attention_sinks=True, select_blocks=3,
)  # fmt: skip


def _config(model: ModelConfig, dtype: str, encoder: int, decoder: int) -> RunConfig:
    return RunConfig(
        model=model, data=DataConfig(encoder_seq_length=encoder, decoder_seq_length=decoder),
        precision=PrecisionConfig.model_validate({"dtype": dtype}), batch=BatchConfig(global_batch_size=1024),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "dtype", "lengths", "label"),
    [
        (CARD, "bf16", (512, 768), "tp8sp-pp4-dp32-mb1-full-zero1"),
        (CARD, "bf16", (512, 768), "tp16-pp1-dp64-mb2-none-zero3"),
        (CARD, "fp32", (768, 512), "tp2sp-pp2v-dp256-mb1-ffn-zero1"),
        (T5, "fp32", (96, 160), "tp4sp-pp3-dp1-mb3-swiglu-zero1"),
        (T5, "bf16", (96, 160), "tp1-pp1-dp1-mb1-full-zero1"),
        (PATTERN, "bf16", (96, 160), "tp2sp-pp4-dp1-mb1-none-zero1"),
        (PATTERN, "fp32", (96, 160), "tp1-pp2v-dp1-mb1-full-zero1"),
        (SPARSE, "bf16", (96, 160), "tp2sp-pp4-dp1-mb1-none-zero1"),
        (SPARSE, "fp32", (96, 160), "tp4-pp2-dp1-mb2-none-zero1"),
        (SPARSE, "fp32", (96, 160), "tp1-pp2v-dp1-mb1-full-zero1"),
        (PATTERN, "fp32", (96, 160), "tp2sp-pp2i3-dp1-mb1-ffn-zero1"),
        (LLAMA, "bf16", (0, 200), "tp2-pp3-dp4-mb2-none-zero1"),
        (LLAMA, "fp32", (0, 200), "tp8sp-pp2-dp4-mb1-full-zero1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_plan_and_real_code_agree(model: ModelConfig, dtype: str, lengths: tuple[int, int], label: str) -> None:
    candidate = parse_label(label)
    with fake_world(candidate.world_size):
        comparisons = Rehearsal(_config(model, dtype, *lengths)).compare(candidate)
    assert comparisons and [c for c in comparisons if c.predicted != c.counted] == []


def test_a_difference_is_seen() -> None:
    assert not Comparison("0", "parameters", 1000, 1001).agrees
    assert Comparison("0", "kept bytes", 1000, 1009, tolerance=0.01).agrees
    assert not Comparison("0", "kept bytes", 1000, 1011, tolerance=0.01).agrees


def test_flops_are_those_of_the_flop_counter() -> None:
    """Forward and backward of one layer of each kind on the meta device."""
    config = _config(CARD, "bf16", 512, 512)
    context = ModelContext.of(
        config.model_copy(update={"parallel": config.parallel.model_copy(update={"recompute": "none"})})
    )
    costs = {cost.name: cost for cost in layer_costs(config)}
    recipes = {recipe.name: recipe for recipe in omega_layers(context)}
    with torch.device("meta"):
        segments = torch.ones(1, 512, dtype=torch.int64)
        for name in ("encoder.layers.0", "decoder.layers.0"):
            hidden, memory = (torch.empty(1, 512, 960, requires_grad=True) for _ in range(2))
            module = recipes[name].modules[0]
            layer = module.build()
            is_encoder = name.startswith("encoder")
            state = (hidden, *[segments] * 3) if is_encoder else (memory, hidden, segments, segments)
            with FlopCounterMode(display=False) as counter:
                output = module.apply(layer, flow(state, context.kernels))[0 if is_encoder else 1]
                torch.autograd.backward([output], [torch.empty_like(output)])
            assert counter.get_total_flops() == 3 * costs[name].forward_flops


def test_kept_bytes_are_those_of_a_run_on_the_cpu() -> None:
    """A rehearsal calls the CPU's fused attention by name and takes a row for one document; a run keeps the same."""
    config = _config(CARD.model_copy(update={"ffn_hidden_size": 128}), "bf16", 256, 256)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"recompute": "none"})})
    shape, context = Shape.of(config), ModelContext.of(config)
    recipes = {recipe.name: recipe for recipe in omega_layers(context)}
    encoder = encoder_layer(config, shape, ENCODER_BRANCHES) + facts(config, shape, ENCODER_BRANCHES, ())
    decoder = decoder_layer(config, shape, DECODER_BRANCHES) + facts(config, shape, (), DECODER_BRANCHES)
    segments = torch.tensor([[1] * 100 + [0] * 28 + [2] * 128])
    for name, predicted in (("encoder.layers.0", encoder), ("decoder.layers.0", decoder + shape.whole(256))):
        module = recipes[name].modules[0]
        layer = module.build().bfloat16()
        held = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(
            tensor: torch.Tensor, held: set[int] = held, kept: dict[int, torch.UntypedStorage] = kept
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                kept.setdefault(storage.data_ptr(), storage)
            return tensor

        hidden, memory = (torch.randn(1, 256, 960, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        is_encoder = name.startswith("encoder")
        state = (hidden, *[segments] * 3) if is_encoder else (memory, hidden, segments, segments)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module.apply(layer, flow(state, context.kernels))
        assert sum(storage.nbytes() for storage in kept.values()) == predicted


def test_the_bridge_sends_memory_hidden_and_both_segments() -> None:
    config = _config(CARD, "bf16", 512, 768)
    with fake_world(8):
        counts = count_stage(config, 4, 5)  # the bridge alone
    assert counts.sent_forward == [512 * 960 * 2, 768 * 960 * 2, 512 * 8, 768 * 8]
    assert counts.sent_backward == [512 * 960 * 2, 768 * 960 * 2]
    assert counts.parameters == 960 + 32768 * 960
