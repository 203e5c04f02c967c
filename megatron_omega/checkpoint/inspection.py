"""Looking into checkpoints: what one holds, whether it is whole, how two differ. Reads one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_omega.checkpoint.catalogue import check_structure, checkpoints_at
from megatron_omega.checkpoint.manifest import ELEMENT_BYTES, Kind, Manifest
from megatron_omega.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_omega.errors import CheckpointError


@dataclass(frozen=True)
class ParameterRow:
    """One parameter of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    axis: int | None
    """The axis tensor parallelism splits."""
    num_fragments: int
    """Pieces it is stored in."""
    size_bytes: int
    """Of its weight and, where they are there, both moments."""


@dataclass(frozen=True)
class CheckpointRow:
    """One checkpoint of a folder."""

    name: str
    step: int
    size_bytes: int
    layout: str
    has_optimizer: bool
    validation_loss: float | None
    damage: str | None


@dataclass(frozen=True)
class Difference:
    """How one tensor differs between two checkpoints."""

    name: str
    kind: Kind
    largest: float
    """Largest absolute difference of two elements; NaN if one of them is none."""
    relative: float
    """Root-mean-square difference over the root mean square of the first tensor; 0 where both are equal."""
    num_different: int
    """Elements whose bits differ."""


@dataclass(frozen=True)
class Comparison:
    """How two checkpoints differ."""

    differences: tuple[Difference, ...]
    """Of all tensors both hold, largest relative difference first."""
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    other_shape: tuple[str, ...]


def parameter_rows(manifest: Manifest) -> list[ParameterRow]:
    """Return one row for each parameter, by name."""
    return [
        ParameterRow(
            name=name,
            shape=entry.shape,
            axis=entry.axis,
            num_fragments=len(entry.fragments),
            size_bytes=math.prod(entry.shape) * ELEMENT_BYTES * len(manifest.kinds),
        )
        for name, entry in sorted(manifest.parameters.items())
    ]


def checkpoint_rows(directory: Path, *, verify: bool = False) -> list[CheckpointRow]:
    """Return one row for each checkpoint of a folder or a run, newest first; damaged ones say what is wrong.

    With `verify` every byte is read; else names, sizes and headers only.
    """
    return [_checkpoint_row(path, verify=verify) for path in checkpoints_at(directory) if path != directory]


def _checkpoint_row(path: Path, *, verify: bool) -> CheckpointRow:
    try:
        manifest = check_structure(path)
        if verify:
            with open_checkpoint(path) as reader:
                if damage := reader.verify():
                    raise CheckpointError(*damage)
    except CheckpointError as error:
        step = int(path.name.rpartition("-")[2])
        return CheckpointRow(path.name, step, 0, "", False, None, error.findings[0])
    return CheckpointRow(
        name=path.name,
        step=manifest.step,
        size_bytes=total_bytes(manifest),
        layout=str(manifest.layout),
        has_optimizer=manifest.has_optimizer,
        validation_loss=manifest.validation_loss,
        damage=None,
    )


def total_bytes(manifest: Manifest) -> int:
    """Return the size of all tensor files."""
    return sum(entry.size_bytes for entry in manifest.files())


def compare(first: CheckpointReader, second: CheckpointReader) -> Comparison:
    """Compare every tensor that both hold. Raises CheckpointError if one is damaged."""
    mine, theirs = first.manifest.parameters, second.manifest.parameters
    common = sorted(mine.keys() & theirs.keys())
    alike = [name for name in common if mine[name].shape == theirs[name].shape]
    kinds = min(first.manifest.kinds, second.manifest.kinds, key=len)
    found = (_difference(first, second, name, kind) for name in alike for kind in kinds)
    return Comparison(
        differences=tuple(_largest_first(found)),
        only_first=tuple(sorted(mine.keys() - theirs.keys())),
        only_second=tuple(sorted(theirs.keys() - mine.keys())),
        other_shape=tuple(name for name in common if name not in alike),
    )


def _largest_first(found: Iterable[Difference]) -> list[Difference]:
    return sorted(found, key=lambda row: -math.inf if math.isnan(row.relative) else -row.relative)


def _difference(first: CheckpointReader, second: CheckpointReader, name: str, kind: Kind) -> Difference:
    mine, theirs = first.tensor(name, kind).reshape(-1), second.tensor(name, kind).reshape(-1)
    num_different = int((mine.view(torch.int32) != theirs.view(torch.int32)).sum())
    scale = mine.double().norm().item()
    theirs.sub_(mine)
    distance = theirs.double().norm().item()
    return Difference(
        name=name,
        kind=kind,
        largest=theirs.abs().max().item(),
        relative=0.0 if num_different == 0 else distance / scale if scale else math.inf,
        num_different=num_different,
    )
