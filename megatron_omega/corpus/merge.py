"""Shards -> one shard, in the given order: bytes are copied, index entries moved; no token passes through memory.

Where duplicates are left out, every document is read once for its hash, and memory holds 8 bytes a document.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_omega.corpus.join import (
    copy_files,
    copy_range,
    first_occurrences,
    partial_path,
    publish,
    write_sums,
)
from megatron_omega.corpus.parts import remove_files
from megatron_omega.data.indexed import IndexedShard, header, write_index
from megatron_omega.data.origins import Origins, join_runs, load_origins, reordered
from megatron_omega.data.sidecar import Sidecar, read_sidecar
from megatron_omega.errors import DataError

_BLOCK = 1 << 20
Kept = NDArray[np.int64]


@dataclass(frozen=True)
class Merged:
    """What came out."""

    documents: int
    tokens: int
    duplicates: int


def merge_shards(prefixes: Sequence[str], output: str, *, is_deduplicated: bool = False) -> Merged:
    """Write shard `output` = all `prefixes` one after another, or the first of equal documents. Raises DataError."""
    if Path(f"{output}.idx").exists():
        raise DataError(f"{output}.idx exists; choose another --output-prefix or remove it")
    check_array(prefixes)
    shards = [IndexedShard(prefix) for prefix in prefixes]
    sidecars = _check(shards)
    try:
        kept = _first_of_equals(shards, output) if is_deduplicated else None
        with partial_path(f"{output}.bin").open("wb") as target:
            if kept is None:
                copy_files([Path(f"{shard.prefix}.bin") for shard in shards], target)
            else:
                _copy_kept(shards, kept, target)
        with partial_path(f"{output}.idx").open("wb") as target:
            if kept is None:
                write_merged_index(shards, target)
            else:
                lengths = [shard.lengths_of(0, len(shard))[mine] for shard, mine in _by_shard(shards, kept)]
                write_index(target, lengths, shards[0].dtype)
        write_sums(output)
        merged = _count(shards, kept)
        _publish(shards, sidecars, output, merged, kept)
    except OSError as error:
        free = shutil.disk_usage(Path(output).absolute().parent).free
        raise DataError(
            f"{output} cannot be written ({error.strerror}; {free / 1e9:.1f} GB free); run it again"
        ) from None
    return merged


def _count(shards: Sequence[IndexedShard], kept: Kept | None) -> Merged:
    documents = sum(map(len, shards))
    if kept is None:
        return Merged(documents, sum(shard.num_tokens for shard in shards), 0)
    tokens = sum(
        int(shard.lengths_of(0, len(shard))[mine].sum(dtype=np.int64)) for shard, mine in _by_shard(shards, kept)
    )
    return Merged(len(kept), tokens, documents - len(kept))


def _first_of_equals(shards: Sequence[IndexedShard], output: str) -> Kept:
    """Return which documents, counted over all shards, have tokens that no document before them has."""
    paths = [partial_path(f"{output}.{number}.hash") for number in range(len(shards))]
    for shard, path in zip(shards, paths, strict=True):
        if not shard.is_one_sequence_per_document:
            raise DataError(f"{shard.prefix} has documents of several sequences; merge it without --dedup")
        with path.open("wb") as file:
            for document in range(len(shard)):
                file.write(xxhash.xxh3_128_digest(shard.document(document).data))
    kept = first_occurrences(paths)
    remove_files(paths)
    return kept


def _by_shard(shards: Sequence[IndexedShard], kept: Kept) -> Iterator[tuple[IndexedShard, Kept]]:
    """Yield every shard with those of its documents that are kept."""
    first = 0
    for shard in shards:
        start, stop = np.searchsorted(kept, [first, first + len(shard)])
        yield shard, kept[start:stop] - first
        first += len(shard)


def _copy_kept(shards: Sequence[IndexedShard], kept: Kept, target: IO[bytes]) -> None:
    """Append the tokens of the documents that are kept, neighbours in one go."""
    for shard, mine in _by_shard(shards, kept):
        with Path(f"{shard.prefix}.bin").open("rb") as source:
            for run in np.split(mine, np.flatnonzero(np.diff(mine) != 1) + 1) if len(mine) else []:
                start, stop = (shard.start(int(bound)) * shard.dtype.itemsize for bound in (run[0], run[-1] + 1))
                copy_range(source, start, stop, target)


def check_array(prefixes: Sequence[str]) -> None:
    """Raise DataError if prefixes are named as elements of an array (-I-of-N_) and not all are there, in order."""
    named = [found for prefix in prefixes if (found := re.search(r"-(\d{5})-of-(\d{5})_", Path(prefix).name))]
    numbers = [int(found[1]) for found in named]
    counts = {int(found[2]) for found in named}
    if not named or (len(named) == len(prefixes) and len(counts) == 1 and numbers == list(range(*counts))):
        return
    wanted = range(max(counts))
    missing = [number for number in wanted if number not in numbers]
    found = f"shards {', '.join(map(str, missing))} of {len(wanted)} are missing" if missing else "shards are mixed"
    raise DataError(f"{found} in --input; give all shards of one array, in order, each once")


def _check(shards: Sequence[IndexedShard]) -> list[Sidecar | None]:
    """Return the sidecars; raise DataError if two shards do not belong together."""
    sidecars = [read_sidecar(shard.prefix) for shard in shards]
    findings: list[str] = []
    for shard, sidecar in zip(shards[1:], sidecars[1:], strict=True):
        if shard.dtype != shards[0].dtype:
            findings.append(f"{shard.prefix} holds {shard.dtype.name}, {shards[0].prefix} {shards[0].dtype.name}")
        first = sidecars[0]
        if sidecar and first and sidecar.tokenizer_fingerprint != first.tokenizer_fingerprint:
            findings.append(f"{shard.prefix} was made with another tokenizer than {shards[0].prefix}")
    if findings:
        raise DataError(*(f"{finding}; merge only shards of one tokenizer" for finding in findings))
    return sidecars


def _publish(
    shards: Sequence[IndexedShard], sidecars: Sequence[Sidecar | None], output: str, merged: Merged, kept: Kept | None
) -> None:
    known = [sidecar for sidecar in sidecars if sidecar is not None]
    if len(known) < len(shards):
        for suffix in (".bin", ".sums", ".idx"):  # without a tokenizer's name there is nothing to vouch for
            partial_path(output + suffix).replace(output + suffix)
        return
    bad: Counter[str] = Counter()
    for sidecar in known:
        bad.update(sidecar.counts.get("bad", {}))
    duplicates = merged.duplicates + sum(sidecar.counts.get("duplicates", 0) for sidecar in known)
    counts = {"bad": dict(bad), "duplicates": duplicates}
    options = {**known[0].options, "identity": "", "merged": [shard.prefix for shard in shards]}
    first = known[0]
    sidecar = Sidecar(
        first.tokenizer_fingerprint,
        first.vocab_size,
        merged.documents,
        merged.tokens,
        first.dtype,
        first.key,
        options,
        counts,
    )
    origins = _merged_origins(shards)
    if origins is not None and kept is not None:
        origins = Origins(origins.files, reordered(origins, kept))
    publish(output, sidecar, origins)


def _merged_origins(shards: Sequence[IndexedShard]) -> Origins | None:
    files: dict[str, int] = {}
    pieces: list[NDArray[np.int64]] = []
    document = 0
    for shard in shards:
        origins = load_origins(shard.prefix)
        if origins is None:
            return None
        numbers = np.asarray([files.setdefault(name, len(files)) for name in origins.files], dtype=np.int64)
        runs = origins.runs.copy()
        runs[:, 0] += document
        runs[:, 1] = numbers[runs[:, 1]]
        pieces.append(runs)
        document += len(shard)
    return Origins(tuple(files), join_runs(pieces))


def write_merged_index(shards: Sequence[IndexedShard], target: IO[bytes]) -> None:
    """Write the .idx of all shards one after another, a block of entries at a time."""
    sequences = sum(shard.num_sequences for shard in shards)
    documents = sum(map(len, shards))
    target.write(header(shards[0].dtype, sequences, documents + 1))
    for shard in shards:
        for block in _blocks(shard.lengths_of, 0, shard.num_sequences):
            target.write(block.tobytes())
    moved = 0
    for shard in shards:
        for block in _blocks(shard.pointers_of, 0, shard.num_sequences):
            target.write((block + moved).astype("<i8").tobytes())
        moved += shard.num_tokens * shard.dtype.itemsize
    moved = 0
    for number, shard in enumerate(shards):  # the first bound of a shard is the last of the one before it
        for block in _blocks(shard.bounds_of, 0 if number == 0 else 1, len(shard) + 1):
            target.write((block + moved).astype("<i8").tobytes())
        moved += shard.num_sequences


def _blocks(read: Callable[[int, int], NDArray[np.integer]], start: int, stop: int) -> Iterator[NDArray[np.integer]]:
    for begin in range(start, stop, _BLOCK):
        yield read(begin, min(stop, begin + _BLOCK))
