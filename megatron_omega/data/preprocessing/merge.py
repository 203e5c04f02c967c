"""Shards -> one shard, in the given order: bytes are copied, index entries moved; no token passes through memory."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from megatron_omega.data.indexed import IndexedShard, header
from megatron_omega.data.origins import Origins, join_runs, load_origins
from megatron_omega.data.preprocessing.join import copy_files, partial_path, publish, write_sums
from megatron_omega.data.sidecar import Sidecar, read_sidecar
from megatron_omega.errors import DataError

_BLOCK = 1 << 20


def merge_shards(prefixes: Sequence[str], output: str) -> tuple[int, int]:
    """Write shard `output` = all `prefixes` one after another; return (documents, tokens). Raises DataError."""
    if Path(f"{output}.idx").exists():
        raise DataError(f"{output}.idx exists; choose another --output-prefix or remove it")
    check_array(prefixes)
    shards = [IndexedShard(prefix) for prefix in prefixes]
    sidecars = _check(shards)
    try:
        with partial_path(f"{output}.bin").open("wb") as target:
            copy_files([Path(f"{shard.prefix}.bin") for shard in shards], target)
        with partial_path(f"{output}.idx").open("wb") as target:
            write_merged_index(shards, target)
        write_sums(output)
        _publish(shards, sidecars, output)
    except OSError as error:
        free = shutil.disk_usage(Path(output).absolute().parent).free
        raise DataError(
            f"{output} cannot be written ({error.strerror}; {free / 1e9:.1f} GB free); run it again"
        ) from None
    return sum(map(len, shards)), sum(shard.num_tokens for shard in shards)


def check_array(prefixes: Sequence[str]) -> None:
    """Raise DataError where prefixes are named as elements of an array (-I-of-N_) and not all are there, in order."""
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
    """Return the sidecars; raise DataError where two shards do not belong together."""
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


def _publish(shards: Sequence[IndexedShard], sidecars: Sequence[Sidecar | None], output: str) -> None:
    known = [sidecar for sidecar in sidecars if sidecar is not None]
    if len(known) < len(shards):
        for suffix in (".bin", ".sums", ".idx"):  # without a tokenizer's name there is nothing to vouch for
            partial_path(output + suffix).replace(output + suffix)
        return
    bad: Counter[str] = Counter()
    for sidecar in known:
        bad.update(sidecar.counts.get("bad", {}))
    counts = {"bad": dict(bad), "duplicates": sum(sidecar.counts.get("duplicates", 0) for sidecar in known)}
    options = {**known[0].options, "identity": "", "merged": [shard.prefix for shard in shards]}
    documents, tokens = sum(map(len, shards)), sum(shard.num_tokens for shard in shards)
    first = known[0]
    sidecar = Sidecar(
        first.tokenizer_fingerprint, first.vocab_size, documents, tokens, first.dtype, first.key, options, counts
    )
    publish(output, sidecar, _merged_origins(shards))


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
