"""Look into a checkpoint: its parameters, sizes and origin; whether it is whole; how it differs from another.

    megatron-omega inspect-checkpoint runs/omega                                    the checkpoints of a run
    megatron-omega inspect-checkpoint runs/omega/checkpoints/step-00000100          one of them, or an export
    megatron-omega inspect-checkpoint --checkpoint PATH --verify                    read every byte, of one or of all
    megatron-omega inspect-checkpoint --checkpoint PATH --diff OTHER                largest differences by parameter

Of several checkpoints `--diff` takes the newest. Exit code 4: the checkpoint is damaged or not one. A list of several
names the damaged ones; it fails if none is whole, and with --verify if any is not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_omega.checkpoint.catalogue import newest_whole
from megatron_omega.checkpoint.inspection import (
    CheckpointRow,
    Comparison,
    checkpoint_rows,
    compare,
    parameter_rows,
    total_bytes,
)
from megatron_omega.checkpoint.manifest import Manifest
from megatron_omega.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_omega.errors import CheckpointError
from megatron_omega.export.native import is_export, open_export
from megatron_omega.host.command_line import CommandLine


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.takes_checkpoint(positional=True)
    parser.add_argument("--verify", action="store_true", help="read every byte and compare all checksums")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with another checkpoint, tensor by tensor")
    parser.add_argument("--top", type=int, default=20, help="differences to print, largest first (default: 20)")
    parser.add_argument("--json", action="store_true", help="print data instead of tables")
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    options = build_parser().parse_args(argv)
    if is_export(options.checkpoint):
        show_export(options.checkpoint, verify=options.verify, as_json=options.json)
    elif options.diff is not None:
        paths = newest_whole(options.checkpoint), newest_whole(options.diff)
        with open_checkpoint(paths[0]) as reader, open_checkpoint(paths[1]) as other:
            show_comparison(compare(reader, other), paths, options.top, as_json=options.json)
    elif rows := checkpoint_rows(options.checkpoint, verify=options.verify):
        show_run(rows, as_json=options.json)
        damage = [row.damage for row in rows if row.damage is not None]
        if damage and (options.verify or len(damage) == len(rows)):
            raise CheckpointError(*damage)
    else:
        with open_checkpoint(newest_whole(options.checkpoint)) as reader:
            show_checkpoint(reader, verify=options.verify, as_json=options.json)


def show_run(rows: Sequence[CheckpointRow], *, as_json: bool) -> None:
    """Print the checkpoints of a run."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    cells = [
        (row.name, _size(row.size_bytes), row.layout, "yes" if row.has_optimizer else "no", _loss(row.validation_loss))
        if row.damage is None
        else (row.name, "damaged", row.damage, "", "")
        for row in rows
    ]
    _table(("checkpoint", "size", "saved under", "optimizer", "validation loss"), cells)


def show_checkpoint(reader: CheckpointReader, *, verify: bool, as_json: bool) -> None:
    """Print one checkpoint; raises CheckpointError where files are missing or, with `verify`, any byte is wrong."""
    reader.check_files()
    damage = reader.verify() if verify else []
    rows = parameter_rows(reader.manifest)
    if as_json:
        facts = _facts(reader.manifest) | {"verified": verify, "damage": damage}
        print(json.dumps(facts | {"parameters": [asdict(row) for row in rows]}, indent=2))
    else:
        cells = [(r.name, "x".join(map(str, r.shape)), "-" if r.axis is None else str(r.axis), str(r.num_fragments),
                  _size(r.size_bytes)) for r in rows]  # fmt: skip
        _table(("parameter", "shape", "axis", "pieces", "size"), cells)
        print()
        for key, value in _plain(_facts(reader.manifest)).items():
            print(f"{key:16} {value}")
        print(f"{'parameters':16} {reader.element_count():,} in {len(rows)} tensors")
        if verify and not damage:
            print(f"{'verified':16} every byte of {_size(total_bytes(reader.manifest))} is what was written")
    if damage:
        raise CheckpointError(*damage)


def _facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "step": manifest.step,
        "created": manifest.created,
        "saved_under": str(manifest.layout),
        "has_optimizer": manifest.has_optimizer,
        "size_bytes": total_bytes(manifest),
        "validation_loss": manifest.validation_loss,
        "state": manifest.state,
        "versions": manifest.versions,
    }


def _plain(facts: dict[str, Any]) -> dict[str, str]:
    """Return facts in words, without what only a program would read."""
    state, versions = facts["state"], facts["versions"]
    return {
        "step": f"{facts['step']:,}",
        "created": str(facts["created"]),
        "saved under": str(facts["saved_under"]),
        "optimizer": "yes" if facts["has_optimizer"] else "no",
        "size": _size(facts["size_bytes"]),
        "validation loss": _loss(facts["validation_loss"]),
        "samples, tokens": f"{state.get('consumed_samples', 0):,}, {state.get('consumed_tokens', 0):,}",
        "written with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def show_export(path: Path, *, verify: bool, as_json: bool) -> None:
    """Print the parameters of an export; with `verify` read every tensor and compare its checksum."""
    with closing(open_export(path)) as export:
        described = export.description
        if verify:
            for name in export.names():
                export.tensor(name)
        if as_json:
            shapes = {name: list(entry.shape) for name, entry in described.parameters.items()}
            facts = {"step": described.step, "dtype": described.dtype, "verified": verify}
            print(json.dumps(facts | {"parameters": shapes}))
            return
        _table(("parameter", "shape", "file"),
               [(name, "x".join(map(str, p.shape)), p.file) for name, p in described.parameters.items()])  # fmt: skip
        count = sum(math.prod(p.shape) for p in described.parameters.values())
        print(f"\nexport of step {described.step:,}, {described.dtype}, {count:,} parameters")
        if verify:
            print("verified: every tensor is what was written")


def show_comparison(comparison: Comparison, paths: tuple[Path, Path], top: int, *, as_json: bool) -> None:
    """Print how two checkpoints differ."""
    if as_json:
        print(json.dumps(asdict(comparison), indent=2))
        return
    different = [row for row in comparison.differences if row.num_different]
    cells = [
        (row.name, row.kind, f"{row.relative:.3e}", f"{row.largest:.3e}", f"{row.num_different:,}")
        for row in different[:top]
    ]
    if cells:
        _table(("tensor", "kind", "relative", "largest", "elements"), cells)
    print(f"{len(different)} of {len(comparison.differences)} tensors differ between {paths[0]} and {paths[1]}")
    for label, names in (
        ("only in the first", comparison.only_first),
        ("only in the second", comparison.only_second),
        ("of another shape", comparison.other_shape),
    ):
        if names:
            print(f"{label}: {', '.join(names)}")


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    rows = list(rows)
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    for row in (titles, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.2f} MiB"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
