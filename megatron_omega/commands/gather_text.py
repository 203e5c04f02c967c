"""Gather real text that every Python installation carries (documentation, docstrings, licences) into one jsonl.

    megatron-omega gather-text --output runs/corpus/text.jsonl

Nothing is downloaded. What is found depends on the installed packages, unless --standard-library leaves them out; its
order is a fixed shuffle.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_omega.corpus.installed_text import write_installed_text
from megatron_omega.host.command_line import CommandLine, output_file, writing


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_file, required=True, help="jsonl to write")
    parser.add_argument("--megabytes", type=float, default=6.0, help="how much text to gather (default 6)")
    parser.add_argument("--standard-library", action="store_true", help="leave installed packages out")
    arguments = parser.parse_args(argv)
    with writing(arguments.output):
        written = write_installed_text(arguments.output, arguments.megabytes, _show, arguments.standard_library)
    if sys.stderr.isatty():
        print(end="\r" + " " * 40 + "\r", file=sys.stderr)
    print(f"{arguments.output}: {written.documents:,} documents, {written.size_bytes / 1e6:.1f} MB of text")


def _show(megabytes: float) -> None:
    if sys.stderr.isatty():
        print(f"\rgathering text: {megabytes:.1f} MB", end="", file=sys.stderr, flush=True)
