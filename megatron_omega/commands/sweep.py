"""Find the best learning rate, or other settings, by successive halving.

    megatron-omega sweep --config run.yaml --output runs/sweep --steps 400
    megatron-omega sweep --config run.yaml --output runs/sweep --steps 400 \\
        --vary optimizer.learning_rate=1e-3,2e-3,4e-3 --vary model.table_multiplier=1,3
    megatron-omega sweep --config run.yaml --output runs/sweep --steps 4000 \\
        --command "deepspeed --num_gpus 8 pretrain_omega.py"

Without --vary: five rates, a factor of 2 apart, around the configured one. All candidates train for the steps of the
first rung, the better half goes on to twice as many, and so on. Writes report.md, and run.yaml with the best values.
An interrupted sweep goes on with the same command. By default a run is --ranks processes on this machine's CPU; with
--command it is that command, followed by the settings. Exit code 0; 2 for a configuration that cannot run.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_omega.config.arguments import Arguments, read_overrides
from megatron_omega.config.load import load_config
from megatron_omega.errors import ConfigError, OmegaError
from megatron_omega.host.command_line import CommandLine, writing
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.studies.layouts import train_rank
from megatron_omega.studies.sweep import (
    Sweep,
    Train,
    Values,
    best_configuration,
    candidates_of,
    label,
    report,
    run_sweep,
    rungs_of,
)

_LONGEST_SECONDS = 7 * 86400.0


def build_parser() -> CommandLine:
    """Return the command line."""
    parser = CommandLine(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any --section.field value of the run's configuration may follow.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="run.yaml that everything starts from")
    parser.add_argument("--deepspeed_config", help="DeepSpeed configuration (JSON), as for a run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs, the report and run.yaml")
    parser.add_argument("--steps", type=int, required=True, help="steps of the last rung")
    parser.add_argument("--rungs", type=int, help="how often candidates are compared (default: at most 3)")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=V1,V2", help="a setting and its values")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run on this machine (default: 1)")
    parser.add_argument("--command", help="start a run with this command instead")
    return parser


def read_varied(words: Sequence[str]) -> dict[str, list[str]]:
    """Read NAME=V1,V2 words. Raises ConfigError with every one that is none."""
    findings = [f"--vary {word}: write a setting and its values, optimizer.learning_rate=1e-3,2e-3"
                for word in words if not all(part.strip(", ") for part in (word.partition("=")[::2]))]  # fmt: skip
    if findings:
        raise ConfigError(*findings)
    pairs = (word.partition("=")[::2] for word in words)
    return {name: [value for value in values.split(",") if value] for name, values in pairs}


def trainer(options: argparse.Namespace) -> Train:
    """Return what trains a run: processes of this machine, or a command of the user's."""

    def here(arguments: Arguments) -> None:
        run_ranks(train_rank, options.ranks, arguments, timeout_seconds=_LONGEST_SECONDS)

    def there(arguments: Arguments) -> None:
        command = [*shlex.split(options.command), *_words(arguments)]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise OmegaError(f"{shlex.join(command[:4])} ... ended with exit code {code}; its own log says why")

    return there if options.command else here


def _words(arguments: Arguments) -> list[str]:
    words = ["--config", str(arguments.config)]
    if arguments.deepspeed_config:
        words += ["--deepspeed_config", str(arguments.deepspeed_config)]
    return words + [word for override in arguments.overrides for word in (f"--{override.name}", override.text)]


def main(argv: Sequence[str]) -> None:
    """Search, and write what was found."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    overrides = tuple(read_overrides(rest, parser))
    config = load_config(options.config, overrides)
    candidates = candidates_of(config, read_varied(options.vary))
    count = options.rungs or min(3, max(1, len(candidates) - 1).bit_length() + 1)
    rungs = rungs_of(options.steps, count, len(candidates))
    sweep = Sweep(options.config, overrides, options.deepspeed_config, options.output, candidates, rungs)

    def tell(candidate: Values, steps: int, loss: float) -> None:
        print(f"{label(candidate)}: {loss:.4f} after {steps} steps", flush=True)

    outcome = run_sweep(sweep, trainer(options), tell)
    page = report(outcome)
    for name, text in (("report.md", page + "\n"), ("run.yaml", best_configuration(sweep, outcome))):
        with writing(options.output / name):
            (options.output / name).write_text(text, encoding="utf-8")
    print(f"\n{page}\n\n{options.output}/run.yaml has the best values", file=sys.stdout)
