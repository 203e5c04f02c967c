"""An input file as the corpus sees it, and the pieces that it is read in. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_omega.corpus.reading.compressed_source import Compression

Format = Literal["jsonl", "csv", "tsv", "parquet", "arrow", "text"]
WHOLE = -1


@dataclass(frozen=True)
class InputFile:
    """One file, and how to read it."""

    path: str
    format: Format
    compression: Compression
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Unit:
    """What one worker reads in one go: bytes or row groups start..stop of a file, or all of it (stop = WHOLE)."""

    file: int
    start: int = 0
    stop: int = WHOLE
