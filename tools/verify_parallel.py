#!/usr/bin/env python
"""Prove that layouts agree: train the same model for some steps under each, and compare losses and gradient norms.

    tools/verify_parallel.py --config examples/omega-tiny/run.yaml --layouts tp2,pp2,dp2,tp2-pp2-dp2,dp2-zero3

The first layout is the reference; tp1-pp1-dp1-zero1, a single process, is put in front of those you name. Every run is
a real one, in processes on this machine's CPU. Exit code 0: all within the tolerance; 1: some are not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from megatron_omega.config.arguments import read_overrides
from megatron_omega.errors import exit_cleanly
from megatron_omega.verification import (
    BF16_TOLERANCE,
    COMPARED,
    FP32_TOLERANCE,
    Verdict,
    compare,
    measure,
    parse_layout,
)

REFERENCE = "tp1-pp1-dp1-zero1"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any --section.field value of the run's configuration may follow, e.g. --precision.dtype bf16.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="run.yaml of the model and its corpus")
    parser.add_argument(
        "--layouts",
        required=True,
        help="comma-separated, each like tp2sp-pp2v-dp2-zero1-cut2.4-full; parts may be left out "
        "(sp: sequence parallel, v: DualPipeV, cut: first layers of stages 1.., zero3offload, mbN, recompute mode)",
    )
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run (default: 10)")
    parser.add_argument(
        "--tolerance", type=float, help=f"relative; default {FP32_TOLERANCE:g} (fp32), {BF16_TOLERANCE:g} (bf16)"
    )
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    return parser


def verify(options: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> list[Verdict]:
    """Run the reference and every layout; return one verdict a layout."""
    overrides = read_overrides(rest, parser)
    layouts = [parse_layout(label) for label in options.layouts.split(",")]
    is_bf16 = any(override.name == "precision.dtype" and override.text == "bf16" for override in overrides)
    tolerance = options.tolerance or (BF16_TOLERANCE if is_bf16 else FP32_TOLERANCE)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="verify-parallel-") as folder:
        arguments = {"steps": options.steps, "folder": Path(folder)}
        reference = measure(options.config, parse_layout(REFERENCE), overrides, **arguments)
        for layout in tqdm(layouts, unit="layout", disable=not sys.stderr.isatty()):
            rows = measure(options.config, layout, overrides, **arguments)
            verdicts.append(compare(layout.label, reference, rows, tolerance))
    return verdicts


def print_table(verdicts: list[Verdict]) -> None:
    """Print one line a layout."""
    width = max(len(verdict.label) for verdict in verdicts)
    print(f"largest relative difference from {REFERENCE}, tolerance {verdicts[0].tolerance:g}")
    print(f"{'layout':<{width}}  " + "  ".join(f"{name:>9}" for name in COMPARED))
    for verdict in verdicts:
        figures = "  ".join(f"{verdict.differences[name]:9.1e}" for name in COMPARED)
        print(f"{verdict.label:<{width}}  {figures}  {'PASS' if verdict.passed else 'FAIL'}")


def main() -> int:
    """Verify, print, and return the exit code."""
    parser = build_parser()
    with exit_cleanly():
        options, rest = parser.parse_known_args()
        verdicts = verify(options, rest, parser)
    if options.json:
        rows = [{"layout": v.label, **v.differences, "tolerance": v.tolerance, "passed": v.passed} for v in verdicts]
        print(json.dumps(rows, indent=2))
    else:
        print_table(verdicts)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
