"""Rehearse a plan: run the real model code of every distinct stage without data or memory, and compare with the plan.

    megatron-omega dry-run --config examples/omega-11.9b/run.yaml --gpus 1024 --gpu h100-80g --random 4

Fails (exit 1) where parameters, FLOPs, messages or their bytes differ at all, or kept activations by more than 1%.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_omega.config.load import load_config
from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import CommandLine
from megatron_omega.planner.candidates import Candidate, obstacle, parse_label
from megatron_omega.planner.hardware import find_hardware, read_hardware
from megatron_omega.planner.ranking import nothing_fits, rank


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="run.yaml of the model")
    parser.add_argument(
        "--gpus", type=int, nargs="+", required=True, help="numbers of accelerators: the best layout of each"
    )
    parser.add_argument("--gpu", default="h100-80g", help="accelerator (default: h100-80g)")
    parser.add_argument("--hardware", type=Path, help="hardware file (default: the built-in list)")
    parser.add_argument(
        "--layout", action="append", default=[], help="this layout instead of the best; may be repeated"
    )
    parser.add_argument("--random", type=int, default=0, help="also this many random legal layouts that fit")
    parser.add_argument("--seed", type=int, default=0, help="of the random layouts")
    parser.add_argument("--json", action="store_true", help="print data instead of text")
    parser.add_argument("--verbose", action="store_true", help="print what agrees, too")
    return parser


def choose(arguments: argparse.Namespace) -> list[Candidate]:
    """Return the layouts to rehearse."""
    config = load_config(arguments.config)
    hardware = find_hardware(arguments.gpu, file=read_hardware(arguments.hardware))
    chosen = [parse_label(label) for label in arguments.layout]
    for candidate in chosen:
        if reason := obstacle(config, candidate):
            raise ConfigError(f"layout {candidate.label} cannot run: {reason}")
    rankings = (
        [] if chosen and not arguments.random else [(gpus, rank(config, hardware, gpus)) for gpus in arguments.gpus]
    )
    for gpus, ranking in rankings:
        if not ranking.fitting:
            raise nothing_fits(config, hardware, gpus, ranking)
        if not arguments.layout:
            chosen.append(ranking.fitting[0].candidate)
    generator = random.Random(arguments.seed)
    pool = [estimate.candidate for _, ranking in rankings for estimate in ranking.fitting]
    return chosen + generator.sample(pool, min(arguments.random, len(pool)))


def main(argv: Sequence[str]) -> int:
    """Rehearse, print, and return the exit code: 1 if anything differs."""
    arguments = build_parser().parse_args(argv)
    chosen = choose(arguments)
    from megatron_omega.studies.rehearsal import (  # torch comes in here, after all that can be refused
        Rehearsal,
        fake_world,
    )

    began, agreed, results = time.process_time(), True, []
    rehearsal = Rehearsal(load_config(arguments.config))
    for candidate in chosen:
        with fake_world(candidate.world_size):
            comparisons = rehearsal.compare(candidate)
        differing = [comparison for comparison in comparisons if not comparison.agrees]
        agreed = agreed and not differing
        results.append({"layout": candidate.label, "compared": len(comparisons), "differing": len(differing)})
        if arguments.json:
            results[-1]["comparisons"] = [
                vars(comparison) | {"agrees": comparison.agrees} for comparison in comparisons
            ]
            continue
        stages = len({comparison.stage for comparison in comparisons})
        verdict = "equal" if not differing else f"{len(differing)} DIFFER"
        print(
            f"{candidate.label} ({candidate.world_size} ranks): "
            f"{stages} distinct stages, {len(comparisons)} quantities: {verdict}"
        )
        for comparison in comparisons if arguments.verbose else differing:
            sign = "=" if comparison.agrees else "≠"
            print(
                f"  {comparison.stage:<52} {comparison.quantity:<24} {comparison.predicted} {sign} {comparison.counted}"
            )
    cost = {
        "cpu_seconds": time.process_time() - began,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
    }
    if arguments.json:
        print(json.dumps({"layouts": results, **cost}))
    else:
        print(f"{cost['cpu_seconds']:.1f} CPU-seconds, {cost['peak_gib']:.2f} GiB")
    return 0 if agreed else 1
