"""The composition root: the only file that knows every floor. Turns a checked configuration into a running training."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_omega import accounting
from megatron_omega.checkpoint.store import CheckpointStore
from megatron_omega.config.load import ResolvedRun, dump_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.batch import Batch
from megatron_omega.data.loader import Loader, micro_batch_indices
from megatron_omega.data.sources import SampleSource, Sources, open_sources
from megatron_omega.environment import ProcessPlace, require_repeatable_libraries
from megatron_omega.errors import ConfigError
from megatron_omega.log import configure_logging, get_logger
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import PORTABLE, Kernels, apex_notice, select_kernels
from megatron_omega.model.omega import Omega
from megatron_omega.model.pipeline import build_pipeline
from megatron_omega.monitoring import monitoring_hooks
from megatron_omega.monitoring.forecast import Forecast
from megatron_omega.parallel.topology import Layout, Topology, create_topology
from megatron_omega.planner.forecast import forecast, machine_called
from megatron_omega.training.batch_size import batch_size_at
from megatron_omega.training.engine import (
    Engine,
    MicroBatch,
    check_precision,
    construction,
    start_distributed,
    stop_distributed,
)
from megatron_omega.training.hooks import Hook, Hooks
from megatron_omega.training.loop import Batches, OpenBatches, Trainer
from megatron_omega.training.state import RunContext, TrainState
from megatron_omega.training.throughput import peak_flops

log = get_logger(__name__)


def train(resolved: ResolvedRun, place: ProcessPlace) -> TrainState:
    """Train the run that was asked for, as process `place`; return where it stands at the end.

    Corpus, accelerator and run folder are checked before any process group exists.
    """
    config = resolved.config
    configure_logging(rank=place.rank)
    logging.captureWarnings(capture=True)
    for notice in (*resolved.notices, *filter(None, [apex_notice()])):
        log.warning(notice)
    check_precision(config.precision.dtype)
    sources = open_sources(config)
    if place.rank == 0:
        _prepare_run_directory(config)
    _seed_everything(config)
    device_type = start_distributed(local_rank=place.local_rank, timeout_seconds=config.parallel.timeout_seconds)
    try:
        topology = create_topology(layout_of(config, place.world_size))
        return _trainer(resolved, sources, topology, select_kernels(device_type)).run(_context(config, topology))
    finally:
        stop_distributed()


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


def build_engine(
    config: RunConfig, values: Mapping[str, Any], topology: Topology, kernels: Kernels = PORTABLE
) -> Engine:
    """Build model and engine. `values` is the resolved DeepSpeed configuration. Collective."""
    with construction(values, topology):
        model = build_model(config, topology, kernels)
    return Engine(model, values, config.optimizer, topology)


def model_identity(config: RunConfig, tokenizer_fingerprint: str) -> dict[str, Any]:
    """Return what a checkpoint must share with a run to be loaded into it."""
    return {"model": config.model.model_dump(mode="json"), "tokenizer": tokenizer_fingerprint}


def _trainer(resolved: ResolvedRun, sources: Sources, topology: Topology, kernels: Kernels) -> Trainer:
    config = resolved.config
    store = CheckpointStore(
        _run_directory(config) / "checkpoints",
        config=config.checkpoint,
        topology=topology,
        identity=model_identity(config, sources.tokenizer.fingerprint),
        run_config=config.model_dump(mode="json"),
    )
    _refuse_foreign_checkpoint(config, store)
    engine = build_engine(config, resolved.deepspeed.values, topology, kernels)
    for choice in (*kernels.choices, engine.optimizer_choice):
        log.info(choice)
    peak = peak_flops(topology.layout.world_size, config.precision.dtype, config.logging.peak_flops)
    return Trainer(
        config,
        engine,
        store,
        Batches(
            _open_batches(config, sources.train, engine),
            _open_batches(config, sources.validation, engine) if len(sources.validation) else None,
        ),
        Hooks([*monitoring_hooks(config.logging, is_main=topology.rank == 0), *_forecast_hooks(resolved, topology)]),
        flops_per_sample=accounting.training_flops_per_sample(config),
        peak_flops=peak or float("inf"),
    )


def _refuse_foreign_checkpoint(config: RunConfig, store: CheckpointStore) -> None:
    """Raise CheckpointError where the run would go on from another model's checkpoint, before anything is allocated."""
    resumes = config.checkpoint.resume and store.find_latest() is not None
    if not resumes and config.checkpoint.load is not None:
        store.resolve(config.checkpoint.load)


def _forecast_hooks(resolved: ResolvedRun, topology: Topology) -> list[Hook]:
    """Return what logs the planner's forecast, where the planner knows this machine."""
    machine = machine_called(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    if topology.rank or machine is None or not machine.supports(resolved.config.precision.dtype):
        return []
    return [Forecast(forecast(resolved.config, topology.layout.world_size, resolved.deepspeed.zero_stage, machine))]


def _context(config: RunConfig, topology: Topology) -> RunContext:
    directory = _run_directory(config)
    count = accounting.parameter_count(config.model)
    log.info("%s, %s parameters, run folder %s", topology.layout, f"{count:,}", directory)
    details = {"layout": str(topology.layout), "parameters": count, "stage_boundaries": list(stage_boundaries(config))}
    return RunContext(config, directory, TrainState(), is_main=topology.rank == 0, details=details)


def _prepare_run_directory(config: RunConfig) -> None:
    directory = _run_directory(config)
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(dump_config(config))
    except OSError as error:
        raise ConfigError(
            f"logging.run_directory={directory} cannot be written: {error.strerror}; choose another folder"
        ) from None


def _run_directory(config: RunConfig) -> Path:
    return Path(config.logging.run_directory)


def _open_batches(config: RunConfig, source: SampleSource, engine: Engine) -> OpenBatches:
    """Return a function that opens this replica's stream of micro-batches at a number of consumed samples."""
    data, batch = engine.topology.data, config.batch

    @contextmanager
    def open_at(consumed_samples: int) -> Iterator[Iterator[MicroBatch]]:
        if not engine.reads_data:
            yield iter(())
            return
        indices = micro_batch_indices(
            consumed_samples,
            lambda consumed: batch_size_at(batch, consumed),
            batch.micro_batch_size,
            data.rank,
            data.size,
        )
        with Loader(source, indices, config.data.num_workers, config.data.prefetch_batches) as loader:
            yield (to_micro_batch(found) for found in loader)

    return open_at


def to_micro_batch(batch: Batch) -> MicroBatch:
    """Turn a batch of arrays into the tensors the model takes."""
    decoder = (torch.from_numpy(batch.decoder_ids), torch.from_numpy(batch.decoder_segments))
    encoder = (torch.from_numpy(batch.encoder_ids), torch.from_numpy(batch.encoder_segments))
    inputs = (*encoder, *decoder) if batch.encoder_ids.shape[1] else decoder
    return MicroBatch(inputs, (torch.from_numpy(batch.lm_labels), torch.from_numpy(batch.mlm_labels)), batch.num_tokens)


def _seed_everything(config: RunConfig) -> None:
    """Weights and data are keyed by the seed already; libraries that draw on their own get it too."""
    seed = config.training.seed
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if config.training.deterministic:
        require_repeatable_libraries()
        torch.use_deterministic_algorithms(mode=True)
