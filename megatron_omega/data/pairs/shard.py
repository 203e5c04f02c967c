"""The pairs of a task, encoded once: records and templates to a shard that every process maps into memory.

Documents 2k and 2k + 1 of the shard are prompt and target of pair k. It lies in this user's cache under a name that
changes with the records, the templates and the tokenizer; whoever needs it first makes it, others wait or find it.
Everything that is wrong with any record is found here, before anything starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_omega.config.schema import Task
from megatron_omega.data.indexed import IndexedShard, token_dtype, write_shard
from megatron_omega.data.pairs.records import BadRecord, Part, Record, open_records, versions
from megatron_omega.data.pairs.templates import FieldError, Template
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError
from megatron_omega.host.private import cache_folder, private_folder
from megatron_omega.host.regular_files import read_regular

VERSION = 2
_ABOUT, _SHARD = "about.json", "pairs"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class PairShard:
    """Encoded pairs, and where each came from."""

    name: str
    """Of the task."""
    shard: IndexedShard
    places: tuple[tuple[str, int], ...]
    """(file or data set, number of its first pair)."""
    fingerprint: str = ""
    """Of all pairs, in their order."""

    def __len__(self) -> int:
        return len(self.shard) // 2

    @property
    def prefix(self) -> str:
        return self.name

    def pair(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the ids of prompt and target."""
        return (
            self.shard.document(2 * number).astype(np.int64),
            self.shard.document(2 * number + 1).astype(np.int64),
        )

    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens of every prompt and of every target."""
        lengths = self.shard.lengths().astype(np.int64)
        return lengths[0::2], lengths[1::2]

    def place(self, number: int) -> str:
        """Return where pair `number` came from: `qa.jsonl:17` is its 17th record."""
        name, first = next((name, first) for name, first in reversed(self.places) if first <= number)
        return f"{name}:{number - first + 1}"


def task_name(task: Task) -> str:
    """Return how a task is called."""
    return task.name or Path(task.path).name.partition(".")[0] or task.path


def open_pairs(task: Task, tokenizer: Tokenizer, *, path: str, split: str, setting: str) -> PairShard:
    """Return the pairs of the records at `path`, encoded.

    Args:
        setting: the task in the configuration, for findings.

    Raises:
        DataError: every kind of fault among the records, with the first record that has it and their number.
    """
    prompt, target = (_template(text, f"{setting}.{name}") for name, text in _texts(task).items())
    parts = open_records(path, split)
    key = json.dumps([VERSION, versions(parts), task.prompt, task.target, tokenizer.fingerprint])
    folder = cache_folder() / "pairs" / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    try:
        private_folder(folder.parent)
        with _alone(folder):
            if not (folder / _ABOUT).exists():
                _make(folder, _Encoding(prompt, target, tokenizer, setting), parts)
        about = json.loads(read_regular(folder / _ABOUT))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the encoded pairs of {path} cannot be kept in {folder.parent} ({error}); free space there, or name "
            "another place with XDG_CACHE_HOME"
        ) from None
    places = tuple((str(name), int(first)) for name, first in about["places"])
    return PairShard(task_name(task), IndexedShard(str(folder / _SHARD)), places, str(about["fingerprint"]))


def _texts(task: Task) -> dict[str, str]:
    return {"prompt": task.prompt, "target": task.target}


def _template(text: str, setting: str) -> Template:
    try:
        return Template.parse(text)
    except ValueError as error:
        raise DataError(f"{setting}={text!r} is no template: {error}; write braces that are text twice") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time make a folder; where the file system has no locks each makes its own."""
    with folder.with_suffix(".lock").open("w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass
class _Encoding:
    """Records to ids, and what was wrong on the way."""

    prompt: Template
    target: Template
    tokenizer: Tokenizer
    setting: str
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Fault -> places of the records that have it."""
    fields: set[str] = field(default_factory=set)
    """Fields of the first records, for the advice."""
    counts: list[int] = field(default_factory=list)
    """Pairs of each part."""

    def documents(self, parts: Sequence[Part]) -> Iterator[list[int]]:
        """Yield prompt and target of every record that has no fault."""
        for part in parts:
            number = 0
            for number, record in enumerate(part.records, start=1):
                yield from self._pair(record, f"{part.place}:{number}")
            self.counts.append(number)

    def _pair(self, record: Record | BadRecord, place: str) -> Iterator[list[int]]:
        if isinstance(record, BadRecord):
            self._fault(record.reason, place)
            return
        if len(self.fields) < 20:
            self.fields |= set(record)
        texts = []
        for template in (self.prompt, self.target):
            try:
                texts.append(template.render(record))
            except FieldError as error:
                self._fault(str(error), place)
        if len(texts) < 2:
            return
        if not texts[1].strip():
            self._fault(f"has an empty target ({self.target.text})", place)
            return
        yield from map(self.tokenizer.encode, texts)

    def _fault(self, fault: str, place: str) -> None:
        self.faults.setdefault(fault, []).append(place)

    def findings(self) -> list[str]:
        """Return a sentence for each kind of fault."""
        total = sum(self.counts)
        if not total:
            return [f"{self.setting}.path has no records; name a file that has some"]
        known = ", ".join(sorted(self.fields)) or "none"
        return [
            f"{places[0]} {fault}, as have {len(places) - 1:,} of the other {total - 1:,} records; mend them or the "
            f"templates of {self.setting} (fields there: {known})"
            for fault, places in self.faults.items()
        ]


def _make(folder: Path, encoding: _Encoding, parts: Sequence[Part]) -> None:
    """Encode into a folder of our own and rename it: it appears whole, whoever makes it."""
    staging = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        dtype = token_dtype(encoding.tokenizer.vocab_size)
        write_shard(staging / _SHARD, encoding.documents(parts), dtype)
        if findings := encoding.findings():
            raise DataError(*findings)
        firsts = [0, *accumulate(encoding.counts)]
        places = [[part.place, first] for part, first in zip(parts, firsts, strict=False)]
        about = {"places": places, "fingerprint": _fingerprint(staging / _SHARD)}
        (staging / _ABOUT).write_text(json.dumps(about))
        with suppress(FileExistsError):
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fingerprint(prefix: Path) -> str:
    """Return the digest of a shard: ids and lengths of all pairs."""
    digest = hashlib.blake2b(digest_size=16)
    for suffix in (".bin", ".idx"):
        with prefix.with_suffix(suffix).open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
