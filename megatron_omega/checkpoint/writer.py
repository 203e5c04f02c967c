"""Writing a checkpoint so that it exists whole or not at all. Knows no engine: it is given tensors and their places.

    every rank   writes its files into a hidden staging folder, flushes them, keeps their checksums
    all ranks    exchange checksums; one failure anywhere fails the save everywhere
    rank 0       writes the manifest last, flushes it and the folder, renames the folder, flushes its parent

A process killed at any point leaves the earlier checkpoints as they were and at most one staging folder, which the next
save of the run removes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from pydantic import JsonValue
from torch import Tensor

from megatron_omega.checkpoint.manifest import (
    FILE_NAME,
    FileEntry,
    Fragment,
    Kind,
    Manifest,
    ParameterEntry,
    Shard,
    encode_manifest,
    tensor_key,
)
from megatron_omega.checkpoint.tensor_file import BLOCK_BYTES, Entry, Written, write_tensors
from megatron_omega.errors import CheckpointError
from megatron_omega.log import get_logger
from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.regions import Region

STEP_PREFIX = "step-"
HIDDEN_PREFIX = ".unfinished-"

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux

logger = get_logger(__name__)


def step_folder(step: int) -> str:
    """Return the name of the checkpoint of `step`."""
    return f"{STEP_PREFIX}{step:08d}"


@dataclass(frozen=True)
class Piece:
    """What this rank writes of one parameter: one region of the weight and of both moments (1-D, fp32)."""

    name: str
    axis: int | None
    region: Region
    step: float
    tensors: dict[Kind, Tensor]
    checksums: dict[Kind, tuple[str, ...]] = field(default_factory=dict)
    """Of the blocks of those tensors for which they are known already."""


@dataclass(frozen=True)
class Snapshot:
    """The state of one rank at one step, ready to be written."""

    pieces: Sequence[Piece]
    head: dict[str, Any]
    """Every field of the manifest that is not about files; the first rank's counts."""
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    """Further files by name, which the first rank writes; no reader of the format needs them."""


def write_checkpoint(directory: Path, snapshot: Snapshot, peers: Peers, *, token: str) -> Path:
    """Write the checkpoint and return its folder. Collective.

    `token` is the same on all ranks and names the staging folder. Raises CheckpointError where any rank failed; then
    nothing of the save remains and older checkpoints are untouched.
    """
    name = step_folder(snapshot.head["step"])
    staging = directory / f"{HIDDEN_PREFIX}{name}-{token}"
    try:
        parts = peers.exchange(_attempt(lambda: _write_shard(staging, snapshot, peers.rank)))
        _raise_failure(parts, staging, peers)
        outcome = None
        if peers.is_first:
            shards = [cast(dict[str, Any], part)["result"] for part in parts]
            outcome = _attempt(lambda: _finish(staging, directory / name, snapshot, shards))
        _raise_failure([peers.agree(outcome)], staging, peers)
    except RuntimeError as error:
        if peers.is_first:  # it alone renames the folder: another rank might empty one that has just become whole
            _discard(staging)
        raise CheckpointError(
            f"step {snapshot.head['step']} was not saved: another rank is gone ({_first_sentence(error)})"
        ) from error
    return directory / name


def write_alone(
    directory: Path,
    parts: Iterable[Sequence[Piece]],
    head: dict[str, Any],
    *,
    attachments: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint from one process, a shard for each of `parts`, and return its folder.

    `parts` are made one after another, so that no more than one of them is in memory. Pieces without moments make a
    checkpoint of weights alone. Raises CheckpointError where the disk fails; then nothing of it remains.
    """
    name = step_folder(head["step"])
    staging = directory / f"{HIDDEN_PREFIX}{name}-{os.getpid()}"
    try:
        shards: Any = [_write_shard(staging, Snapshot(part, head), number) for number, part in enumerate(parts)]
        _finish(staging, directory / name, Snapshot((), head, attachments), shards)
    except OSError as error:
        raise CheckpointError(f"{directory / name} cannot be written: {error.strerror}; free space") from None
    finally:
        _discard(staging)
    return directory / name


def _first_sentence(error: BaseException) -> str:
    return str(error).split(". ")[0]


def _attempt(action: Callable[[], JsonValue]) -> JsonValue:
    try:
        return {"result": action()}
    except Exception as error:  # told to all ranks, which then all fail: nobody waits for the one that did
        return {"error": f"{type(error).__name__}: {error}"}


def _raise_failure(parts: Sequence[JsonValue], staging: Path, peers: Peers) -> None:
    errors = [
        f"rank {rank}: {part['error']}" for rank, part in enumerate(parts) if isinstance(part, dict) and "error" in part
    ]
    if errors:
        if peers.is_first:
            _discard(staging)
        name = staging.name.removeprefix(HIDDEN_PREFIX).rpartition("-")[0]
        raise CheckpointError(f"{name} was not saved: {'; '.join(errors)}")


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _write_shard(staging: Path, snapshot: Snapshot, rank: int) -> JsonValue:
    """Write this rank's two files; return what the manifest says of them."""
    staging.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, tuple[Kind, ...]] = {"weights": ("weight",), "optimizer": ("exp_avg", "exp_avg_sq")}
    files: dict[str, JsonValue] = {"optimizer": None}
    blocks: dict[str, tuple[str, ...]] = {}
    for role, contents in kinds.items():
        if not all(kind in piece.tensors for piece in snapshot.pieces for kind in contents):
            continue
        path = staging / f"{role}-{rank:05d}.safetensors"
        written = write_tensors(path, [_entry(piece, kind) for kind in contents for piece in snapshot.pieces])
        files[role] = _file_entry(path.name, written)
        blocks |= written.block_checksums
    return {"shard": files, "parameters": {piece.name: _describe(piece, blocks) for piece in snapshot.pieces}}


def _entry(piece: Piece, kind: Kind) -> Entry:
    shape = piece.region.box_shape if piece.region.is_whole_box else (piece.region.count,)
    return Entry(tensor_key(piece.name, kind), shape, piece.tensors[kind], piece.checksums.get(kind))


def _file_entry(name: str, written: Written) -> dict[str, JsonValue]:
    return {"name": name, "size_bytes": written.size_bytes, "header": written.header_checksum}


def _describe(piece: Piece, blocks: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    region = piece.region
    return {
        "shape": region.shape,
        "axis": piece.axis,
        "step": piece.step,
        "slice": None if region.axis is None else (region.start, region.stop),
        "range": (region.first, region.first + region.count),
        "blocks": {kind: blocks[tensor_key(piece.name, kind)] for kind in piece.tensors},
    }


def _assemble(snapshot: Snapshot, parts: Sequence[dict[str, Any]]) -> Manifest:
    entries: dict[str, dict[str, Any]] = {}
    for index, part in enumerate(parts):
        for name, row in part["parameters"].items():
            entry = entries.setdefault(name, {**row, "fragments": []})
            assert entry["step"] == row["step"], f"{name}: optimizer steps {entry['step']} and {row['step']}"
            span = None if row["slice"] is None else tuple(row["slice"])
            entry["fragments"].append(
                Fragment(shard=index, slice=span, range=tuple(row["range"]), blocks=_tuples(row["blocks"]))
            )
    manifest = Manifest(
        **snapshot.head,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        block_bytes=BLOCK_BYTES,
        shards=tuple(_shard(part["shard"]) for part in parts),
        parameters={
            name: ParameterEntry(
                shape=tuple(entry["shape"]), axis=entry["axis"], step=entry["step"], fragments=tuple(entry["fragments"])
            )
            for name, entry in sorted(entries.items())
        },
    )
    problems = manifest.problems()
    assert not problems, f"ranks do not hold every element exactly once: {problems[:5]}"
    return manifest


def _shard(files: Mapping[str, Any]) -> Shard:
    return Shard(**{role: row and FileEntry(**row) for role, row in files.items()})


def _tuples(blocks: dict[Kind, list[str]]) -> dict[Kind, tuple[str, ...]]:
    return {kind: tuple(sums) for kind, sums in blocks.items()}


def _finish(staging: Path, target: Path, snapshot: Snapshot, shards: Sequence[dict[str, Any]]) -> JsonValue:
    for name, data in snapshot.attachments.items():
        write_durably(staging / name, data)
    return _commit(staging, target, _assemble(snapshot, shards))


def _commit(staging: Path, target: Path, manifest: Manifest) -> JsonValue:
    write_durably(staging / FILE_NAME, encode_manifest(manifest))
    sync_folder(staging)
    if not target.exists():
        staging.rename(target)
        sync_folder(target.parent)
    else:  # a checkpoint of the same step that a resume walked past, or that a run that went back reached again
        exchange_folders(staging, target)
        sync_folder(target.parent)
        _discard(staging)
    return str(target)


def exchange_folders(new: Path, old: Path) -> None:
    """Exchange two folders' names in one operation of the file system: there is no moment without `old`.

    Where the system cannot (NFS), in two: a process killed between them leaves the older checkpoints only.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(_HERE, bytes(new), _HERE, bytes(old), _EXCHANGE) == 0:
        return
    aside = old.with_name(f"{new.name}-replaced")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(directory: Path, *, token: str) -> None:
    """Remove what killed saves left behind, except the staging folders of the save named by `token`."""
    for folder in directory.glob(f"{HIDDEN_PREFIX}*"):
        if not folder.name.endswith(token):
            logger.info("removing %s, left by a save that did not finish", folder)
            _discard(folder)
