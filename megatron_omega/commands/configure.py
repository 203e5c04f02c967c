"""Write a commented run.yaml for a number of parameters, tokens and devices, in the layout that the planner finds best.

    megatron-omega configure --parameters 1e9 --gpus 16 --gpu h100-80g --output run.yaml
    megatron-omega configure --parameters 10e6 --gpus 2 --gpu cpu --decoder-only --tokens 50e6 --output run.yaml

What the file leaves out has its default or follows from what it says; `megatron-omega train --config run.yaml
--dry-run` shows everything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_omega.config import yaml_text
from megatron_omega.config.arguments import settings
from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import COMMAND, CommandLine, output_file, writing
from megatron_omega.planner.hardware import Hardware, find_hardware, read_hardware
from megatron_omega.planner.machine import CPU, this_machine
from megatron_omega.planner.proposal import TOKENS_PER_PARAMETER, Proposal, Wish, propose

SECTIONS = ("model", "data", "parallel", "batch", "precision", "training", "logging")


def build_parser() -> CommandLine:
    """Return the command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--parameters", type=float, required=True, help="size of the model, such as 1e9")
    parser.add_argument("--tokens", type=float, help=f"of the run (default: {TOKENS_PER_PARAMETER} a parameter)")
    parser.add_argument("--gpus", type=int, required=True, help="number of accelerators, or of CPU processes")
    parser.add_argument("--gpu", default=CPU, help="accelerator, by its name in the hardware file (default: cpu)")
    parser.add_argument("--hardware", type=Path, help="hardware file (default: the built-in list, and this machine's)")
    parser.add_argument("--decoder-only", action="store_true", help="no encoder")
    parser.add_argument("--vocab-size", type=int, default=32768, help="pieces of the tokenizer (default 32768)")
    parser.add_argument("--tokenizer", default="corpus/tokenizer.model", help="SentencePiece model")
    parser.add_argument("--corpus", default="corpus/text_text_document", help="prefix of the shard")
    parser.add_argument("--output", type=output_file, help="file to write (default: print)")
    return parser


def main(argv: Sequence[str]) -> None:
    """Propose, write, and say what to expect."""
    options = build_parser().parse_args(argv)
    if options.output is not None and options.output.exists():
        raise ConfigError(f"--output {options.output} exists; choose another name or remove it")
    hardware = _hardware(options)
    wish = Wish(options.parameters, options.gpus, options.tokens, options.vocab_size, options.decoder_only)
    proposal = propose(wish, hardware)
    proposal.values["data"] = {"tokenizer": options.tokenizer, "corpora": [{"prefix": options.corpus}]}
    name = options.output.stem if options.output else "omega"
    proposal.values["logging"] = {"run_directory": f"runs/{name}"}
    text = "\n".join(lines(proposal, wish)) + "\n"
    if options.output is None:
        print(text, end="")
        return
    with writing(options.output):
        options.output.write_text(text, encoding="utf-8")
    zero = proposal.estimate.candidate.zero_stage
    print(f"wrote {options.output}: {_summary(proposal, hardware)}")
    print(f"next: {COMMAND} train --config {options.output} --deepspeed_config zero{zero} --dry-run")


def _hardware(options: argparse.Namespace) -> Hardware:
    if options.gpu == CPU and options.hardware is None and (machine := this_machine()) is not None:
        if not machine.is_calibrated:
            print(f"this machine is {machine.origin}", file=sys.stderr)
        return machine.hardware
    return find_hardware(options.gpu, file=read_hardware(options.hardware))


def lines(proposal: Proposal, wish: Wish) -> Iterator[str]:
    """Yield the file: every setting with its meaning behind it."""
    yield f"# {_summary(proposal, proposal.estimate.hardware)}"
    label = proposal.estimate.candidate.label
    yield f"# Layout {label}; {COMMAND} plan compares others, {COMMAND} settings explains every setting."
    meanings = {setting.name: " ".join((setting.field.description or "").split()) for setting in settings()}
    for section in SECTIONS:
        yield f"{section}:"
        for field, value in proposal.values[section].items():
            text = yaml_text.dump({field: value}).rstrip().replace("\n", "\n  ")
            yield f"  # {meanings[f'{section}.{field}']}"
            yield f"  {text}"


def _summary(proposal: Proposal, hardware: Hardware) -> str:
    estimate, steps = proposal.estimate, proposal.values["training"]["train_steps"]
    tokens = steps * proposal.values["batch"]["global_batch_size"]
    per_sample = estimate.tokens_per_second * estimate.step_seconds / proposal.values["batch"]["global_batch_size"]
    return (
        f"{proposal.parameters:,} parameters, {tokens * per_sample:,.3g} tokens in {steps:,} steps on "
        f"{estimate.candidate.world_size} x {hardware.name}: {estimate.step_seconds:.3g} s a step, "
        f"{proposal.seconds / 3600:,.1f} hours, {estimate.peak_memory / 2**30:.1f} GiB (calculated)"
    )
