"""One part of a shard: what one worker makes of one task. Written beside the shard, by temporary name and rename.

A part is `{name}.{key}.bin` and `.len` (int32 token counts) for every key, `{name}.hash` where duplicates are looked
for, and last `{name}.json`, the report whose presence says that the part is complete. The name is a digest of the input
that it was made of, so a part is found again whatever became of the other inputs.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import xxhash

from megatron_omega.corpus.encoding import TextEncoder
from megatron_omega.corpus.inputs import read_unit
from megatron_omega.corpus.reading.input_file import InputFile, Unit
from megatron_omega.corpus.reading.records import BadRecord, BlankLine
from megatron_omega.data.indexed import token_dtype
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.log import get_logger

HASH_BYTES = 16


def _note(text: str) -> None:
    get_logger(__name__).warning(text)


@dataclass(frozen=True)
class Task:
    """Consecutive units of the input, made into one part."""

    number: int
    """Place of the part in the shard."""
    units: tuple[tuple[InputFile, Unit], ...]
    name: str
    """Digest of what is read."""


@dataclass(frozen=True)
class UnitReport:
    """What was found in one unit."""

    file: int
    start: int
    lines: int
    """Records and blank lines."""
    bad: list[tuple[int, str]]
    """(position in the unit, reason) of every record without a document."""
    blank: list[int]
    """Positions of the lines that hold no record."""

    @property
    def records(self) -> int:
        return self.lines - len(self.blank)

    @property
    def documents(self) -> int:
        return self.records - len(self.bad)

    @property
    def without_document(self) -> list[int]:
        return sorted([*self.blank, *(position for position, _ in self.bad)])


@dataclass(frozen=True)
class PartReport:
    """What a part holds. Its JSON is written last."""

    number: int
    name: str
    documents: int
    tokens: list[int]
    """Tokens for each key."""
    text_bytes: int
    units: list[UnitReport]

    @property
    def records(self) -> int:
        return sum(unit.records for unit in self.units)

    @property
    def bad(self) -> int:
        return sum(len(unit.bad) for unit in self.units)


@dataclass(frozen=True)
class PartMaker:
    """Everything a worker needs, besides its task."""

    folder: Path
    keys: tuple[str, ...]
    tokenizer: Tokenizer
    encoder: TextEncoder
    append_eod: bool
    has_hashes: bool
    max_record_bytes: int

    def make(self, task: Task) -> PartReport:
        """Write the part of `task` and return its report. Raises DataError and OSError."""
        try:
            return self._make(task)
        except BaseException:
            remove_files(self.folder.glob(f"{task.name}.*.{os.getpid()}.partial"))  # a full disk has no room for them
            raise

    def _make(self, task: Task) -> PartReport:
        with ExitStack() as stack:
            names = [self._partial(task.name, f"{key}.bin") for key in range(len(self.keys))]
            files = [stack.enter_context(name.open("wb", buffering=1 << 20)) for name in names]
            lengths = [array("i") for _ in self.keys]
            hashes = bytearray()
            text_bytes, units = self._write_units(task, files, lengths, hashes)
            for file in files:
                _sync(file)
        for key, counts in enumerate(lengths):
            self._publish(task.name, f"{key}.len", counts.tobytes())
            self._partial(task.name, f"{key}.bin").replace(part_path(self.folder, task.name, f"{key}.bin"))
        if self.has_hashes:
            self._publish(task.name, "hash", bytes(hashes))
        totals = [sum(counts) for counts in lengths]
        report = PartReport(task.number, task.name, len(lengths[0]), totals, text_bytes, units)
        self._publish(task.name, "json", json.dumps(asdict(report)).encode())
        return report

    def _write_units(
        self, task: Task, files: Sequence[IO[bytes]], lengths: Sequence[array[int]], hashes: bytearray
    ) -> tuple[int, list[UnitReport]]:
        encode, end = self.encoder.encode, self._end()
        itemsize = token_dtype(self.tokenizer.vocab_size).itemsize
        text_bytes = 0
        units: list[UnitReport] = []
        for input_file, unit in task.units:
            lines, bad, blank = 0, [], []
            for record in read_unit(input_file, unit, self.keys, self.max_record_bytes, _note):
                lines += 1
                if isinstance(record, BlankLine):
                    blank.append(record.position)
                    continue
                if isinstance(record, BadRecord):
                    bad.append((record.position, record.reason))
                    continue
                for text, file, counts in zip(record.texts, files, lengths, strict=True):
                    ids = encode(text) + end
                    file.write(ids)
                    counts.append(len(ids) // itemsize)
                    text_bytes += len(text)
                if self.has_hashes:
                    hashes += xxhash.xxh3_128_digest("\0".join(record.texts).encode())
            units.append(UnitReport(unit.file, unit.start, lines, bad, blank))
        return text_bytes, units

    def _end(self) -> bytes:
        if not self.append_eod:
            return b""
        return self.tokenizer.eos_id.to_bytes(token_dtype(self.tokenizer.vocab_size).itemsize, "little")

    def _partial(self, name: str, suffix: str) -> Path:
        return part_path(self.folder, name, f"{suffix}.{os.getpid()}.partial")

    def _publish(self, name: str, suffix: str, content: bytes) -> None:
        partial = self._partial(name, suffix)
        with partial.open("wb") as file:
            file.write(content)
            _sync(file)
        partial.replace(part_path(self.folder, name, suffix))


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def part_path(folder: Path, name: str, suffix: str) -> Path:
    """Return where a file of part `name` stands."""
    return folder / f"{name}.{suffix}"


def read_report(folder: Path, task: Task) -> PartReport | None:
    """Return the report of a part that is complete; None where the part must be made."""
    try:
        content = json.loads(part_path(folder, task.name, "json").read_bytes())
        units = [
            UnitReport(
                file,
                unit["start"],
                unit["lines"],
                [(position, reason) for position, reason in unit["bad"]],
                unit["blank"],
            )
            for unit, file in zip(content["units"], (unit.file for _, unit in task.units), strict=True)
        ]
        return PartReport(**{**content, "number": task.number, "units": units})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def remove_files(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
