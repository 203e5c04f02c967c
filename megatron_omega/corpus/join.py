"""Parts -> shard: bytes are copied file to file, the index is written vectorised, and the whole appears at once.

No token passes through Python. Memory does not grow with the corpus, except for 8 bytes a document where documents are
shuffled or duplicates are dropped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from megatron_omega.corpus.parts import HASH_BYTES, part_path
from megatron_omega.data.checksums import file_sums
from megatron_omega.data.indexed import write_index
from megatron_omega.data.origins import Origins, origins_path, save_origins
from megatron_omega.data.sidecar import Sidecar, sidecar_path, to_json

_COPY_BYTES = 1 << 30
_GATHER_TOKENS = 1 << 22
_BUCKET_DOCUMENTS = 1 << 22
_LENGTHS = 1 << 20


@dataclass(frozen=True)
class Parts:
    """The parts of one key, in order."""

    folder: Path
    names: tuple[str, ...]
    key: int
    dtype: np.dtype

    def paths(self, suffix: str) -> list[Path]:
        return [part_path(self.folder, name, suffix) for name in self.names]

    @property
    def token_paths(self) -> list[Path]:
        return self.paths(f"{self.key}.bin")

    @property
    def length_paths(self) -> list[Path]:
        return self.paths(f"{self.key}.len")

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        """Yield the lengths of the documents, block by block; may be iterated again."""
        for path in self.length_paths:
            with path.open("rb") as file:
                while len(block := np.fromfile(file, dtype="<i4", count=_LENGTHS)):
                    yield block


class ChosenLengths:
    """Lengths of some documents of the parts, in another order; may be iterated again."""

    def __init__(self, parts: Parts, order: NDArray[np.int64]) -> None:
        self._all = np.concatenate([np.empty(0, np.int32), *parts])
        self._order = order

    def __iter__(self) -> Iterator[NDArray[np.int32]]:
        for start in range(0, len(self._order), _LENGTHS):
            yield self._all[self._order[start : start + _LENGTHS]]


def copy_files(sources: Sequence[Path], target: IO[bytes]) -> None:
    """Append whole files to `target`, inside the kernel where the file system can."""
    for source in sources:
        with source.open("rb") as file:
            copy_range(file, 0, source.stat().st_size, target)


def copy_range(source: IO[bytes], start: int, stop: int, target: IO[bytes]) -> None:
    """Append bytes start..stop of `source` to `target`."""
    target.flush()
    source.seek(start)
    left = stop - start
    while left:
        copied = _copy_some(source, target, min(left, _COPY_BYTES))
        if not copied:
            raise OSError(f"{source.name} ended {left} bytes early")
        left -= copied


def _copy_some(source: IO[bytes], target: IO[bytes], count: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source.fileno(), target.fileno(), count)
        except OSError as error:
            if error.filename is None and error.errno in _NO_COPY_IN_KERNEL:
                pass
            else:
                raise
    data = os.read(source.fileno(), min(count, 1 << 24))
    view = memoryview(data)
    while view:
        view = view[os.write(target.fileno(), view) :]
    return len(data)


_NO_COPY_IN_KERNEL = (18, 22, 38, 95)  # EXDEV, EINVAL, ENOSYS, EOPNOTSUPP


def write_joined(parts: Parts, prefix: str, order: NDArray[np.int64] | None) -> int:
    """Write `{prefix}.bin`, `.idx` and `.sums` under partial names; return the number of tokens."""
    with partial_path(f"{prefix}.bin").open("wb") as target:
        if order is None:
            copy_files(parts.token_paths, target)
        else:
            _gather(parts, order, target)
        _sync(target)
    with partial_path(f"{prefix}.idx").open("wb") as target:
        tokens = write_index(target, parts if order is None else ChosenLengths(parts, order), parts.dtype)
        _sync(target)
    write_sums(prefix)
    return tokens


def write_sums(prefix: str) -> None:
    """Write the block checksums of the partial .bin and .idx."""
    with partial_path(f"{prefix}.sums").open("wb") as target:
        for suffix in ("bin", "idx"):
            target.write(file_sums(partial_path(f"{prefix}.{suffix}")).astype("<u8").tobytes())
        _sync(target)


def publish(prefix: str, sidecar: Sidecar, origins: Origins | None) -> None:
    """Give a shard its final names; the .idx comes last, so what can be opened is whole."""
    partial_path(sidecar_path(prefix)).write_text(to_json(sidecar), encoding="utf-8")
    names = [f"{prefix}.bin", f"{prefix}.sums", str(sidecar_path(prefix))]
    if origins is not None:
        save_origins(partial_path(origins_path(prefix)), origins)
        names.append(str(origins_path(prefix)))
    for name in (*names, f"{prefix}.idx"):
        partial_path(name).replace(name)


def partial_path(path: str | Path) -> Path:
    """Return the name a file has until it is complete."""
    return Path(f"{path}.partial")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _gather(parts: Parts, order: NDArray[np.int64], target: IO[bytes]) -> None:
    """Write the tokens of documents in another order, some millions of tokens at a time."""
    whole = partial_path(part_path(parts.folder, "whole", f"{parts.key}.bin"))
    with whole.open("wb") as file:
        copy_files(parts.token_paths, file)
    lengths = np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens = np.memmap(whole, dtype=parts.dtype, mode="r") if whole.stat().st_size else np.empty(0, parts.dtype)
    chosen = lengths[order]
    ends = np.cumsum(chosen)
    done = 0
    while done < len(order):
        base = int(ends[done - 1]) if done else 0
        stop = max(done + 1, int(np.searchsorted(ends, base + _GATHER_TOKENS)))
        counts = chosen[done:stop]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        target.write(tokens[np.repeat(starts[order[done:stop]], counts) + inside].tobytes())
        done = stop
    whole.unlink()


def first_occurrences(paths: Sequence[Path]) -> NDArray[np.int64]:
    """Return, ascending, the documents whose hash no earlier document has. Works through hashes in buckets."""
    sizes = [path.stat().st_size // HASH_BYTES for path in paths]
    total = sum(sizes)
    buckets = -(-total // _BUCKET_DOCUMENTS) or 1
    keep = np.zeros(total, dtype=np.bool_)
    for bucket in range(buckets):
        found: list[NDArray[np.uint64]] = []
        numbers: list[NDArray[np.int64]] = []
        first = 0
        for path, size in zip(paths, sizes, strict=True):
            hashes = np.fromfile(path, dtype="<u8").reshape(-1, 2)
            mine = np.flatnonzero(hashes[:, 0] % np.uint64(buckets) == bucket)
            found.append(hashes[mine])
            numbers.append(mine + first)
            first += size
        keys, documents = np.concatenate(found), np.concatenate(numbers)
        order = np.lexsort((documents, keys[:, 1], keys[:, 0]))
        ordered = keys[order]
        is_first = np.ones(len(order), dtype=np.bool_)
        is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        keep[documents[order[is_first]]] = True
    return np.flatnonzero(keep)
