"""Prove that layouts agree: train the same model for some steps under each, and compare losses and gradient norms.

    megatron-omega verify-parallel --config examples/omega-tiny/run.yaml

runs the whole list: tensor, pipeline and data parallel in {1, 2}, each ZeRO stage, tensor parallel 3, 4 stages with
cuts inside the encoder and the decoder, DualPipeV, interleaved stages, sequence parallelism. With

    --layouts tp2,pp2-dp2,tp2sp-pp2v-dp2,dp2-zero3,pp4-cut2.4.5

it runs those you name: tpN[sp] tensor [sequence] parallel, ppN[v|iM] pipeline [DualPipeV, or interleaved with M stages
a rank], dpN replicas, zeroN[offload], cutA.B.C the first layers of the stages after the first, mbN micro-batch,
none|swiglu|ffn|full recomputation; what is left out is 1, ZeRO-1, or as the file says. Each is compared with a single
process, tp1-pp1-dp1-zero1. Every run is a real one, in processes on this machine's CPU. Exit code 0: all within the
tolerance; 1: some are not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_omega.config.arguments import Override, read_overrides
from megatron_omega.config.load import load_config
from megatron_omega.errors import ConfigError, HangError
from megatron_omega.host.command_line import CommandLine
from megatron_omega.studies.layouts import (
    COMPARED,
    FP32_TOLERANCE,
    Comparison,
    LayoutUnderTest,
    check_layout,
    compare,
    every_layout,
    measure,
    parse_layout,
    tolerance_of,
)

REFERENCE = "tp1-pp1-dp1-zero1"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = CommandLine(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any --section.field value of the run's configuration may follow, e.g. --precision.dtype bf16.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="run.yaml of the model and its corpus")
    parser.add_argument("--layouts", help="comma-separated, as above (default: the whole list)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run (default: 10)")
    parser.add_argument(
        "--tolerance", type=float, help=f"relative; default {FP32_TOLERANCE:g} in fp32; in bf16 derived from the depth"
    )
    parser.add_argument("--timeout-seconds", type=float, default=1800, help="longest time of one run (default: 1800)")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    return parser


def verify(options: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> list[Comparison]:
    """Run the reference and every layout; return one comparison a layout."""
    overrides = read_overrides(rest, parser)
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps} must be at least 1")
    model = load_config(options.config, overrides).model
    labels = options.layouts.split(",") if options.layouts else every_layout(model)
    comparisons = []
    with tempfile.TemporaryDirectory(prefix="verify-parallel-") as folder:
        arguments = {"steps": options.steps, "folder": Path(folder)}
        config = check_layout(options.config, parse_layout(REFERENCE), overrides, **arguments)
        layouts = fitting(options, labels, overrides, arguments)
        tolerance = tolerance_of(config) if options.tolerance is None else options.tolerance
        arguments["timeout_seconds"] = options.timeout_seconds
        reference = measure(options.config, parse_layout(REFERENCE), overrides, **arguments)
        for layout in shown(layouts):
            rows = measure(options.config, layout, overrides, **arguments)
            comparisons.append(compare(layout.label, reference, rows, tolerance))
    return comparisons


def shown(layouts: Sequence[LayoutUnderTest]) -> Iterator[LayoutUnderTest]:
    """Yield the layouts, with a bar on a terminal; elsewhere a line before each, with the time that is left."""
    if sys.stderr.isatty():
        yield from tqdm(layouts, unit="layout")
        return
    began = time.monotonic()
    for done, layout in enumerate(layouts):
        past = time.monotonic() - began
        left = f", about {past / done * (len(layouts) - done) / 60:.0f} minutes left" if done else ""
        print(f"layout {done + 1} of {len(layouts)}: {layout.label}{left}", file=sys.stderr, flush=True)
        yield layout


def fitting(
    options: argparse.Namespace, labels: list[str], overrides: Sequence[Override], arguments: dict[str, Any]
) -> list[LayoutUnderTest]:
    """Return the layouts this model can run; of the whole list the others are left out, aloud. Named ones must fit."""
    fit, findings = [], []
    for label in labels:
        try:
            layout = parse_layout(label)
            check_layout(options.config, layout, overrides, **arguments)
            fit.append(layout)
        except ConfigError as error:
            findings += error.findings
    if findings and options.layouts:
        raise ConfigError(*findings)
    for finding in findings:
        print(f"left out: {finding}", file=sys.stderr)
    return fit


def print_table(comparisons: list[Comparison], steps: int) -> None:
    """Print one line a layout, and the sum of all."""
    width = max(len(comparison.label) for comparison in comparisons)
    print(f"largest relative difference from {REFERENCE} over {steps} steps, tolerance {comparisons[0].tolerance:.2g}")
    print(f"{'layout':<{width}}  " + "  ".join(f"{name:>9}" for name in COMPARED))
    for comparison in comparisons:
        figures = "  ".join(f"{comparison.differences[name]:9.1e}" for name in COMPARED)
        print(f"{comparison.label:<{width}}  {figures}  {'PASS' if comparison.passed else 'FAIL'}")
    failed = sum(not comparison.passed for comparison in comparisons)
    print(f"FAIL: {failed} of {len(comparisons)} layouts" if failed else f"PASS: all {len(comparisons)} layouts agree")


def main(argv: Sequence[str]) -> int:
    """Verify, print, and return the exit code."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    try:
        comparisons = verify(options, rest, parser)
    except TimeoutError as error:
        raise HangError(f"{error} ({options.timeout_seconds:g} s); give --timeout-seconds more") from None
    if options.json:
        rows = [{"layout": v.label, **v.differences, "tolerance": v.tolerance, "passed": v.passed} for v in comparisons]
        print(json.dumps(rows, indent=2))
    else:
        print_table(comparisons, options.steps)
    return 0 if all(comparison.passed for comparison in comparisons) else 1
