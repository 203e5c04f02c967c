"""Plan a run without a GPU: rank every layout of a configuration on a number of accelerators.

    megatron-omega plan --config omega-1b --gpus 16 --gpu h100-80g

Needs neither torch nor DeepSpeed. `--explain LAYOUT` shows one layout in detail, `--write DIR` turns one into files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_omega.config.load import load_config
from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import CommandLine, output_file, writing
from megatron_omega.planner import report
from megatron_omega.planner.candidates import MICRO_BATCHES, obstacle, parse_label
from megatron_omega.planner.estimate import Estimate, Planner
from megatron_omega.planner.hardware import find_hardware, read_hardware
from megatron_omega.planner.operations import Assumptions, starting, starting_line
from megatron_omega.planner.plan_files import write_plan
from megatron_omega.planner.ranking import Ranking, best_per_grid, nothing_fits, rank


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="run.yaml of the model to train")
    parser.add_argument("--gpus", type=int, required=True, help="number of accelerators")
    parser.add_argument("--gpu", required=True, help="accelerator, by its name in the hardware file")
    parser.add_argument(
        "--hardware", type=Path, help="hardware file, as megatron-omega calibrate writes (default: the built-in list)"
    )
    parser.add_argument("--network", help="connection between nodes, if not the accelerator's usual one")
    parser.add_argument("--global-batch-size", type=int, help="instead of the configuration's")
    parser.add_argument(
        "--micro-batch-sizes", type=int, nargs="+", default=list(MICRO_BATCHES), help="sizes to try (default: 1 2 4 8)"
    )
    parser.add_argument("--top", type=int, default=10, help="rows of the table (default: 10)")
    parser.add_argument("--all", action="store_true", help="rank every variant, not the best of each grid")
    parser.add_argument("--explain", metavar="LAYOUT", help="one layout in detail; `best`, or a name from the table")
    parser.add_argument("--json", action="store_true", help="print data instead of text")
    parser.add_argument(
        "--write", type=Path, metavar="DIR", help="write run.yaml, deepspeed.json and train.slurm of the layout"
    )
    parser.add_argument(
        "--plot", type=output_file, metavar="FILE", help="draw schedule and memory of the layout (.png or .html)"
    )
    parser.add_argument("--tokens", type=float, default=Assumptions.tokens, help="tokens of the run (default: 100e9)")
    parser.add_argument(
        "--failures-per-gpu-hour", type=float, default=Assumptions.failures_per_gpu_hour, help="default: 2e-5"
    )
    parser.add_argument("--restart-seconds", type=float, default=Assumptions.restart_seconds, help="default: 300")
    parser.add_argument(
        "--storage-bandwidth", type=float, default=Assumptions.storage_bytes_per_second, help="bytes/s (default: 20e9)"
    )
    parser.add_argument("--stall-seconds", type=float, help="measured: how long a save stops training")
    parser.add_argument("--write-seconds", type=float, help="measured: how long a save takes to be complete")
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    arguments = build_parser().parse_args(argv)
    _check(arguments)
    config = load_config(arguments.config)
    if arguments.global_batch_size is not None:
        batch = config.batch.model_copy(update={"global_batch_size": arguments.global_batch_size})
        config = config.model_copy(update={"batch": batch})
    hardware = find_hardware(arguments.gpu, network=arguments.network, file=read_hardware(arguments.hardware))
    assumptions = Assumptions(
        arguments.tokens, arguments.failures_per_gpu_hour, arguments.restart_seconds, arguments.storage_bandwidth,
        arguments.stall_seconds, arguments.write_seconds,
    )  # fmt: skip
    planner, ranking = Planner(config, hardware), None
    if arguments.explain in (None, "best"):
        ranking = rank(config, hardware, arguments.gpus, arguments.micro_batch_sizes)
        if not ranking.fitting:
            raise nothing_fits(config, hardware, arguments.gpus, ranking)
        chosen = ranking.fitting[0]
    else:
        chosen = _named(planner, arguments.explain, arguments.gpus)
    if arguments.json:
        _print_json(arguments, ranking, chosen, assumptions)
    else:
        for line in report.headline(config, hardware, arguments.gpus):
            print(line)
        _print_text(arguments, planner, ranking, chosen, assumptions)
    if arguments.plot:
        from megatron_omega.planner.plot import plot

        with writing(arguments.plot):
            plot(chosen, arguments.plot)
    if arguments.write:
        paths = write_plan(chosen, arguments.write)
        print(f"wrote {', '.join(map(str, paths))}", file=sys.stderr)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse at once what would otherwise fail after the planning."""
    if arguments.gpus < 1:
        raise ConfigError(f"--gpus {arguments.gpus} is no number of accelerators; use at least 1")
    for option in ("global_batch_size", "micro_batch_sizes", "top"):
        value = getattr(arguments, option)
        smallest = min(value) if isinstance(value, list) else value
        if smallest is not None and smallest < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {smallest} is not positive; use at least 1")
    path = arguments.plot
    if path and path.suffix not in (".png", ".html"):
        raise ConfigError(f"--plot {path} ends in {path.suffix or 'nothing'}; use .png or .html")
    if path and not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}; make it, or choose another")


def _named(planner: Planner, label: str, gpus: int) -> Estimate:
    candidate = parse_label(label)
    if candidate.world_size != gpus:
        raise ConfigError(f"layout {label} has {candidate.world_size} ranks, --gpus says {gpus}; make them equal")
    reason = obstacle(planner.config, candidate)
    if reason:
        raise ConfigError(f"layout {label} cannot run: {reason}")
    return planner.estimate(candidate, exact=True)


def _print_text(
    arguments: argparse.Namespace, planner: Planner, ranking: Ranking | None, chosen: Estimate, assumptions: Assumptions
) -> None:
    print()
    if ranking is not None and arguments.explain is None:
        rows = ranking.fitting if arguments.all else best_per_grid(ranking)
        what = "layouts" if arguments.all else "grids, the best layout of each"
        shown = min(arguments.top, len(rows))
        print(f"{len(ranking.fitting):,} of {ranking.total:,} layouts fit; {shown} of {len(rows)} {what}:")
        lines = [*report.table(rows[: arguments.top]), "", "not in the table:", *report.refusals(ranking), ""]
        lines += [f"memory of {chosen.candidate.label}", *report.memory_bars(chosen), ""]
        lines += [*report.operation_lines(report.operations(chosen, assumptions), assumptions)]
        lines += [starting_line(starting(chosen, planner))]
    else:
        lines = [*report.explain(chosen, planner, assumptions)]
    if chosen.candidate.pipeline > 1:
        lines += ["", f"schedule of {chosen.candidate.label}", *report.gantt(chosen.timeline)]
    print("\n".join(lines))


def _print_json(
    arguments: argparse.Namespace, ranking: Ranking | None, chosen: Estimate, assumptions: Assumptions
) -> None:
    if ranking is None or arguments.explain:
        print(json.dumps(report.as_data(chosen, assumptions)))
        return
    rows = ranking.fitting if arguments.all else best_per_grid(ranking)
    result = {
        "layouts": [report.as_data(estimate, assumptions) for estimate in rows[: arguments.top]],
        "num_layouts": ranking.total,
        "num_fitting": len(ranking.fitting),
        "num_too_large": len(ranking.too_large),
        "refused": [{"reason": r.reason, "count": r.count, "example": r.example} for r in ranking.refused.values()],
    }
    print(json.dumps(result))
