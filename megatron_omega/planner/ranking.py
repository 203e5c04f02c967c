"""All layouts of a configuration on a number of accelerators: the legal ones ranked, the others with their reason."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from megatron_omega.config import check
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.planner.candidates import MICRO_BATCHES, Candidate, grids, obstacle, variants
from megatron_omega.planner.estimate import Estimate, Planner
from megatron_omega.planner.hardware import GIB, Hardware, HardwareFile, find_hardware, read_hardware

REFINED = 12
"""Best layouts whose schedule runs on the virtual clock."""


@dataclass
class Refusal:
    """A reason, and the layouts it rules out."""

    reason: str
    count: int = 0
    example: str = ""


@dataclass
class Ranking:
    """Every layout, judged."""

    fitting: list[Estimate] = field(default_factory=list)
    """Fastest first."""
    too_large: list[Estimate] = field(default_factory=list)
    """Legal, but more than the memory; smallest first."""
    refused: dict[str, Refusal] = field(default_factory=dict)
    """By kind of reason."""

    @property
    def total(self) -> int:
        return len(self.fitting) + len(self.too_large) + sum(refusal.count for refusal in self.refused.values())


def rank(
    config: RunConfig, hardware: Hardware, world_size: int, micro_batches: Sequence[int] = MICRO_BATCHES
) -> Ranking:
    """Judge every layout of `config` on `world_size` accelerators, with micro-batches of these sizes.

    Raises:
        ConfigError: the number is none, the configuration contradicts itself, or the machine lacks its format.
    """
    _check(config, hardware, world_size)
    planner, ranking = Planner(config, hardware), Ranking()
    for grid in grids(world_size):
        shared = _obstacle_of_grid(config, hardware, grid, micro_batches)
        for candidate in variants(grid, micro_batches):
            reason = shared or obstacle(config, candidate)
            if reason:
                _refuse(ranking, candidate, reason)
                continue
            estimate = planner.estimate(candidate)
            (ranking.fitting if estimate.fits else ranking.too_large).append(estimate)
    ranking.fitting.sort(key=_order)
    refined = [planner.estimate(estimate.candidate, exact=True) for estimate in ranking.fitting[:REFINED]]
    ranking.fitting[:REFINED] = sorted(refined, key=_order)
    ranking.too_large.sort(key=lambda estimate: estimate.peak_memory)
    return ranking


def best_per_grid(ranking: Ranking) -> list[Estimate]:
    """Return the fastest fitting layout of every grid tensor x pipeline x data, fastest first."""
    best: dict[tuple[int, int], Estimate] = {}
    for estimate in ranking.fitting:
        best.setdefault((estimate.candidate.tensor, estimate.candidate.pipeline), estimate)
    return list(best.values())


def nothing_fits(config: RunConfig, hardware: Hardware, world_size: int, ranking: Ranking) -> ConfigError:
    """Say what lacks, and the nearest thing that would work."""
    if not ranking.too_large:
        reason = next(iter(ranking.refused.values())).reason
        return ConfigError(f"no layout of {world_size} x {hardware.name} can run this configuration: {reason}")
    smallest = ranking.too_large[0]
    label, gib = smallest.candidate.label, smallest.peak_memory / GIB
    needs = f"the smallest, {label}, needs {gib:.1f} GiB of {hardware.facts.memory_gib:g}"
    return ConfigError(
        f"no layout of {world_size} x {hardware.name} fits: {needs}; {_nearest_that_fits(config, hardware, world_size)}"
    )


def _nearest_that_fits(config: RunConfig, hardware: Hardware, world_size: int, file: HardwareFile | None = None) -> str:
    for factor in (2, 4, 8, 16, 32, 64):
        if _something_fits(config, hardware, factor * world_size):
            return f"{factor * world_size} x {hardware.name} would do"
    file = file or read_hardware()
    larger = sorted(
        (facts.memory_gib, name) for name, facts in file.accelerators.items()
        if facts.memory_gib > hardware.facts.memory_gib and config.precision.dtype in facts.peak_flops
    )  # fmt: skip
    for _, name in larger:
        if _something_fits(config, find_hardware(name, file=file), world_size):
            return f"{world_size} x {name} would do"
    return "use a smaller model, shorter sequences or more accelerators"


def _something_fits(config: RunConfig, hardware: Hardware, world_size: int) -> bool:
    planner = Planner(config, hardware)
    return any(
        obstacle(config, candidate) is None and planner.estimate(candidate).fits
        for grid in grids(world_size)
        if grid.tensor <= hardware.facts.per_node
        for candidate in _smallest_variants(grid)
    )


def _smallest_variants(grid: Candidate) -> Iterator[Candidate]:
    """Yield the variants of a grid that take the least memory."""
    lean = replace(grid, recompute="full", micro_batch=1, zero_stage=1 if grid.pipeline > 1 else 3)
    yield replace(lean, sequence_parallel=grid.tensor > 1)
    yield lean


def _order(estimate: Estimate) -> tuple[float, int, str]:
    return estimate.step_seconds, estimate.peak_memory, estimate.candidate.label


def _refuse(ranking: Ranking, candidate: Candidate, reason: str) -> None:
    same = re.sub(r"\d+", "0", reason.partition(";")[0])  # the sentences differ in their numbers
    refusal = ranking.refused.setdefault(same, Refusal(reason, example=candidate.label))
    refusal.count += 1


def _obstacle_of_grid(
    config: RunConfig, hardware: Hardware, grid: Candidate, micro_batches: Sequence[int]
) -> str | None:
    """Return what rules out every variant of `grid`."""
    per_node = hardware.facts.per_node
    if grid.tensor > per_node:
        return f"tensor groups of {grid.tensor} do not fit in a node of {per_node}; use at most {per_node}"
    return obstacle(config, replace(grid, zero_stage=1, micro_batch=min(micro_batches)))


def _check(config: RunConfig, hardware: Hardware, world_size: int) -> None:
    if world_size < 1:
        raise ConfigError(f"--gpus {world_size} is no number of accelerators; use at least 1")
    hardware.peak(config.precision.dtype)
    alone = Candidate(1, 1, 1).apply(config)
    alone = alone.model_copy(update={"batch": alone.batch.model_copy(update={"ramp_up": None})})
    found = check.findings(alone, None, None, needs_corpus=False)
    if found:
        raise ConfigError(*found)
