"""Measure this machine, so that plans and forecasts are about it.

Takes about 40 seconds. `megatron-omega plan --hardware runs/hardware.yaml --gpu cpu` reads the result, and so does
every run started in this folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from megatron_omega.config import yaml_text
from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import CommandLine, output_file, writing
from megatron_omega.planner.machine import CALIBRATED


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--output", type=output_file, default=CALIBRATED, help=f"hardware file to write (default: {CALIBRATED})"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--name", help="of the accelerator in the file (default: cpu, or the card's name)")
    parser.add_argument("--ranks", type=int, default=2, help="processes for timing collectives (default: 2)")
    parser.add_argument("--json", action="store_true", help="print data instead of text")
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    arguments = build_parser().parse_args(argv)
    if arguments.ranks < 2:
        raise ConfigError(f"--ranks {arguments.ranks} has nobody to talk to; use at least 2")
    import torch

    from megatron_omega.studies.calibration import calibrate

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but this machine has no usable GPU; use --device cpu")
    name = arguments.name or ("cpu" if device == "cpu" else "-".join(torch.cuda.get_device_name().lower().split()))
    file = calibrate(name, device, ranks=arguments.ranks, tell=lambda what: print(f"measuring {what}", file=sys.stderr))
    with writing(arguments.output):
        arguments.output.write_text(yaml_text.dump(file.model_dump(mode="json")), encoding="utf-8")
    facts, link = file.accelerators[name], file.links["measured"]
    if arguments.json:
        print(json.dumps(file.model_dump(mode="json")))
        return
    for dtype, peak in facts.peak_flops.items():
        print(f"products, {dtype:<5} {peak / 1e9:10.1f} GFLOP/s")
    print(f"attention       {facts.efficiency.attention * next(iter(facts.peak_flops.values())) / 1e9:10.1f} GFLOP/s")
    print(f"element-wise    {facts.memory_bandwidth / 1e9:10.1f} GB/s")
    print(f"kernel launch   {facts.launch_seconds * 1e6:10.1f} microseconds")
    print(f"all-reduce      {link.bytes_per_second / 1e9:10.2f} GB/s, {link.latency * 1e6:.0f} microseconds a hop")
    print(f"wrote {arguments.output}")
