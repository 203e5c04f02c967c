"""What a configured run will take: its own layout, on the machine it stands on. For logs and --dry-run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_omega.config.schema import RunConfig
from megatron_omega.planner.candidates import of_config
from megatron_omega.planner.estimate import Estimate, Planner
from megatron_omega.planner.hardware import GIB, LATER, PROCESS, Hardware
from megatron_omega.planner.machine import Machine


@dataclass(frozen=True)
class RunForecast:
    """What a run is expected to take on this machine."""

    estimate: Estimate
    machine: Machine
    process_bytes: int = PROCESS
    """What a process holds beside tensors when the engine is about to be built."""

    @property
    def memory_bytes(self) -> int:
        """All memory of rank 0 at its peak: on a CPU with the process itself, on a GPU what the device holds."""
        tensors = self.estimate.ranks[0].total
        return tensors + self.process_bytes + LATER if self.machine.hardware.facts.is_cpu else tensors

    @property
    def ranks_per_core(self) -> float:
        """Ranks of this host that take turns on a core; 1 where each has its own."""
        facts = self.machine.hardware.facts
        ranks = min(self.estimate.candidate.world_size, facts.per_node)
        return max(1.0, ranks / facts.cores) if facts.cores else 1.0


def forecast(config: RunConfig, world_size: int, zero_stage: int, hardware: Hardware) -> Estimate:
    """Return the estimate of `config` in its own layout."""
    candidate = of_config(config, world_size, zero_stage)
    return Planner(config, crowded(hardware, world_size)).estimate(candidate, exact=True)


def crowded(hardware: Hardware, ranks: int) -> Hardware:
    """Return the cores as they are while so many ranks compute on them; anything else as it is."""
    facts = hardware.facts
    if facts.cores is None or facts.cores == 1:
        return hardware
    busy = min(ranks, facts.per_node, facts.cores)
    slower = 1 + (facts.crowding - 1) * (busy - 1) / (facts.cores - 1)
    changes = {
        "peak_flops": {dtype: rate / slower for dtype, rate in facts.peak_flops.items()},
        "memory_bandwidth": facts.memory_bandwidth / slower,
        "launch_seconds": facts.launch_seconds * slower,
    }
    return replace(hardware, facts=facts.model_copy(update=changes))


def forecast_lines(run: RunForecast) -> Iterator[str]:
    """Yield a forecast in a few lines."""
    estimate, facts = run.estimate, run.machine.hardware.facts
    low, high = estimate.interval
    where = f"{facts.cores} cores" if facts.is_cpu and facts.cores else run.machine.hardware.name
    ranks = estimate.candidate.world_size
    sharing = f", {ranks} ranks share them" if run.ranks_per_core > 1 else ""
    yield (
        f"forecast for this machine ({where}{sharing}; {run.machine.origin}): {estimate.step_seconds:.3g} s a step "
        f"({low:.3g} to {high:.3g}), {estimate.tokens_per_second:,.0f} tokens/s"
    )
    yield f"forecast of memory: {' + '.join(_memory_parts(run))} = {run.memory_bytes / GIB:.2f} GiB on rank 0"


def _memory_parts(run: RunForecast) -> Iterator[str]:
    memory = run.estimate.ranks[0]
    if run.machine.hardware.facts.is_cpu:
        yield f"{(run.process_bytes + LATER) / GIB:.2f} the process and its libraries"
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations + memory.working,
        "other": memory.buffers + memory.runtime,
    }
    yield from (f"{size / GIB:.2f} {name}" for name, size in parts.items() if size >= 0.005 * GIB)
