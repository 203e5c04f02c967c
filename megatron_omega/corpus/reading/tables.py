"""Parquet and Arrow files -> records, a batch of rows at a time. Only the columns that are asked for are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_omega.corpus.reading.input_file import InputFile, Unit
from megatron_omega.corpus.reading.records import BadRecord, Document, check_texts
from megatron_omega.errors import DataError

_BATCH_ROWS = 256


def import_arrow() -> tuple[Any, Any]:
    """Return pyarrow and its parquet module; raise DataError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("parquet and Arrow files need the package pyarrow; install the extra hf, or pyarrow") from None
    return pyarrow, pyarrow.parquet


def row_groups(number: int, file: InputFile, unit_bytes: int) -> list[Unit]:
    """Cut a parquet file, the input of this number, into units of whole row groups."""
    metadata = _metadata(file)
    per_group = max(1, file.size // max(1, metadata.num_row_groups))
    step = max(1, unit_bytes // per_group)
    return [
        Unit(number, start, min(start + step, metadata.num_row_groups))
        for start in range(0, metadata.num_row_groups, step)
    ]


def column_bytes(file: InputFile, keys: Sequence[str]) -> int:
    """Return the uncompressed bytes of a parquet file's columns `keys`."""
    metadata = _metadata(file)
    columns = (
        metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
    )
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema in keys)


def _metadata(file: InputFile) -> Any:
    arrow, parquet = import_arrow()
    try:
        return parquet.read_metadata(file.path)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file.path} is not a readable parquet file ({error})") from None


def read_columns(file: InputFile, unit: Unit, keys: Sequence[str], limit: int) -> Iterator[Document | BadRecord]:
    """Yield the record of every row of the unit."""
    arrow, _ = import_arrow()
    position = 0
    for batch in _batches(file, unit, keys):
        missing = [key for key in keys if key not in batch.schema.names]
        if missing:
            raise DataError(
                f"{file.path} has no column {missing[0]!r}; it has {', '.join(batch.schema.names)}: set --json-keys"
            )
        columns = [batch.column(batch.schema.names.index(key)) for key in keys]
        for row in range(batch.num_rows):
            try:
                values = [column[row].as_py() for column in columns]
            except (UnicodeDecodeError, arrow.ArrowInvalid):
                yield BadRecord(position, "invalid UTF-8")
            else:
                yield _row_record(values, keys, limit, position)
            position += 1


def _row_record(values: Sequence[object], keys: Sequence[str], limit: int, position: int) -> Document | BadRecord:
    if any(isinstance(value, str) and len(value) > limit for value in values):
        return BadRecord(position, f"longer than {limit} bytes")
    return check_texts(values, keys, position)


def _batches(file: InputFile, unit: Unit, keys: Sequence[str]) -> Iterator[Any]:
    arrow, parquet = import_arrow()
    if file.format == "parquet":
        with parquet.ParquetFile(file.path, page_checksum_verification=True) as source:
            present = [key for key in keys if key in source.schema_arrow.names]
            if len(present) < len(keys):
                yield arrow.record_batch([[] for _ in source.schema_arrow.names], names=source.schema_arrow.names)
            for group in range(unit.start, unit.stop):
                yield from source.iter_batches(
                    batch_size=_BATCH_ROWS, row_groups=[group], columns=list(keys), use_threads=False
                )
        return
    with arrow.memory_map(file.path) as mapped:
        try:
            reader = arrow.ipc.open_stream(mapped)
        except arrow.ArrowInvalid:
            reader = arrow.ipc.open_file(mapped)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            return
        yield from reader
