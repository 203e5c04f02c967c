#!/usr/bin/env python
"""What the planner expects of GPT-Omega 11.9B on H100s, as model FLOPs utilisation. Calculated, not measured.

    python benchmarks/mfu_table.py [--config examples/omega-11.9b/run.yaml] [--launch 4 8 15] [--steps]

Each figure is that of the fastest layout of its kind that fits. Printed as Markdown, for docs/performance.md. --steps
prints what each improvement of the code brought, one upon the other: the planner's prices of today, for the kernels
that were counted and the bytes that were kept before and after it. What fits is judged by today's memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig, Stack
from megatron_omega.planner.activations import Shape
from megatron_omega.planner.candidates import Candidate, grids, obstacle, variants
from megatron_omega.planner.estimate import PARTITION_HOST, Planner
from megatron_omega.planner.hardware import Hardware, find_hardware
from megatron_omega.planner.work import BACKWARD_LAUNCHES, Work

GPUS = (64, 256, 1024)
STACKS: tuple[Stack, ...] = ("encoder", "decoder")
Kind = Callable[[Candidate], bool]


def zero3(candidate: Candidate) -> bool:
    """Whether weights are partitioned, in groups of at most two tensor-parallel ranks."""
    return candidate.zero_stage == 3 and candidate.tensor <= 2


def stages(*schedules: str) -> Kind:
    """Return whether a candidate is TP 2 x PP 8 under one of `schedules`."""
    return lambda c: (c.tensor, c.pipeline, c.zero_stage) == (2, 8, 1) and c.schedule in schedules


Row = tuple[str, Kind, bool, float]
ROWS: tuple[Row, ...] = (
    ("ZeRO-3, hooks of its host not counted", zero3, False, 0.0),
    ("the same, layers compiled", zero3, True, 0.0),
    ("ZeRO-3 with the hooks of its host", zero3, False, PARTITION_HOST),
    ("the same, layers compiled", zero3, True, PARTITION_HOST),
    ("TP 2 x PP 8, 1F1B", stages("1f1b"), False, PARTITION_HOST),
    ("the same, interleaved stages", stages("interleaved"), False, PARTITION_HOST),
    ("the same, interleaved and compiled", stages("interleaved"), True, PARTITION_HOST),
)


class Layers(NamedTuple):
    """What an encoder and a decoder layer of omega-11.9b were, counted in bf16 on a row of one document."""

    forward: tuple[int, int]
    """Kernels."""
    backward: tuple[int, int]
    kept_kib: tuple[float, float]
    """For a token."""
    has_masks: bool = False
    """Whether every attention of whole documents reads a mask of all tokens by all tokens."""


BEFORE = Layers((123, 162), (145, 190), (284.5, 289.2), has_masks=True)
ONCE = Layers((59, 88), (139, 185), (268.0, 273.0), has_masks=True)
LEAN = Layers((49, 72), (82, 119), (164.7, 164.1), has_masks=True)
DOCUMENTS = Layers((59, 82), (96, 133), (164.7, 164.1))
TODAY: Layers | None = None
KEPT_TODAY = (162.9, 164.1)
"""KiB a token, as benchmarks/kernels.py counts them."""
THREE_D, INTERLEAVED = stages("1f1b"), stages("interleaved")
STEPS: tuple[tuple[str, Kind, bool, Layers | None, bool], ...] = tuple(
    (f"{kind}: {step}", wanted, is_compiled, layers, hides)
    for kind, wanted, later in (("ZeRO-3", zero3, zero3), ("3D", THREE_D, INTERLEAVED))
    for step, wanted, is_compiled, layers, hides in (
        ("before", wanted, False, BEFORE, False),
        ("1, facts made once", wanted, False, ONCE, False),
        ("3, lean backward passes", wanted, False, LEAN, False),
        ("2, documents instead of masks", wanted, False, DOCUMENTS, False),
        ("2, two branches in one call", wanted, False, TODAY, False),
        ("4, layers compiled", wanted, True, TODAY, False),
        ("5, messages behind products", wanted, True, TODAY, True),
        ("7, interleaved stages", later, True, TODAY, True),
        ("1 to 7 without 4", later, False, TODAY, True),
    )
    if later is INTERLEAVED or not step.startswith("7")
)


class Past(Planner):
    """Prices layers as they were; `hides`: whether messages run behind products."""

    def __init__(self, config: RunConfig, hardware: Hardware, layers: Layers | None, *, hides: bool) -> None:
        super().__init__(config, hardware, hooks=0.0)
        self.layers, self.hides_sums = layers, hides

    def layer_works(self, config: RunConfig) -> dict[str, Work]:
        works = super().layer_works(config)
        if not self.hides_sums:
            works = {kind: replace(work, entering=0) for kind, work in works.items()}
        if self.layers is None:
            return works
        return works | {stack: as_it_was(works[stack], config, stack, self.layers) for stack in STACKS}


def as_it_was(work: Work, config: RunConfig, stack: Stack, layers: Layers) -> Work:
    """Return what a layer of `stack` asked of a rank when layers were such."""
    which, shape = STACKS.index(stack), Shape.of(config)
    length = shape.encoder if stack == "encoder" else shape.decoder
    traffic = work.traffic * layers.kept_kib[which] / KEPT_TODAY[which]
    if layers.has_masks:  # read for every head: full and dynamic, or causal and cross
        traffic += 2 * shape.heads * shape.micro_batch * length * length * shape.element
    forward, backward = layers.forward[which], layers.backward[which]
    again = forward if work.is_checkpointed else work.recomputed_launches
    return replace(
        work,
        launches=forward,
        recomputed_launches=round(again + backward - BACKWARD_LAUNCHES * forward),
        traffic=int(traffic),
        recomputed_traffic=int(work.recomputed_traffic * traffic / work.traffic),
    )


def best(planner: Planner, world_size: int, is_wanted: Kind) -> str:
    """Return the utilisation of the fastest layout of a kind, in per cent; a dash where none fits."""
    found = list(_candidates(planner.config, world_size, is_wanted))
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
    parser.add_argument("--steps", action="store_true", help="what each improvement brought")
    options = parser.parse_args()
    config, h100 = load_config(options.config), find_hardware("h100-80g")
    batch = config.batch.model_copy(update={"global_batch_size": 512, "ramp_up": None})
    config = config.model_copy(update={"batch": batch})
    print("| layout | " + " | ".join(f"{gpus} at {us:g} µs" for us in options.launch for gpus in GPUS) + " |")
    print("|---" * (1 + len(GPUS) * len(options.launch)) + "|")
    machines = [
        replace(h100, facts=h100.facts.model_copy(update={"launch_seconds": us * 1e-6})) for us in options.launch
    ]
    for name, kind, make in _steps(config) if options.steps else _rows(config):
        cells = [best(make(machine), gpus, kind) for machine in machines for gpus in GPUS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


Printed = tuple[str, Kind, Callable[[Hardware], Planner]]


def _rows(config: RunConfig) -> Iterator[Printed]:
    for name, kind, is_compiled, hooks in ROWS:
        yield name, kind, partial(Planner, compiling(config, is_compiled=is_compiled), hooks=hooks)


def _steps(config: RunConfig) -> Iterator[Printed]:
    for name, kind, is_compiled, layers, hides in STEPS:
        yield name, kind, partial(Past, compiling(config, is_compiled=is_compiled), layers=layers, hides=hides)


def compiling(config: RunConfig, *, is_compiled: bool) -> RunConfig:
    """Return `config` with compiled layers, or without."""
    training = config.training.model_copy(update={"compile": "layers" if is_compiled else "off"})
    return config.model_copy(update={"training": training})


if __name__ == "__main__":
    main()
