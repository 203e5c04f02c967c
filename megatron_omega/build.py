"""The composition root: the only file that knows every floor. Turns a checked configuration into a running engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_omega import accounting
from megatron_omega.config.schema import RunConfig
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import PORTABLE, Kernels
from megatron_omega.model.omega import Omega
from megatron_omega.model.pipeline import build_pipeline
from megatron_omega.parallel.topology import Layout, Topology, create_topology
from megatron_omega.training.engine import Engine, construction


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """Return the layout of `world_size` processes."""
    tensor, pipeline = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
    return Layout(pipeline, world_size // (tensor * pipeline), tensor)


def stage_boundaries(config: RunConfig) -> tuple[int, ...]:
    """Return the first layer of every pipeline stage after the first: as configured, or cut by cost."""
    if config.parallel.stage_boundaries is not None:
        return config.parallel.stage_boundaries
    folds = 2 if config.parallel.pipeline_schedule == "dualpipev" else 1
    return accounting.stage_boundaries(accounting.layer_costs(config), folds * config.parallel.pipeline_parallel_size)


def build_model(config: RunConfig, topology: Topology, kernels: Kernels = PORTABLE) -> torch.nn.Module:
    """Build this rank's part of the model: the layer list in order, or its stages. Collective."""
    parallel = topology.tensor_parallel(sequence_parallel=config.parallel.sequence_parallel)
    context = ModelContext.of(config, parallel, kernels)
    if topology.layout.pipeline == 1:
        return Omega(context)
    is_dual = config.parallel.pipeline_schedule == "dualpipev"
    return build_pipeline(context, topology.layout, stage_boundaries(config), dual=is_dual)


def build_engine(config: RunConfig, values: Mapping[str, Any], topology: Topology, kernels: Kernels = PORTABLE) -> Engine:
    """Build model and engine. `values` is the resolved DeepSpeed configuration. Collective."""
    with construction(values, topology):
        model = build_model(config, topology, kernels)
    return Engine(model, values, config.optimizer, topology)


__all__ = ["build_engine", "build_model", "create_topology", "layout_of", "stage_boundaries"]
