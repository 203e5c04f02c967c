"""Input files -> units of work -> records. Every unit gives the same records whoever reads it.

A file is read in units (byte ranges, row groups, or as a whole), each by one worker. Nothing here knows of tokens or
shards; which files there are, finding.py says, and what they are, recognition.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_omega.corpus.reading.compressed_source import Note, ignore_note
from megatron_omega.corpus.reading.input_file import InputFile, Unit
from megatron_omega.corpus.reading.lines import read_jsonl, read_rows, read_text
from megatron_omega.corpus.reading.records import Record
from megatron_omega.corpus.reading.tables import read_columns, row_groups
from megatron_omega.errors import DataError


def plan_units(files: Sequence[InputFile], unit_bytes: int) -> list[tuple[Unit, ...]]:
    """Cut the inputs into tasks of about `unit_bytes`: ranges of large files, groups of small ones."""
    tasks: list[tuple[Unit, ...]] = []
    group: list[Unit] = []
    grouped = 0
    for number, file in enumerate(files):
        units = units_of(number, file, unit_bytes)
        if len(units) == 1 and file.size < unit_bytes:
            group.append(units[0])
            grouped += file.size
            if grouped < unit_bytes:
                continue
            units = []
        if group:
            tasks.append(tuple(group))
            group, grouped = [], 0
        tasks += [(unit,) for unit in units]
    return [*tasks, tuple(group)] if group else tasks


def units_of(number: int, file: InputFile, unit_bytes: int) -> list[Unit]:
    """Cut one file, the input of this number, into units."""
    if file.format == "jsonl" and not file.compression:
        starts = range(0, file.size, unit_bytes)
        return [Unit(number, start, min(start + unit_bytes, file.size)) for start in starts]
    if file.format == "parquet":
        return row_groups(number, file, unit_bytes)
    return [Unit(number)]


def read_unit(
    file: InputFile, unit: Unit, keys: Sequence[str], max_record_bytes: int, note: Note = ignore_note
) -> Iterator[Record]:
    """Yield the records of a unit in order; `note` hears what is to be said of the file as a whole.

    Raises DataError if the file itself cannot be read.
    """
    try:
        if file.format == "jsonl":
            yield from read_jsonl(file, unit, keys, max_record_bytes, note)
        elif file.format == "text":
            yield read_text(file, len(keys), max_record_bytes, note)
        elif file.format in ("csv", "tsv"):
            yield from read_rows(file, keys, max_record_bytes, note)
        else:
            yield from read_columns(file, unit, keys, max_record_bytes)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # pyarrow and the file system have exceptions of their own
        raise DataError(
            f"{file.path} cannot be read ({type(error).__name__}: {error}); mend or remove it, then run again"
        ) from error
