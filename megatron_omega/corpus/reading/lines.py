"""Files of text: lines of JSON, rows of CSV or TSV, or one document a file -> records."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import IO

from megatron_omega.corpus.reading.compressed_source import Note, ignore_note
from megatron_omega.corpus.reading.compression import open_binary
from megatron_omega.corpus.reading.input_file import WHOLE, InputFile, Unit
from megatron_omega.corpus.reading.records import BYTE_ORDER_MARK, BadRecord, Document, Record, check_texts, parse_line
from megatron_omega.errors import DataError

_BLOCK = 1 << 20


def read_jsonl(
    file: InputFile, unit: Unit, keys: Sequence[str], limit: int, note: Note = ignore_note
) -> Iterator[Record]:
    """Yield the record of every line that begins in the unit."""
    with open_binary(file.path, file.compression, note) as stream:
        place = 0
        if unit.start:  # a line belongs to the range in which it starts
            stream.seek(unit.start - 1)
            place = unit.start - 1 + _skip_line(stream)
        position = 0
        while unit.stop == WHOLE or place < unit.stop:
            line = stream.readline(limit + 1)
            if not line:
                return
            place += len(line)
            if len(line) > limit and not line.endswith(b"\n"):
                place += _skip_line(stream)
                yield BadRecord(position, f"longer than {limit} bytes")
            else:
                yield parse_line(line, keys, position)
            position += 1


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of the line without holding it; return the number of bytes."""
    total = 0
    while True:
        part = stream.readline(_BLOCK)
        total += len(part)
        if not part or part.endswith(b"\n"):
            return total


def read_text(file: InputFile, num_keys: int, limit: int, note: Note = ignore_note) -> Document | BadRecord:
    """Return the whole file as one document."""
    with open_binary(file.path, file.compression, note) as stream:
        data = stream.read(limit + 1)
        if len(data) > limit:
            return BadRecord(0, f"longer than {limit} bytes")
        stream.read(1)  # reading to the end finds damage at the end
    try:
        text = data.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError:
        return BadRecord(0, "invalid UTF-8")
    return check_texts([text] * num_keys, ["text"] * num_keys, 0)


def read_rows(file: InputFile, keys: Sequence[str], limit: int, note: Note = ignore_note) -> Iterator[Record]:
    """Yield the record of every row below the header of a CSV or TSV file (RFC 4180).

    Raises DataError if quotes do not close: what a row is would be a guess from there on.
    """
    csv.field_size_limit(limit)  # the library knows one limit for the whole process
    with open_binary(file.path, file.compression, note) as stream:
        rows = csv.reader(_row_lines(file, stream, limit), delimiter="," if file.format == "csv" else "\t", strict=True)
        try:
            header = next(rows, [])
            columns = _columns(file, header, keys)
            for position, row in enumerate(row for row in rows if row):
                yield _row_record(row, header, columns, keys, position)
        except csv.Error as error:
            raise DataError(
                f"{file.path} is no {file.format} file from line {rows.line_num} on ({error}); mend its quotes, "
                "or give --input-format"
            ) from None


def _row_lines(file: InputFile, stream: IO[bytes], limit: int) -> Iterator[str]:
    prefix = BYTE_ORDER_MARK
    while line := stream.readline(limit + 1):
        if len(line) > limit and not line.endswith(b"\n"):
            raise DataError(f"{file.path} holds a line longer than {limit} bytes; raise --max-record-megabytes")
        yield line.removeprefix(prefix).decode(errors="surrogateescape")
        prefix = b""


def _columns(file: InputFile, header: Sequence[str], keys: Sequence[str]) -> list[int]:
    twice = [key for key in keys if header.count(key) > 1]
    if twice:
        raise DataError(f"{file.path} has {header.count(twice[0])} columns {twice[0]!r}; give each a name of its own")
    missing = [key for key in keys if key not in header]
    if missing:
        names = ", ".join(header)[:200].encode(errors="replace").decode()
        raise DataError(f"{file.path} has no column {missing[0]!r}; its first line names {names}: set --json-keys")
    return [header.index(key) for key in keys]


def _row_record(
    row: Sequence[str], header: Sequence[str], columns: Sequence[int], keys: Sequence[str], position: int
) -> Document | BadRecord:
    if len(row) != len(header):
        return BadRecord(position, f"{'more' if len(row) > len(header) else 'fewer'} fields than the header")
    return check_texts([row[column] for column in columns], keys, position)
