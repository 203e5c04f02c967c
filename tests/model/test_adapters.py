"""Low-rank adapters: they begin as nothing, can be merged, and are all that is trained."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from synthetic import micro_batch, small_config

from megatron_omega.config.schema import ADAPTER_TARGETS, AdapterTarget, LoraConfig, RunConfig
from megatron_omega.model.adapters import (
    adapter_names,
    adapter_shapes,
    freeze_all_but_adapters,
    is_adapter,
    is_column,
    merged,
    target_of,
)
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.parameters import declared_parameters

RANK = 4


def build(config: RunConfig, lora: LoraConfig, recompute: str = "none") -> Omega:
    return Omega(replace(ModelContext.of(config), lora=lora, recompute=recompute))


def loss_of(model: Omega, config: RunConfig) -> torch.Tensor:
    batch = micro_batch(0, 2, config)
    return model(batch.inputs, (*batch.labels, torch.tensor([0.1, 0.1]), batch.masked_rows))


@pytest.mark.parametrize("recompute", ["none", "swiglu", "ffn", "full"])
@pytest.mark.parametrize("encoder_layers", [2, 0])
def test_merged_equals_unmerged(encoder_layers: int, recompute: str) -> None:
    config = small_config(model={"encoder_layers": encoder_layers})
    plain, adapted = build(config, LoraConfig()), build(config, LoraConfig(rank=RANK), recompute)
    assert loss_of(adapted, config).item() == loss_of(plain, config).item()
    freeze_all_but_adapters(adapted, is_pipeline=False)
    held = {info.name: parameter for info, parameter in declared_parameters(adapted)}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in held.items():
        if is_adapter(name):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    loss = loss_of(adapted, config)
    loss.backward()
    assert all((parameter.grad is not None) == is_adapter(name) for name, parameter in held.items())
    with torch.no_grad():
        for info, parameter in declared_parameters(plain):
            a, b = adapter_names(info.name)
            if a in held:
                parameter.copy_(merged(parameter, held[a], held[b], LoraConfig(rank=RANK).scale))
    assert loss_of(plain, config).item() == pytest.approx(loss.item(), rel=1e-6)
    assert abs(loss.item() - loss_of(build(config, LoraConfig()), config).item()) > 1e-3


def test_what_is_trained_whole_is_the_table_and_the_norms_gains_and_gates_of_both_stacks() -> None:
    config = small_config()
    model = build(config, LoraConfig(rank=RANK))
    freeze_all_but_adapters(model, is_pipeline=False, also=("table", "vectors"))
    held = {info.name: p for info, p in declared_parameters(model) if p.requires_grad and not is_adapter(info.name)}
    d, heads, size = config.model.hidden_size, config.model.num_attention_heads, config.model.resolved_head_dim
    encoder, decoder = config.model.layer_branches("encoder", 0), config.model.layer_branches("decoder", 0)
    gates = 2 * heads * (d + 1) if "dynamic" in encoder else 0
    expected = config.model.encoder_layers * (2 * d + 2 * len(encoder) * heads * size + gates) + d
    expected += config.model.decoder_layers * (3 * d + 2 * (len(decoder) + 1) * heads * size) + d
    assert held.pop("token_table.weight").numel() == config.model.padded_vocab_size * d
    assert sum(parameter.numel() for parameter in held.values()) == expected


def test_what_is_trained_is_what_the_formula_says() -> None:
    config = small_config()
    choices: list[tuple[AdapterTarget, ...]] = [ADAPTER_TARGETS[:1], ADAPTER_TARGETS[3:], ADAPTER_TARGETS]
    for targets in choices:
        model = build(config, LoraConfig(rank=RANK, targets=targets))
        freeze_all_but_adapters(model, is_pipeline=False)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        expected = 0
        for info, _ in declared_parameters(model):
            if target_of(info.name) in targets:
                inputs = prod(info.shape[-1:] if is_column(info) else info.shape[1:])
                expected += RANK * (inputs + prod(info.shape) // inputs)
                assert all(
                    len(shape) >= 2 for shape in adapter_shapes(info.shape, is_column=is_column(info), rank=RANK)
                )
        assert trained == expected > 0
