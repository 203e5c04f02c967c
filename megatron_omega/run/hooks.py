"""The hooks of a run: which there are, in which order they are called, and why each stands where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch

from megatron_omega.config.load import ResolvedRun
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.inspection import documents_of
from megatron_omega.data.sources import Sources
from megatron_omega.health.stragglers import StragglerWatch
from megatron_omega.host.lease import Lease
from megatron_omega.monitoring import monitoring_hooks
from megatron_omega.monitoring.epochs import EpochLog, Epochs
from megatron_omega.monitoring.files import EventsFile, MetricsFile
from megatron_omega.monitoring.forecast import Forecast
from megatron_omega.monitoring.goodput import GoodputLog
from megatron_omega.monitoring.plot import LossPlot
from megatron_omega.monitoring.progress import ProgressBar
from megatron_omega.monitoring.trackers import TensorBoard, Wandb
from megatron_omega.parallel.places import Places
from megatron_omega.parallel.topology import Topology
from megatron_omega.planner.forecast import RunForecast, forecast
from megatron_omega.planner.machine import this_machine
from megatron_omega.run.claims import HoldsFolder
from megatron_omega.run.compilation import CompiledLayers, compilation_hooks
from megatron_omega.run.profiling import Profiling
from megatron_omega.training.garbage import GarbageCollection
from megatron_omega.training.hooks import Hook, Hooks
from megatron_omega.training.state import Fault
from megatron_omega.watchdog.guard import Guard
from megatron_omega.watchdog.hook import Watch

ORDER: tuple[tuple[type[Hook], str], ...] = (
    (Watch, "first: the monitor must hear of a phase before another hook can hang in it"),
    (StragglerWatch, "before what writes, so that a finding about a step is written with it; it communicates"),
    (EventsFile, "before every other record: what happened is on disk if a later hook fails"),
    (MetricsFile, "after the events, before what draws or sends the same figures"),
    (ProgressBar, "after the files: it shows what they hold"),
    (EpochLog, "behind the bar, whose line it would tear"),
    (TensorBoard, "after the run's own files: optional"),
    (Wandb, "after TensorBoard: optional, and its network may be slow"),
    (LossPlot, "after everything that writes figures: it reads them back from the files"),
    (Forecast, "behind the plot: its comparison is the last word on a run's time"),
    (GoodputLog, "behind EventsFile, whose last line it reads"),
    (GarbageCollection, "behind all that make garbage: what is frozen at the start includes theirs"),
    (Profiling, "behind the garbage: what happens between two steps is no part of either"),
    (CompiledLayers, "behind what reports a step: its warnings belong under that step's line"),
    (HoldsFolder, "last of the run's own: when it ends the run, all others have begun and can close"),
)
"""Every hook of a run in the order of its calls, with the reason for its place. The caller's own come after these."""


def run_hooks(
    resolved: ResolvedRun,
    sources: Sources | None,
    topology: Topology,
    guard: Guard,
    *,
    places: Places,
    lease: Lease | None,
    baseline: int,
    profiling: Sequence[Hook] = (),
) -> list[Hook]:
    """Return the hooks of a run on this rank, in the order of `ORDER`.

    `lease` is that of the run folder, on rank 0; `baseline` is the process's memory before the engine.
    """
    config = resolved.config
    monitoring = _monitoring(config, sources) if sources is not None and topology.rank == 0 else []
    return in_order(
        [
            Watch(guard, config),
            *_straggler_hooks(config, places, tell=Hooks(monitoring).on_fault),
            *monitoring,
            *_forecast_hooks(resolved, topology, baseline),
            GarbageCollection(),
            *([GoodputLog()] if topology.rank == 0 else []),
            *profiling,
            *compilation_hooks(config),
            *([HoldsFolder(lease)] if lease is not None else []),
        ]
    )


def in_order(hooks: Iterable[Hook]) -> list[Hook]:
    """Return `hooks` as `ORDER` has them. Raises ValueError for one that has no place there."""
    places = {kind: place for place, (kind, _) in enumerate(ORDER)}
    hooks = list(hooks)
    homeless = [type(hook).__name__ for hook in hooks if type(hook) not in places]
    if homeless:
        raise ValueError(f"{homeless[0]} has no place in run.hooks.ORDER; give it one, with the reason")
    return sorted(hooks, key=lambda hook: places[type(hook)])


def _monitoring(config: RunConfig, sources: Sources) -> list[Hook]:
    return monitoring_hooks(
        config.logging,
        is_main=True,
        documents_of=lambda samples: documents_of(sources.train, chain.from_iterable(samples)),
        epochs_at=lambda samples: Epochs(*sources.train.epochs(samples)),
    )


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
    machine = this_machine(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    if resolved.config.lora.is_on:  # the planner prices training the whole model
        return []
    if topology.rank or machine is None or not machine.hardware.supports(resolved.config.precision.dtype):
        return []
    world_size, stage = topology.layout.world_size, resolved.deepspeed.zero_stage
    estimate = forecast(resolved.config, world_size, stage, machine.hardware)
    return [Forecast(RunForecast(estimate, machine, baseline))]
