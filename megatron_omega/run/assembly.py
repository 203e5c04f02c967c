"""The objects of one run, put together: the only file that knows every room."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from megatron_omega import accounting
from megatron_omega.checkpoint.adapters import IDENTITY, Base, adapter_identity, find_base
from megatron_omega.checkpoint.initial import InitialWeights
from megatron_omega.checkpoint.store import CheckpointStore
from megatron_omega.config.load import ResolvedRun
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.sources import Sources
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.engine.engine import Engine
from megatron_omega.engine.start import visible_devices
from megatron_omega.health.weights import Integrity, has_copies
from megatron_omega.host import run_folder
from megatron_omega.host.lease import Lease
from megatron_omega.host.redaction import redacted
from megatron_omega.log import get_logger
from megatron_omega.model.kernels import Kernels
from megatron_omega.monitoring.forecast import held_bytes
from megatron_omega.monitoring.peak_flops import peak_flops
from megatron_omega.parallel.counting import open_rows
from megatron_omega.parallel.drawing import DRAWING_VERSION
from megatron_omega.parallel.places import Places, gather_places
from megatron_omega.parallel.topology import Topology
from megatron_omega.run.batches import open_batches
from megatron_omega.run.construction import build_engine
from megatron_omega.run.faulty_hosts import part_with_host, refuse_slow_hosts
from megatron_omega.run.hooks import run_hooks
from megatron_omega.run.live import LiveRun, MakeAnswer
from megatron_omega.run.profiling import profiling_hooks
from megatron_omega.run.stopping import StopRequests
from megatron_omega.training.hooks import Hook, Hooks
from megatron_omega.training.loop import Answer, Batches, Trainer
from megatron_omega.watchdog.guard import Guard

log = get_logger(__name__)


def assemble(
    resolved: ResolvedRun,
    tokenizer: Tokenizer,
    sources: Sources | None,
    topology: Topology,
    kernels: Kernels,
    guard: Guard,
    *,
    lease: Lease | None,
    initial: InitialWeights | None = None,
    hooks: Sequence[Hook] = (),
    answering: MakeAnswer | None = None,
) -> Trainer:
    """Put the objects of one run together. `hooks` are called after the run's own. Collective.

    `sources` is None on ranks that read no data; the first one, which does, tells them what they need to know of it.
    `initial` are the weights of checkpoint.load, if those are no checkpoint.
    `answering` makes what answers held-out prompts in validations, if the run wants answers.

    Raises:
        CheckpointError: the run would go on from another model's checkpoint; nothing is allocated yet.
    """
    config = resolved.config
    store = _open_store(config, topology, tokenizer, sources, initial)
    _refuse_foreign_checkpoint(config, store)
    validates = bool(store.peers.agree(sources is not None and len(sources.validation) > 0))
    places = gather_places(topology.layout, store.peers)
    refuse_slow_hosts(config, places, store.peers, device_type=visible_devices()[0])
    baseline = held_bytes()
    engine = _start_engine(resolved, topology, kernels, store)
    open_rows(guard.ledger)
    log.info("kernels: %s", "; ".join((*kernels.choices, engine.optimizer_choice)))
    peak = peak_flops(topology.layout.world_size, config.precision.dtype, config.logging.peak_flops)
    own = run_hooks(
        resolved, sources, topology, guard, places=places, lease=lease, baseline=baseline,
        profiling=profiling_hooks(config, engine),
    )  # fmt: skip
    return Trainer(
        config,
        engine,
        store,
        Batches(
            open_batches(config, sources and sources.train, engine),
            open_batches(config, sources and sources.validation, engine) if validates else None,
        ),
        Hooks([*own, *hooks]),
        flops_per_sample=accounting.training_flops_per_sample(config),
        peak_flops=peak or float("inf"),
        weight_check=_integrity(config, engine, places),
        answer=_answer(config, sources, store, engine, answering),
        part_with=partial(part_with_host, Path(config.logging.run_directory), is_main=topology.rank == 0),
        stop_requested=StopRequests(
            Path(config.logging.run_directory),
            is_main=topology.rank == 0,
            max_minutes=config.resilience.max_minutes,
            stop_signal=lambda: guard.stop_signal,
            started=guard.started,
            device=engine.device,
        ).agreed,
    )


def _open_store(
    config: RunConfig,
    topology: Topology,
    tokenizer: Tokenizer,
    sources: Sources | None,
    initial: InitialWeights | None,
) -> CheckpointStore:
    return CheckpointStore(
        Path(config.logging.run_directory) / run_folder.CHECKPOINTS,
        config=config.checkpoint,
        topology=topology,
        identity=model_identity(config, tokenizer.fingerprint),
        run_config=redacted(config.model_dump(mode="json")),
        attachments=attachments_of(tokenizer, sources),
        initial=initial,
    )


def _answer(
    config: RunConfig, sources: Sources | None, store: CheckpointStore, engine: Engine, answering: MakeAnswer | None
) -> Answer | None:
    if not config.evaluation.answers or sources is None:  # all ranks have the corpus where answers are asked for
        return None
    if answering is None:
        log.warning("evaluation.answers=%d: nothing answers in this run", config.evaluation.answers)
        return None
    live = partial(store.live_weights, engine)
    return answering(LiveRun(config, sources, engine.topology, store.peers, engine.device, live))


def _start_engine(resolved: ResolvedRun, topology: Topology, kernels: Kernels, store: CheckpointStore) -> Engine:
    """Build the engine; what is frozen beside adapters is filled at once, since no checkpoint of the run has it."""
    config = resolved.config
    with _engine_output(config, topology):
        engine = build_engine(config, resolved.deepspeed.values, topology, kernels)
    if config.lora.is_on:
        store.start_from(engine, base_of(config))
    return engine


def attachments_of(tokenizer: Tokenizer, sources: Sources | None) -> dict[str, bytes]:
    """Return the files that go with each checkpoint: the tokenizer, and what tells the supervised pairs from others."""
    found = {run_folder.TOKENIZER: tokenizer.model}
    pairs = {} if sources is None else sources.fingerprints
    return found | {run_folder.PAIRS: json.dumps(pairs).encode()} if pairs else found


def model_identity(config: RunConfig, tokenizer_fingerprint: str) -> dict[str, Any]:
    """Return what a checkpoint must share with a run to be loaded into it, and how its first weights are drawn.

    Raises CheckpointError if the weights that adapters stand beside are not there.
    """
    adapters = {IDENTITY: adapter_identity(config.lora, base_of(config))} if config.lora.is_on else {}
    return {
        "model": config.model.model_dump(mode="json"),
        "tokenizer": tokenizer_fingerprint,
        "initialization": DRAWING_VERSION,
        **adapters,
    }


def base_of(config: RunConfig) -> Base:
    """Return the weights that a run's adapters stand beside."""
    assert config.checkpoint.load is not None, "checked with the configuration"
    return find_base(config.checkpoint.load)


@contextmanager
def _engine_output(config: RunConfig, topology: Topology) -> Iterator[None]:
    """Send what DeepSpeed prints while it is set up, tables of memory most of it, to a file of the run folder."""
    path = Path(config.logging.run_directory) / run_folder.ENGINE_LOG if topology.rank == 0 else Path(os.devnull)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file):
        yield


def _refuse_foreign_checkpoint(config: RunConfig, store: CheckpointStore) -> None:
    """Raise CheckpointError where the run would go on from another model's checkpoint, before anything is allocated."""
    resumes = config.checkpoint.resume and store.find_latest() is not None
    if not resumes and config.checkpoint.load is not None and not config.lora.is_on:
        store.resolve(config.checkpoint.load)


def _integrity(config: RunConfig, engine: Engine, places: Places) -> Integrity | None:
    """Return what compares weights between ranks; None where it is not wanted, or no weight is held twice."""
    interval = config.resilience.integrity_interval_steps
    if interval == 0 or not has_copies(engine.deepspeed, places.layout):
        return None
    return Integrity(engine.deepspeed, engine.topology, places, interval_steps=interval)
