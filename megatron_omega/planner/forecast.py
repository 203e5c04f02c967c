"""What a configured run will take: its own layout, on the machine it stands on. For logs and --dry-run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_omega.config.schema import RunConfig
from megatron_omega.planner.candidates import of_config
from megatron_omega.planner.estimate import Estimate, Planner
from megatron_omega.planner.hardware import GIB, Hardware, find_hardware, read_hardware

CALIBRATED = Path("runs/hardware.yaml")
"""Where megatron-omega calibrate leaves what it measured, relative to the working directory."""


def machine_called(device_name: str) -> Hardware | None:
    """Return the machine called `device_name` ("cpu", or what the driver calls a GPU); None: not listed.

    A calibration in the working directory goes before the built-in list.
    """
    file = read_hardware(CALIBRATED) if CALIBRATED.exists() else read_hardware()
    wanted = device_name.lower()
    for name in file.accelerators:
        if name == wanted or (name != "cpu" and name.partition("-")[0] in wanted):
            return find_hardware(name, file=file)
    return None


def forecast(config: RunConfig, world_size: int, zero_stage: int, hardware: Hardware) -> Estimate:
    """Return the estimate of `config` in its own layout."""
    candidate = of_config(config, world_size, zero_stage)
    return Planner(config, hardware).estimate(candidate, exact=True)


def forecast_lines(estimate: Estimate) -> Iterator[str]:
    """Yield a forecast in a few lines."""
    low, high = estimate.interval
    fullest = max(range(len(estimate.ranks)), key=lambda rank: estimate.ranks[rank].total)
    memory = estimate.ranks[fullest]
    yield (
        f"forecast for {estimate.hardware.name}: {estimate.step_seconds:.3g} s a step ({low:.3g} to {high:.3g}), "
        f"{estimate.tokens_per_second:,.0f} tokens/s, MFU {estimate.mfu:.1%}, bubble {estimate.bubble:.0%}"
    )
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations + memory.working,
        "other": memory.buffers + memory.runtime,
    }
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    yield f"forecast of memory: {memory.total / GIB:.2f} GiB on pipeline rank {fullest} ({shown})"
