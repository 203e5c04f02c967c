"""Inputs -> tasks: which worker reads what. Depends on the inputs and the unit size, never on the number of workers."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from megatron_omega.data.corpus import Document, InputFile, Unit, plan_units, read_unit
from megatron_omega.data.preprocessing.options import Options, Stream
from megatron_omega.data.preprocessing.parts import Task

_SMALLEST_UNIT = 16 << 20
_MOST_PARTS = 4096
_SAMPLE_BYTES = 1 << 18


def plan_tasks(inputs: list[InputFile], unit_bytes: int, shard: tuple[int, int]) -> list[Task]:
    tasks = [
        Task(number, tuple((inputs[unit.file], unit) for unit in units))
        for number, units in enumerate(plan_units(inputs, unit_bytes))
    ]
    index, count = shard
    return tasks[len(tasks) * index // count : len(tasks) * (index + 1) // count]


def automatic_unit(inputs: list[InputFile]) -> int:
    return max(_SMALLEST_UNIT, sum(file.size for file in inputs) // _MOST_PARTS)


def spooled_tasks(stream: Stream, folder: Path) -> Iterator[Task]:
    for number, block in enumerate(stream.blocks):
        path = folder / f"spool-{number:08d}"
        path.write_bytes(block)
        file = InputFile(str(path), "jsonl", "", len(block), 0)
        yield Task(number, ((file, Unit(0)),), digest=hashlib.blake2b(block, digest_size=16).hexdigest())


def sample_texts(tasks: list[Task], options: Options) -> list[str]:
    """Return some text of the first task, on which the fast encoder must agree with SentencePiece."""
    found: list[str] = []
    size = 0
    records = (
        read_unit(file, unit, options.keys, options.max_record_bytes)
        for file, unit in (tasks[0].units if tasks else ())
    )
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
