"""Measure the loss of a checkpoint, on as many ranks as it is started on, in any layout. Trains nothing.

    megatron-omega evaluate --checkpoint runs/omega-tiny                     on the run's validation part
    megatron-omega evaluate --checkpoint runs/omega-tiny --input notes.txt   on any text
    megatron-omega evaluate --checkpoint runs/omega-tiny --shard data/other_text_document
    srun megatron-omega evaluate --config omega-1b --evaluation.num_batches 64

Settings come from --config, else from the checkpoint; without --checkpoint the newest one of the run is taken. Any
--section.field value may follow. On another number of ranks than the run's layout needs, each rank holds the whole
model, unless parallel.* is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_omega.config.arguments import Arguments, read_overrides
from megatron_omega.config.load import resolve_run
from megatron_omega.data.indexed import without_suffix
from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import CommandLine
from megatron_omega.host.environment import complete_environment

if TYPE_CHECKING:
    from megatron_omega.training.state import EvaluationReport


def build_parser() -> CommandLine:
    """Return the command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.takes_checkpoint(required=False)
    parser.add_argument("--load", type=Path, dest="checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="YAML", help="settings (default: those saved in the checkpoint)")
    parser.add_argument("--deepspeed_config", "--deepspeed-config", metavar="JSON", help="what is DeepSpeed's")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--input", nargs="+", help="text files to measure on (jsonl, txt, parquet, globs, folders)")
    text.add_argument("--shard", metavar="PREFIX", help="shard to measure on, all of it")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="say what would be measured, and end")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    return parser


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    given = Arguments(options.config, options.deepspeed_config, read_overrides(rest, parser))
    place = complete_environment()
    if options.input and place.world_size > 1:
        raise ConfigError("--input is read by one process; make a shard with preprocess-data and give it as --shard")
    from megatron_omega.run.validation import as_evaluation, evaluate, tokenizer_of, weights_of  # torch comes in here

    checkpoint = weights_of(options.checkpoint, given)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        shard = options.shard and without_suffix(options.shard)
        if options.input:
            shard = make_shard(options.input, tokenizer_of(given, checkpoint), Path(folder))
        arguments = as_evaluation(given, checkpoint, place.world_size, shard=shard)
        resolved = resolve_run(arguments, place.world_size, trains=False)
        if options.dry_run:
            print(f"would measure {checkpoint.path} (step {checkpoint.step:,}) on {shard or 'the validation part'}")
            return
        if place.rank == 0:
            print(f"measuring step {checkpoint.step:,} on {shard or 'the validation part'}", file=sys.stderr)
        report = evaluate(resolved, place)
    if place.rank == 0:
        found = dataclasses.replace(report, step=checkpoint.step)
        text = {**dataclasses.asdict(found), "checkpoint": str(checkpoint.path)}
        print(json.dumps(text) if options.json else describe(found, checkpoint.path))


def make_shard(inputs: Sequence[str], tokenizer: str, folder: Path) -> str:
    """Encode texts with the model's tokenizer; return the shard's prefix."""
    from megatron_omega.commands import preprocess

    words = ["--tokenizer-model", tokenizer, "--append-eod", "--workers", "1", "--quiet", "--json"]
    arguments = preprocess.read_arguments(["--input", *inputs, "--output-prefix", str(folder / "text"), *words])
    options = preprocess.to_options(arguments)
    result, _ = preprocess.run(preprocess.open_inputs(arguments, options), options, is_quiet=True)
    return str(result.prefixes[0])


def describe(report: EvaluationReport, checkpoint: Path) -> str:
    """Return the losses in words."""
    masked = "" if math.isnan(report.mlm_loss) else f"; MLM {report.mlm_loss:.4f}"
    return (
        f"step {report.step:,} ({checkpoint}): loss {report.loss:.4f} (LM {report.lm_loss:.4f}, perplexity "
        f"{math.exp(report.lm_loss):.2f}{masked}) over {report.num_tokens:,} tokens"
    )
