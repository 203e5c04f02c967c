#!/usr/bin/env python
"""What the planner expects of GPT-Omega 11.9B on H100s, as model FLOPs utilisation. Calculated, not measured.

    python benchmarks/mfu_table.py [--config examples/omega-11.9b/run.yaml] [--launch 4 8 15]

Each figure is that of the fastest layout of its kind that fits. Printed as Markdown, for docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.planner.candidates import Candidate, grids, obstacle, variants
from megatron_omega.planner.estimate import PARTITION_HOST, Planner
from megatron_omega.planner.hardware import Hardware, find_hardware

GPUS = (64, 256, 1024)
Kind = Callable[[Candidate], bool]


def zero3(candidate: Candidate) -> bool:
    """Whether weights are partitioned, in groups of at most two tensor-parallel ranks."""
    return candidate.zero_stage == 3 and candidate.tensor <= 2


def stages(*schedules: str) -> Kind:
    """Return whether a candidate is TP 2 x PP 8 under one of `schedules`."""
    return lambda c: (c.tensor, c.pipeline, c.zero_stage) == (2, 8, 1) and c.schedule in schedules


ROWS: tuple[tuple[str, Kind, bool, float], ...] = (
    ("ZeRO-3, hooks of its host not counted", zero3, False, 0.0),
    ("the same, layers compiled", zero3, True, 0.0),
    ("ZeRO-3 with the hooks of its host", zero3, False, PARTITION_HOST),
    ("the same, layers compiled", zero3, True, PARTITION_HOST),
    ("TP 2 x PP 8, 1F1B", stages("1f1b"), False, PARTITION_HOST),
    ("the same, interleaved stages", stages("interleaved"), False, PARTITION_HOST),
    ("the same, interleaved and compiled", stages("interleaved"), True, PARTITION_HOST),
)


def best(config: RunConfig, hardware: Hardware, world_size: int, is_wanted: Kind, hooks: float) -> str:
    """Return the utilisation of the fastest layout of a kind, in per cent; a dash where none fits."""
    planner, found = Planner(config, hardware, hooks=hooks), list(_candidates(config, world_size, is_wanted))
    estimates = [estimate for c in found if (estimate := planner.estimate(c)).fits]
    estimates.sort(key=lambda estimate: estimate.step_seconds)
    exact = [planner.estimate(estimate.candidate, exact=True) for estimate in estimates[:4]]
    if not exact:
        return "-"
    return f"{100 * max(estimate.mfu for estimate in exact):.1f}"


def _candidates(config: RunConfig, world_size: int, is_wanted: Kind) -> Iterator[Candidate]:
    for grid in grids(world_size):
        if grid.tensor <= 2 and grid.pipeline in (1, 8):
            yield from (c for c in variants(grid) if is_wanted(c) and obstacle(config, c) is None)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("examples/omega-11.9b/run.yaml"))
    parser.add_argument("--launch", type=float, nargs="+", default=[4, 8, 15], help="microseconds to start a kernel")
    options = parser.parse_args()
    config, h100 = load_config(options.config), find_hardware("h100-80g")
    batch = config.batch.model_copy(update={"global_batch_size": 512, "ramp_up": None})
    config = config.model_copy(update={"batch": batch})
    print("| layout | " + " | ".join(f"{gpus} at {us:g} µs" for us in options.launch for gpus in GPUS) + " |")
    print("|---" * (1 + len(GPUS) * len(options.launch)) + "|")
    for name, kind, is_compiled, hooks in ROWS:
        training = config.training.model_copy(update={"compile": "layers" if is_compiled else "off"})
        mine = config.model_copy(update={"training": training})
        cells = []
        for us in options.launch:
            machine = replace(h100, facts=h100.facts.model_copy(update={"launch_seconds": us * 1e-6}))
            cells += [best(mine, machine, gpus, kind, hooks) for gpus in GPUS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
