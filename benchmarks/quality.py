#!/usr/bin/env python
"""Train the arms of a study over seeds and rates, and say which learns better, by how much and how surely.

    benchmarks/fetch_corpus.py corpus --packages debian-handbook ...  # then tokenizer and shard
    benchmarks/quality.py benchmarks/studies/mixture.yaml --output runs/mixture

One process with one thread at a time; the same command goes on after an interruption. Writes measures.jsonl and, at
the end or with --report alone, report.md and curves.png.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_omega.commands.ending import exit_cleanly
from megatron_omega.studies.quality import read_study, run_study
from megatron_omega.studies.quality_report import write_report


def main() -> None:
    """Run what is missing of a study, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML: config, settings, arms, rates, seeds, steps")
    parser.add_argument("--output", type=Path, required=True, help="folder of measures and report")
    parser.add_argument("--trials", type=int, help="stop after so many runs; the same command goes on")
    parser.add_argument("--report", action="store_true", help="only report what has been measured")
    options = parser.parse_args()
    with exit_cleanly():
        study = read_study(options.study)
        for trial, rows in () if options.report else islice(run_study(study, options.output), options.trials):
            last = rows[-1]
            print(
                f"{trial.label}: loss {last['loss']:.3f}, gain {last['gain']:.3f}, first {last['loss_first']:.3f}, "
                f"MLM {last.get('mlm_loss', float('nan')):.3f}, {last['cpu']:.0f} CPU-s", flush=True,
            )  # fmt: skip
        print(f"see {write_report(options.output)}")


if __name__ == "__main__":
    main()
