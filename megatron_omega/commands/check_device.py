"""Check a device before it is trusted: kernels, losses, resuming, messages and rates, each number with its limit.

    megatron-omega check-device --gpus 8

One line for each number: PASS, FAIL or SKIP, what it is, and what it may be. The first FAIL ends the checking. Needs no
corpus. `--device cpu` checks all that has a meaning there, in about two minutes. Exit code 0: nothing failed; 1: FAIL.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import CommandLine, output_file, writing


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to use: 1 or a multiple of 2 (default: 1)")
    parser.add_argument("--only", help="comma-separated names of checks (default: all)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the numbers to this file, too")
    return parser


def main(argv: Sequence[str]) -> int:
    """Check, print, and return the exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.gpus != 1 and arguments.gpus % 2:
        raise ConfigError(f"--gpus {arguments.gpus} cannot be halved; use 1, or a multiple of 2")
    import torch

    from megatron_omega.studies.device.checks import every_finding
    from megatron_omega.studies.device.findings import Setting, until_failure

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and torch.cuda.device_count() < arguments.gpus:
        raise ConfigError(
            f"--gpus {arguments.gpus}, but this machine has {torch.cuda.device_count()} usable GPUs; use as many, or "
            "--device cpu"
        )
    torch.set_num_threads(1)  # as every rank has it
    names = arguments.only.split(",") if arguments.only else []
    found = []
    for finding in until_failure(every_finding(Setting(device, arguments.gpus), names)):
        print(finding, flush=True)
        found.append(finding)
    if arguments.json:
        with writing(arguments.json):
            arguments.json.write_text(json.dumps([finding.as_json() for finding in found], indent=1), encoding="utf-8")
    passed = all(finding.passed for finding in found)
    print(f"{'PASS' if passed else 'FAIL'}: {len(found)} lines, {sum(not finding.passed for finding in found)} beyond")
    return 0 if passed else 1
