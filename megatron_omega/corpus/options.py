"""What preprocessing is asked, and what it answers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_omega.corpus.parts import PartReport
from megatron_omega.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options:
    """What to do. All but the last four decide what is written; those decide only how."""

    output_prefix: str
    tokenizer_model: str
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    is_deduplicated: bool = False
    shuffle_seed: int | None = None
    shard: tuple[int, int] = (0, 1)
    max_record_bytes: int = 64 << 20
    max_bad_fraction: float = 0.01
    workers: int = 1
    unit_bytes: int | None = None
    is_native_allowed: bool = True
    is_overwriting: bool = False

    def identity(self, tokenizer: Tokenizer, inputs: Any) -> str:
        """Return a digest of everything the output depends on."""
        free = ("output_prefix", "max_bad_fraction", "workers", "unit_bytes", "is_native_allowed", "is_overwriting")
        decisive = {name: value for name, value in asdict(self).items() if name not in (*free, "tokenizer_model")}
        content = json.dumps([decisive, tokenizer.fingerprint, inputs], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def prefixes(self) -> list[str]:
        """Return the prefix of the shard of every key."""
        index, count = self.shard
        base = self.output_prefix if count == 1 else f"{self.output_prefix}-{index:05d}-of-{count:05d}"
        return [f"{base}_{key}_document" for key in self.keys]

    @property
    def folder(self) -> Path:
        index, count = self.shard
        return Path(
            f"{self.output_prefix}.parts" if count == 1 else f"{self.output_prefix}-{index:05d}-of-{count:05d}.parts"
        )

    @property
    def bad_path(self) -> Path:
        return self.folder.with_suffix(".bad.jsonl")


@dataclass(frozen=True)
class Stream:
    """Input without files: blocks of whole lines of JSON, each given once (stdin, a streamed data set)."""

    name: str
    blocks: Iterable[bytes]
    is_known_by_name: bool = False
    """Whether the name stands for the content; else only reading it tells what it was."""
    _hash: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128, init=False, compare=False)

    def __iter__(self) -> Iterator[bytes]:
        for block in self.blocks:
            self._hash.update(block)
            yield block

    def identity(self) -> list[str]:
        """Return what tells this input from others, when it was read to its end."""
        return [self.name] if self.is_known_by_name else [self.name, self._hash.hexdigest()]


@dataclass
class Tally:
    """Counts so far, for the progress bar and the limit on bad records."""

    input_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    records: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, report: PartReport, input_bytes: int) -> None:
        self.input_bytes += input_bytes
        self.documents += report.documents
        self.tokens += sum(report.tokens)
        self.records += report.records
        self.bad += report.bad
        self.reasons.update(reason for unit in report.units for _, reason in unit.bad)


Progress = Callable[[Tally], None]


@dataclass(frozen=True)
class Result:
    """What came out."""

    prefixes: tuple[str, ...]
    documents: int
    tokens: tuple[int, ...]
    bad: dict[str, int]
    duplicates: int
    encoder: str
    was_finished: bool = False
