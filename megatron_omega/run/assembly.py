"""The composition root: the only file that knows every floor. Turns a checked configuration into a running training."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_omega import accounting
from megatron_omega.checkpoint.store import CheckpointStore
from megatron_omega.config.layout import layout_of, num_stages
from megatron_omega.config.load import ResolvedRun, dump_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.batch import Batch
from megatron_omega.data.inspection import documents_of
from megatron_omega.data.loader import Loader, micro_batch_indices
from megatron_omega.data.samples import SampleSource, Sources, open_sources
from megatron_omega.engine.engine import Engine
from megatron_omega.engine.results import MicroBatch
from megatron_omega.engine.start import (
    check_precision,
    construction,
    start_distributed,
    stop_distributed,
    visible_devices,
)
from megatron_omega.errors import ConfigError, Preempted
from megatron_omega.health.preflight import device_findings, disk_findings, fingerprint, gather_findings
from megatron_omega.health.stragglers import StragglerWatch
from megatron_omega.health.weights import Integrity, has_copies
from megatron_omega.host import run_folder
from megatron_omega.host.environment import ProcessPlace, network_findings, require_repeatable_libraries
from megatron_omega.host.lease import Lease
from megatron_omega.host.redaction import redact, redacted
from megatron_omega.host.run_folder import SUCCESS
from megatron_omega.log import configure_logging, get_logger
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import PORTABLE, Kernels, apex_notice, select_kernels
from megatron_omega.model.omega import Omega
from megatron_omega.model.pipeline import build_pipeline
from megatron_omega.monitoring import monitoring_hooks
from megatron_omega.monitoring.files import mark_success
from megatron_omega.monitoring.forecast import Forecast, peak_bytes
from megatron_omega.monitoring.goodput import GoodputLog
from megatron_omega.monitoring.peak_flops import peak_flops
from megatron_omega.parallel.drawing import DRAWING_VERSION
from megatron_omega.parallel.places import Places, gather_places
from megatron_omega.parallel.topology import Topology, create_topology
from megatron_omega.planner.forecast import forecast, machine_called
from megatron_omega.run.claims import HoldsFolder, claim
from megatron_omega.run.stopping import StopRequests
from megatron_omega.training.batch_size import Interval, samples_of_step
from megatron_omega.training.hooks import Hook, Hooks
from megatron_omega.training.loop import Batches, OpenBatches, Trainer
from megatron_omega.training.state import Fault, RunContext, TrainState
from megatron_omega.watchdog.guard import Sentinel
from megatron_omega.watchdog.hook import Watch

log = get_logger(__name__)


def train(
    resolved: ResolvedRun, place: ProcessPlace, hooks: Sequence[Hook] = (), *, log_level: int = logging.INFO
) -> TrainState:
    """Train the run that was asked for, as process `place`; return where it stands at the end.

    What can be checked is checked before any process group exists, on all ranks together. `hooks` are called after
    the run's own.

    Raises:
        OmegaError: what is wrong with the start; Preempted where the run was asked to stop and has saved.
    """
    config = resolved.config
    configure_logging(rank=place.rank, level=log_level)
    logging.captureWarnings(capture=True)
    for notice in (*resolved.notices, *filter(None, [apex_notice()])):
        log.warning(notice)
    with Sentinel(config, place) as sentinel:
        sources, lease = _preflight(resolved, place, sentinel)
        hooks = (*([HoldsFolder(lease)] if lease is not None else []), *hooks)
        _seed_everything(config)
        device_type = start_distributed(local_rank=place.local_rank, timeout_seconds=config.parallel.timeout_seconds)
        topology = create_topology(layout_of(config, place.world_size))
        trainer = _trainer(resolved, sources, topology, select_kernels(device_type), sentinel, hooks)
        try:
            state = trainer.run(_context(config, topology))
        except Preempted:
            stop_distributed()
            raise
        stop_distributed()
        if topology.rank == 0:
            mark_success(_run_directory(config), state.step)
    return state


def _preflight(resolved: ResolvedRun, place: ProcessPlace, sentinel: Sentinel) -> tuple[Sources, Lease | None]:
    """Check what must hold on this rank, and hear of the others' findings.

    Return the corpus and, on rank 0, the lease of the run folder, in which nothing is changed if anybody has a finding.
    """
    config, is_main = resolved.config, place.rank == 0
    opened: list[Sources] = []
    leases: list[Lease] = []

    def hold_folder() -> None:
        leases.append(claim(config))
        sentinel.at_end(leases[0].release)

    device_type, device_count = visible_devices()
    findings, code = gather_findings(
        {
            "network": network_findings,
            "precision": lambda: check_precision(config.precision.dtype),
            "devices": lambda: device_findings(place.local_rank, device_type=device_type, device_count=device_count),
            "corpus": lambda: opened.append(open_sources(config)),
            "run folder": lambda: hold_folder() if is_main else None,
            "disk": lambda: disk_findings(config) if is_main else None,
        }
    )
    sentinel.arrive(findings, code, fingerprint(resolved))
    if is_main:
        _prepare_run_directory(config)
    return opened[0], next(iter(leases), None)


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
    return Engine(model, values, config.optimizer, topology)


def model_identity(config: RunConfig, tokenizer_fingerprint: str) -> dict[str, Any]:
    """Return what a checkpoint must share with a run to be loaded into it, and how its first weights are drawn."""
    return {
        "model": config.model.model_dump(mode="json"),
        "tokenizer": tokenizer_fingerprint,
        "initialization": DRAWING_VERSION,
    }


def _trainer(
    resolved: ResolvedRun,
    sources: Sources,
    topology: Topology,
    kernels: Kernels,
    sentinel: Sentinel,
    hooks: Sequence[Hook],
) -> Trainer:
    config = resolved.config
    store = CheckpointStore(
        _run_directory(config) / run_folder.CHECKPOINTS,
        config=config.checkpoint,
        topology=topology,
        identity=model_identity(config, sources.tokenizer.fingerprint),
        run_config=redacted(config.model_dump(mode="json")),
    )
    _refuse_foreign_checkpoint(config, store)
    baseline = peak_bytes()
    engine = build_engine(config, resolved.deepspeed.values, topology, kernels)
    for choice in (*kernels.choices, engine.optimizer_choice):
        log.info(choice)
    peak = peak_flops(topology.layout.world_size, config.precision.dtype, config.logging.peak_flops)
    monitoring, places = Hooks(_monitoring(config, sources, topology)), gather_places(topology.layout, store.peers)
    return Trainer(
        config,
        engine,
        store,
        Batches(
            _open_batches(config, sources.train, engine),
            _open_batches(config, sources.validation, engine) if len(sources.validation) else None,
        ),
        Hooks(
            [
                Watch(sentinel, config),
                *_straggler_hooks(config, places, tell=monitoring.on_fault),
                monitoring,
                *_forecast_hooks(resolved, topology, baseline),
                *([GoodputLog()] if topology.rank == 0 else []),
                *hooks,
            ]
        ),
        flops_per_sample=accounting.training_flops_per_sample(config),
        peak_flops=peak or float("inf"),
        guard=_integrity(config, engine, places),
        stop_requested=StopRequests(
            _run_directory(config),
            is_main=topology.rank == 0,
            max_minutes=config.resilience.max_minutes,
            stop_signal=lambda: sentinel.stop_signal,
            started=sentinel.started,
            device=engine.device,
        ).agreed,
    )


def _refuse_foreign_checkpoint(config: RunConfig, store: CheckpointStore) -> None:
    """Raise CheckpointError where the run would go on from another model's checkpoint, before anything is allocated."""
    resumes = config.checkpoint.resume and store.find_latest() is not None
    if not resumes and config.checkpoint.load is not None:
        store.resolve(config.checkpoint.load)


def _monitoring(config: RunConfig, sources: Sources, topology: Topology) -> list[Hook]:
    return monitoring_hooks(
        config.logging,
        is_main=topology.rank == 0,
        documents_of=lambda samples: documents_of(sources.train, chain.from_iterable(samples)),
    )


def _integrity(config: RunConfig, engine: Engine, places: Places) -> Integrity | None:
    """Return what compares weights between ranks; None where it is not wanted, or no weight is held twice."""
    interval = config.resilience.integrity_interval_steps
    if interval == 0 or not has_copies(engine.deepspeed, places.layout):
        return None
    return Integrity(engine.deepspeed, engine.topology, places, interval_steps=interval)


def _straggler_hooks(config: RunConfig, places: Places, tell: Callable[[Fault], None]) -> list[Hook]:
    """Return what measures ranks against their peers, where they have any."""
    window = config.resilience.straggler_window
    if window == 0 or places.layout.data * places.layout.tensor == 1:
        return []
    return [StragglerWatch(places.layout, places, window=window, tell=tell)]


def _forecast_hooks(resolved: ResolvedRun, topology: Topology, baseline: int) -> list[Hook]:
    """Return what logs the planner's forecast, where the planner knows this machine.

    `baseline` is the process's memory before the engine.
    """
    machine = machine_called(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    if topology.rank or machine is None or not machine.supports(resolved.config.precision.dtype):
        return []
    estimate = forecast(resolved.config, topology.layout.world_size, resolved.deepspeed.zero_stage, machine)
    return [Forecast(estimate, baseline)]


def _context(config: RunConfig, topology: Topology) -> RunContext:
    directory = _run_directory(config)
    count = accounting.parameter_count(config.model)
    log.info("%s, %s parameters, run folder %s", topology.layout, f"{count:,}", directory)
    details = {"layout": str(topology.layout), "parameters": count, "stage_boundaries": list(stage_boundaries(config))}
    return RunContext(config, directory, TrainState(), is_main=topology.rank == 0, details=details)


def _prepare_run_directory(config: RunConfig) -> None:
    directory = _run_directory(config)
    try:
        (directory / SUCCESS).unlink(missing_ok=True)
        (directory / run_folder.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (directory / run_folder.CONFIG).write_text(redact(dump_config(config)))
    except OSError as error:
        raise ConfigError(
            f"logging.run_directory={directory} cannot be written: {error.strerror}; choose another folder"
        ) from None


def _run_directory(config: RunConfig) -> Path:
    return Path(config.logging.run_directory)


def _open_batches(config: RunConfig, source: SampleSource, engine: Engine) -> OpenBatches:
    """Return a function that opens this replica's stream of micro-batches at a place in the data."""
    data, batch = engine.topology.data, config.batch

    @contextmanager
    def open_at(consumed_samples: int, left_out: Sequence[Interval]) -> Iterator[Iterator[MicroBatch]]:
        if not engine.reads_data:
            yield iter(())
            return
        indices = micro_batch_indices(
            consumed_samples,
            lambda consumed: samples_of_step(batch, consumed, left_out),
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
