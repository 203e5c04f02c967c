"""Model and engine, from a configuration and a topology."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_omega import accounting
from megatron_omega.config.layout import num_stages
from megatron_omega.config.schema import RunConfig
from megatron_omega.engine.engine import Engine, gather_whole
from megatron_omega.engine.start import (
    construction,
)
from megatron_omega.model.adapters import freeze_all_but_adapters
from megatron_omega.model.compilation import LAYERS, compile_layers
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import PORTABLE, Kernels
from megatron_omega.model.omega import Omega
from megatron_omega.model.pipeline import build_pipeline
from megatron_omega.parallel.topology import Topology


def stage_boundaries(config: RunConfig) -> tuple[int, ...]:
    """Return the first layer of every pipeline stage after the first: as configured, or cut by cost."""
    if config.parallel.stage_boundaries is not None:
        return config.parallel.stage_boundaries
    return accounting.stage_boundaries(accounting.layer_costs(config), num_stages(config))


def build_model(config: RunConfig, topology: Topology, kernels: Kernels = PORTABLE) -> torch.nn.Module:
    """Build this rank's part of the model: the layer list in order, or its stages. Collective."""
    parallel = topology.tensor_parallel(sequence_parallel=config.parallel.sequence_parallel)
    context = ModelContext.of(config, parallel, kernels)
    if topology.layout.pipeline == 1:
        return Omega(context)
    schedule = config.parallel.pipeline_schedule
    return build_pipeline(context, topology.layout, stage_boundaries(config), schedule=schedule)


def build_engine(
    config: RunConfig, values: Mapping[str, Any], topology: Topology, kernels: Kernels = PORTABLE
) -> Engine:
    """Build model and engine. `values` is the resolved DeepSpeed configuration. Collective."""
    with construction(values, topology):
        model = build_model(config, topology, kernels)
    if config.lora.is_on:
        freeze_all_but_adapters(model, is_pipeline=topology.layout.pipeline > 1, also=config.lora.also)
    if config.training.compile == "layers":
        compile_layers(model)
        if values["zero_optimization"]["stage"] == 3:
            gather_whole(model, LAYERS)
    return Engine(model, values, config.optimizer, topology)
