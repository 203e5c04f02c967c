"""The whole of a training: preflight, process group, assembly, the loop, the mark of success."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from megatron_omega import accounting
from megatron_omega.checkpoint.initial import InitialWeights
from megatron_omega.config.layout import layout_of, reads_data
from megatron_omega.config.load import ResolvedRun, dump_config
from megatron_omega.config.paths import with_absolute_paths
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.sources import Sources, open_sources, open_tokenizer, sources_fingerprint
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.engine.start import (
    check_precision,
    start_distributed,
    stop_distributed,
    visible_devices,
)
from megatron_omega.errors import ConfigError, Preempted
from megatron_omega.health.preflight import (
    device_findings,
    disk_findings,
    fingerprint,
    gather_findings,
    open_files_findings,
)
from megatron_omega.host import run_folder
from megatron_omega.host.environment import ProcessPlace, network_findings, require_repeatable_libraries
from megatron_omega.host.lease import Lease
from megatron_omega.host.redaction import redact
from megatron_omega.host.run_folder import SUCCESS
from megatron_omega.log import configure_logging, get_logger, keep_log
from megatron_omega.model.kernels import apex_notice, select_kernels
from megatron_omega.monitoring.files import mark_success
from megatron_omega.parallel.counting import count_messages, device_progress
from megatron_omega.parallel.topology import Topology, create_topology
from megatron_omega.run.assembly import assemble, model_identity
from megatron_omega.run.claims import claim
from megatron_omega.run.compilation import share_cache
from megatron_omega.run.construction import stage_boundaries
from megatron_omega.run.live import MakeAnswer
from megatron_omega.run.resuming import changes_on_resuming
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import RunContext, TrainState
from megatron_omega.watchdog.guard import Guard

log = get_logger(__name__)


def train(
    resolved: ResolvedRun,
    place: ProcessPlace,
    hooks: Sequence[Hook] = (),
    *,
    initial: InitialWeights | None = None,
    log_level: int = logging.INFO,
    answering: MakeAnswer | None = None,
) -> TrainState:
    """Train the run that was asked for, as process `place`; return where it stands at the end.

    What can be checked is checked before any process group exists, on all ranks together. `hooks` are called after
    the run's own; `answering` makes what answers held-out prompts in validations. `initial` are the weights of
    checkpoint.load, if those are no checkpoint: nothing but weights.

    Raises:
        OmegaError: what is wrong with the start; Preempted where the run was asked to stop and has saved.
    """
    facts = fingerprint(resolved, has_code=place.local_rank == 0)
    config = _settled(resolved.config, has_initial=initial is not None)
    resolved = replace(resolved, config=config)
    configure_logging(rank=place.rank, level=log_level)
    logging.captureWarnings(capture=True)
    if resolved.derived:
        log.info("derived: %s", ", ".join(f"{one.name}={one.value}" for one in resolved.derived))
    for notice in (*resolved.notices, *filter(None, [apex_notice()])):
        log.warning(notice)
    with Guard(config, place) as guard:
        tokenizer, sources, lease = _preflight(config, place, guard, facts)
        _keep_own_log(config, place)
        if config.training.compile == "layers":
            share_cache(Path(config.logging.run_directory), place)
        _seed_everything(config)
        device_type = start_distributed(local_rank=place.local_rank, timeout_seconds=config.parallel.timeout_seconds)
        timeout = timedelta(seconds=config.parallel.timeout_seconds)
        topology = create_topology(layout_of(config, place.world_size), timeout=timeout)
        guard.ask_device = device_progress(device_type)
        guard.at_end(count_messages(guard.ledger))
        kernels = select_kernels(device_type)
        trainer = assemble(
            resolved, tokenizer, sources, topology, kernels, guard,
            lease=lease, initial=initial, hooks=hooks, answering=answering,
        )  # fmt: skip
        try:
            state = trainer.run(_context(config, topology))
        except Preempted:
            stop_distributed()
            raise
        stop_distributed()
        if topology.rank == 0:
            mark_success(Path(config.logging.run_directory), state.step)
        if state.best_step not in (-1, state.step):
            log.info("the best validation was that of step %d", state.best_step)
    return state


def _settled(config: RunConfig, *, has_initial: bool) -> RunConfig:
    """Return the settings as a run writes them down: paths absolute; of an export only weights can be taken."""
    config = with_absolute_paths(config)
    if not has_initial:
        return config
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"load_weights_only": True})})


def _preflight(
    config: RunConfig, place: ProcessPlace, guard: Guard, facts: Mapping[str, str]
) -> tuple[Tokenizer, Sources | None, Lease | None]:
    """Check what must hold on this rank, and hear of the others' findings.

    Return the tokenizer, the corpus on ranks that read it and, on rank 0, the lease of the run folder, in which nothing
    is changed if anybody has a finding.
    """
    is_main, layout = place.rank == 0, layout_of(config, place.world_size)
    tokenizers: list[Tokenizer] = []
    opened: list[Sources] = []
    leases: list[Lease] = []
    told: list[str] = []

    def hold_folder() -> None:
        leases.append(claim(config))
        guard.at_end(leases[0].release)

    def compare() -> None:
        identity = model_identity(config, tokenizers[0].fingerprint)
        told.extend(changes_on_resuming(config, identity, opened[0].fingerprints))

    def open_corpus() -> None:
        if reads_data(config, layout, place.rank):
            opened.append(open_sources(config))
        tokenizers.append(opened[0].tokenizer if opened else open_tokenizer(config))

    device_type, device_count = visible_devices()
    findings, code = gather_findings(
        {
            "network": network_findings,
            "precision": lambda: check_precision(config.precision.dtype),
            "devices": lambda: device_findings(place.local_rank, device_type=device_type, device_count=device_count),
            "open files": lambda: open_files_findings(place.rank, layout, device_type),
            "corpus": open_corpus,
            "run folder": lambda: hold_folder() if is_main else None,
            "disk": lambda: disk_findings(config) if is_main else None,
            "checkpoint": lambda: compare() if is_main and opened else None,
        }
    )
    guard.arrive(findings, code, {**facts, **({"corpus": sources_fingerprint(opened[0])} if opened else {})})
    for notice in (notice for one in opened for notice in one.notices):
        log.info(notice)
    if is_main:
        _prepare_run_directory(config, tokenizers[0])
    for notice in told:
        log.info("not as in the checkpoint: %s", notice)
    return tokenizers[0], next(iter(opened), None), next(iter(leases), None)


def _context(config: RunConfig, topology: Topology) -> RunContext:
    directory = Path(config.logging.run_directory)
    count = accounting.parameter_count(config.model)
    log.info("%s, %s parameters, run folder %s", topology.layout, f"{count:,}", directory)
    details = {"layout": str(topology.layout), "parameters": count, "stage_boundaries": list(stage_boundaries(config))}
    return RunContext(config, directory, TrainState(), is_main=topology.rank == 0, details=details)


def _prepare_run_directory(config: RunConfig, tokenizer: Tokenizer) -> None:
    directory = Path(config.logging.run_directory)
    try:
        (directory / SUCCESS).unlink(missing_ok=True)
        (directory / run_folder.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (directory / run_folder.TOKENIZER).write_bytes(tokenizer.model)
        (directory / run_folder.CONFIG).write_text(redact(dump_config(config)))
    except OSError as error:
        raise ConfigError(
            f"logging.run_directory={directory} cannot be written: {error.strerror}; choose another folder"
        ) from None


def _keep_own_log(config: RunConfig, place: ProcessPlace) -> None:
    if place.world_size == 1:
        return
    try:
        keep_log(Path(config.logging.run_directory) / run_folder.LOGS / f"rank-{place.rank:05d}.log")
    except OSError as error:
        log.warning("rank %d keeps no log of its own: %s", place.rank, error)


def _seed_everything(config: RunConfig) -> None:
    """Weights and data are keyed by the seed already; libraries that draw on their own get it too."""
    seed = config.training.seed
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if config.training.deterministic:
        require_repeatable_libraries()
        torch.use_deterministic_algorithms(mode=True)
    torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")
