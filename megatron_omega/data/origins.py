"""Where the documents of a shard came from: runs of consecutive records, a few numbers for any number of documents.

`{prefix}.origins.npz` holds the names of the input files and `runs`, int64 [runs, 3]: first document, file, first
record (from 0). Within a run, document and record numbers ascend together.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_omega.errors import DataError
from megatron_omega.host.regular_files import open_regular

Runs = NDArray[np.int64]
_DAMAGE = (
    OSError, EOFError, ValueError, KeyError, RuntimeError, MemoryError, OverflowError, struct.error, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
"""What numpy and zipfile raise on damaged archives."""
EMPTY_RUNS: Runs = np.empty((0, 3), dtype=np.int64)


@dataclass(frozen=True)
class Origins:
    """File and record of every document."""

    files: tuple[str, ...]
    runs: Runs

    def locate(self, document: int) -> tuple[str, int]:
        """Return (file, record number from 0) of a document."""
        run = int(np.searchsorted(self.runs[:, 0], document, side="right")) - 1
        first, file, record = self.runs[run].tolist()
        return self.files[file], record + document - first

    def records(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (file numbers, record numbers) of many documents."""
        run = np.searchsorted(self.runs[:, 0], documents, side="right") - 1
        return self.runs[run, 1], self.runs[run, 2] + documents - self.runs[run, 0]


def unit_runs(first_document: int, file: int, first_record: int, records: int, bad: Sequence[int]) -> Runs:
    """Return the runs of `records` consecutive records of a file, without those at the positions `bad`."""
    edges = np.asarray([-1, *bad, records], dtype=np.int64)
    starts, counts = edges[:-1] + 1, np.diff(edges) - 1
    starts, counts = starts[counts > 0], counts[counts > 0]
    documents = first_document + np.cumsum(counts) - counts
    return np.stack([documents, np.full(len(starts), file, dtype=np.int64), first_record + starts], axis=1)


def join_runs(pieces: Iterable[Runs]) -> Runs:
    """Join runs of consecutive documents; merge those that continue each other."""
    runs = np.concatenate([EMPTY_RUNS, *pieces])
    return _merged(runs)


def reordered(origins: Origins, documents: NDArray[np.int64]) -> Runs:
    """Return the runs of a shard whose document j is document `documents[j]` of `origins`."""
    files, records = origins.records(documents)
    return _merged(np.stack([np.arange(len(documents)), files, records], axis=1).astype(np.int64))


def _merged(runs: Runs) -> Runs:
    if not len(runs):
        return runs
    step = np.diff(runs, axis=0)
    is_new = np.concatenate([[True], (step[:, 1] != 0) | (step[:, 0] != step[:, 2])])
    return runs[is_new]


def origins_path(prefix: str | Path) -> Path:
    """Return where the origins of shard `prefix` stand."""
    return Path(f"{prefix}.origins.npz")


def save_origins(path: Path, origins: Origins) -> None:
    """Write origins to exactly `path`."""
    with path.open("wb") as file:
        np.savez(file, runs=origins.runs, files=np.asarray(origins.files, dtype=np.str_))


def _require_sense(origins: Origins) -> None:
    """Raise ValueError if the runs cannot be those of documents in these files."""
    runs = origins.runs
    if runs.ndim != 2 or runs.shape[1] != 3 or runs.dtype != np.int64:
        raise ValueError(f"runs are {runs.dtype} of shape {runs.shape}")
    if len(runs) and (runs.min() < 0 or runs[:, 1].max() >= len(origins.files) or (np.diff(runs[:, 0]) <= 0).any()):
        raise ValueError("runs do not ascend, or name a file that is not listed")


def load_origins(prefix: str | Path) -> Origins | None:
    """Return the origins of shard `prefix`; None if nobody wrote them."""
    path = origins_path(prefix)
    if not path.exists():
        return None
    try:
        with os.fdopen(open_regular(path), "rb") as file, np.load(file, allow_pickle=False) as content:
            origins = Origins(tuple(str(name) for name in content["files"]), content["runs"])
        _require_sense(origins)
        return origins
    except _DAMAGE as error:
        raise DataError(
            f"{path} is damaged ({error}); make the shard again with megatron-omega preprocess-data"
        ) from None
