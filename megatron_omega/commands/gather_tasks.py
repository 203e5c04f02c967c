"""Gather supervised tasks that every Python installation carries: summaries, defaults of arguments, packages.

    megatron-omega gather-tasks --output runs/tasks

Nothing is downloaded. The folder gets records, held-out records (of other files) and tasks.yaml, which finetune and
score take as --tasks. Every record names its source and licence.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_omega.corpus.installed_text import files_below, roots
from megatron_omega.host.command_line import CommandLine, output_folder
from megatron_omega.tasks.installed import Origin, gather, write_tasks


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=output_folder, required=True, help="folder to write to")
    parser.add_argument("--records", type=int, default=4000, help="most records of each task (default 4,000)")
    return parser.parse_args(argv)


def origins() -> list[Origin]:
    """Return every file of source, in a fixed shuffle."""
    places = set(roots())
    found = {}
    for root in sorted(places):
        for path in files_below(root, places - {root}):
            if path.suffix == ".py":
                place = path.relative_to(root)
                package = package_of(place)
                key = hashlib.blake2b(str(place).encode(), digest_size=8).hexdigest()
                found.setdefault(key, Origin(path, package))
    return [origin for _, origin in sorted(found.items())]


def package_of(place: Path) -> str:
    """Return the package of a file, also where a folder of packages lies inside of the standard library's."""
    parts = place.parts
    inner = [number for number, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    return parts[inner[-1] + 1 if inner else 0].removesuffix(".py")


def main(argv: Sequence[str]) -> None:
    """Gather and say what was found."""
    arguments = read_arguments(argv)
    files = origins()
    with tqdm(total=len(files), unit=" files", disable=None) as bar:
        found = gather(files, arguments.records, lambda number: bar.update(number - bar.n))
    path = write_tasks(arguments.output, found)
    held = {kind: sum(one["part"] == "held out" for one in records) for kind, records in found.items()}
    print(
        ", ".join(f"{kind}: {len(records) - held[kind]:,} + {held[kind]:,} held out" for kind, records in found.items())
    )
    print(f"finetune --tasks {path}")
