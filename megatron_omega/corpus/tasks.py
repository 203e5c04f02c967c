"""Inputs -> tasks: which worker reads what. Depends on the inputs and the unit size, never on the number of workers."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

from megatron_omega.corpus.inputs import plan_units, read_unit
from megatron_omega.corpus.options import Options, Stream
from megatron_omega.corpus.parts import Task
from megatron_omega.corpus.reading.input_file import InputFile, Unit
from megatron_omega.corpus.reading.records import Document

_SMALLEST_UNIT = 16 << 20
_SMALLEST_SHARE = 1 << 20
_MOST_PARTS = 4096
_SAMPLE_BYTES = 1 << 18


def plan_tasks(inputs: list[InputFile], unit_bytes: int, shard: tuple[int, int]) -> list[Task]:
    tasks = [
        _file_task(number, [(inputs[unit.file], unit) for unit in units])
        for number, units in enumerate(plan_units(inputs, unit_bytes))
    ]
    index, count = shard
    return tasks[len(tasks) * index // count : len(tasks) * (index + 1) // count]


def _file_task(number: int, units: Sequence[tuple[InputFile, Unit]]) -> Task:
    read = json.dumps([[*astuple(file), unit.start, unit.stop] for file, unit in units])
    return Task(number, tuple(units), _digest(read.encode()))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def automatic_unit(inputs: list[InputFile], shards: int) -> int:
    """Return how much input one part should hold: enough to be worth a file, little enough to give all shards some."""
    total = sum(file.size for file in inputs)
    return max(_SMALLEST_SHARE, min(max(_SMALLEST_UNIT, total // _MOST_PARTS), total // (4 * shards)))


def spooled_tasks(stream: Stream, folder: Path) -> Iterator[Task]:
    for number, block in enumerate(stream):
        path = spool_path(folder, number)
        path.write_bytes(block)
        file = InputFile(str(path), "jsonl", "", len(block), 0)
        yield Task(number, ((file, Unit(0)),), _digest(block))


def spool_path(folder: Path, number: int) -> Path:
    """Return where a block of a stream lies until its part is made."""
    return folder / f"spool-{number:08d}"


def sample_texts(task: Task, options: Options) -> list[str]:
    """Return some text of a task, on which the fast encoder must agree with SentencePiece."""
    found: list[str] = []
    size = 0
    records = (read_unit(file, unit, options.keys, options.max_record_bytes) for file, unit in task.units)
    for record in itertools.chain.from_iterable(records):
        if isinstance(record, Document):
            found.append(record.texts[0][:_SAMPLE_BYTES])
            size += len(found[-1])
        if size >= _SAMPLE_BYTES:
            break
    return found


def task_bytes(task: Task) -> int:
    """Return the bytes of input a task covers, for the progress bar."""
    sizes = (
        unit.stop - unit.start if file.format == "jsonl" and unit.stop > 0 else file.size for file, unit in task.units
    )
    return sum(sizes)
