"""Where text comes from: files of jsonl, parquet, Arrow or plain text -> `Document`s, or reasons why a record is none.

A file is read in units (byte ranges, row groups, or as a whole), each by one worker, and every unit gives the same
documents whoever reads it. Nothing here knows of tokens or shards.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import orjson

from megatron_omega.corpus.compression import SUFFIXES, Compression, open_binary
from megatron_omega.errors import DataError

Format = Literal["jsonl", "parquet", "arrow", "text"]
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
WHOLE = -1
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Document:
    """The texts of one record, in the order of the keys."""

    position: int
    """Number of the record in its unit, from 0."""
    texts: tuple[str, ...]


@dataclass(frozen=True)
class BadRecord:
    """A record without usable text."""

    position: int
    reason: str


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


def expand_inputs(patterns: Sequence[str], forced: Format | None = None) -> list[InputFile]:
    """Return the files that `patterns` (files, globs, folders) name, sorted within each pattern, each file once.

    Raises DataError with every pattern that names nothing.
    """
    found: dict[str, InputFile] = {}
    findings: list[str] = []
    for pattern in patterns:
        paths = _paths(pattern)
        if not paths:
            findings.append(f"input {pattern} names no file; give files, quoted globs or folders")
        for path in paths:
            found.setdefault(str(path), describe(path, forced))
    if findings:
        raise DataError(*findings)
    return list(found.values())


def _paths(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir() and (path / "state.json").exists():
        return saved_files(path)
    if path.is_dir() and (path / "dataset_dict.json").exists():
        raise DataError(
            f"input {path} is a data set of several splits; name one of its folders, or give it to --dataset"
        )
    if path.is_dir():
        inside = sorted(path.rglob("*"))
        hidden = [part for part in inside if any(name.startswith((".", "_")) for name in part.relative_to(path).parts)]
        return [part for part in inside if part.is_file() and part not in set(hidden)]
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (a pattern may be absolute)
    return [Path(name) for name in names if Path(name).is_file()]


def saved_files(folder: Path) -> list[Path]:
    """Return the files, in order, of a Hugging Face data set that `save_to_disk` wrote."""
    try:
        return [
            folder / entry["filename"] for entry in orjson.loads((folder / "state.json").read_bytes())["_data_files"]
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder / 'state.json'} is not that of a saved data set ({error!r}); save it again") from None


def describe(path: Path, forced: Format | None = None) -> InputFile:
    """Tell format and compression of a file from its name; a name without a known suffix is plain text."""
    compression = SUFFIXES.get(path.suffix.lower(), "")
    inner = path.with_suffix("") if compression else path
    format_ = forced or _FORMATS.get(inner.suffix.lower(), "text")
    if compression and format_ in ("parquet", "arrow"):
        raise DataError(f"{path} is a compressed {format_} file, which cannot be read in parts; decompress it first")
    status = path.stat()
    return InputFile(str(path), format_, compression, status.st_size, status.st_mtime_ns)


def plan_units(files: Sequence[InputFile], unit_bytes: int) -> list[tuple[Unit, ...]]:
    """Cut the inputs into tasks of about `unit_bytes`: ranges of large files, groups of small ones."""
    tasks: list[tuple[Unit, ...]] = []
    group: list[Unit] = []
    grouped = 0
    for number, file in enumerate(files):
        units = _units(number, file, unit_bytes)
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


def _units(number: int, file: InputFile, unit_bytes: int) -> list[Unit]:
    if file.format == "jsonl" and not file.compression:
        starts = range(0, file.size, unit_bytes)
        return [Unit(number, start, min(start + unit_bytes, file.size)) for start in starts]
    if file.format == "parquet":
        return _row_groups(number, file, unit_bytes)
    return [Unit(number)]


def _row_groups(number: int, file: InputFile, unit_bytes: int) -> list[Unit]:
    arrow, parquet = import_arrow()
    try:
        metadata = parquet.read_metadata(file.path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.path} is not a readable parquet file ({error})") from None
    per_group = max(1, file.size // max(1, metadata.num_row_groups))
    step = max(1, unit_bytes // per_group)
    return [
        Unit(number, start, min(start + step, metadata.num_row_groups))
        for start in range(0, metadata.num_row_groups, step)
    ]


def import_arrow() -> tuple[Any, Any]:
    """Return pyarrow and its parquet module; raise DataError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("parquet and Arrow files need the package pyarrow; install the extra hf, or pyarrow") from None
    return pyarrow, pyarrow.parquet


def read_unit(
    file: InputFile, unit: Unit, keys: Sequence[str], max_record_bytes: int
) -> Iterator[Document | BadRecord]:
    """Yield the records of a unit in order. Raises DataError where the file itself cannot be read."""
    try:
        if file.format == "jsonl":
            yield from _read_jsonl(file, unit, keys, max_record_bytes)
        elif file.format == "text":
            yield _read_text(file, len(keys), max_record_bytes)
        else:
            yield from _read_columns(file, unit, keys, max_record_bytes)
    except DataError:
        raise
    except Exception as error:  # each decompressor and pyarrow has exceptions of its own
        if isinstance(error, MemoryError | KeyboardInterrupt):
            raise
        raise DataError(
            f"{file.path} cannot be read ({type(error).__name__}: {error}); mend or remove it, then run again"
        ) from error


def _read_jsonl(file: InputFile, unit: Unit, keys: Sequence[str], limit: int) -> Iterator[Document | BadRecord]:
    with open_binary(file.path, file.compression) as stream:
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
                start = line[3:] if place == len(line) and not unit.start and line.startswith(b"\xef\xbb\xbf") else line
                yield parse_line(start, keys, position)
            position += 1


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of the line without holding it; return the number of bytes."""
    total = 0
    while True:
        part = stream.readline(_BLOCK)
        total += len(part)
        if not part or part.endswith(b"\n"):
            return total


def parse_line(line: bytes, keys: Sequence[str], position: int) -> Document | BadRecord:
    """Return the document of one line of JSON, or why it has none."""
    if not line.strip():
        return BadRecord(position, "empty")
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return BadRecord(position, "not JSON" if _is_utf8(line) else "invalid UTF-8")
    if not isinstance(record, dict):
        return BadRecord(position, "not a JSON object")
    return check_texts([record.get(key, _MISSING) for key in keys], keys, position)


_MISSING = object()


def check_texts(values: Sequence[object], keys: Sequence[str], position: int) -> Document | BadRecord:
    """Return the document of one record's values, or why it has none."""
    for value, key in zip(values, keys, strict=True):
        if value is _MISSING:
            return BadRecord(position, f"key {key!r} missing")
        if not isinstance(value, str):
            return BadRecord(position, f"key {key!r} is not a string")
        if not value or value.isspace():
            return BadRecord(position, "empty")
        if "\0" in value:
            return BadRecord(position, "NUL")
        if not value.isascii() and not _is_encodable(value):
            return BadRecord(position, "invalid UTF-8")
    return Document(position, tuple(cast(Sequence[str], values)))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(file: InputFile, num_keys: int, limit: int) -> Document | BadRecord:
    with open_binary(file.path, file.compression) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        return BadRecord(0, f"longer than {limit} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return BadRecord(0, "invalid UTF-8")
    return check_texts([text] * num_keys, ["text"] * num_keys, 0)


def _read_columns(file: InputFile, unit: Unit, keys: Sequence[str], limit: int) -> Iterator[Document | BadRecord]:
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
                too_long = any(isinstance(value, str) and len(value) > limit for value in values)
                yield (
                    BadRecord(position, f"longer than {limit} bytes")
                    if too_long
                    else check_texts(values, keys, position)
                )
            position += 1


def _batches(file: InputFile, unit: Unit, keys: Sequence[str]) -> Iterator[Any]:
    arrow, parquet = import_arrow()
    if file.format == "parquet":
        with parquet.ParquetFile(file.path) as source:
            present = [key for key in keys if key in source.schema_arrow.names]
            if len(present) < len(keys):
                yield arrow.record_batch([[] for _ in source.schema_arrow.names], names=source.schema_arrow.names)
            for group in range(unit.start, unit.stop):
                yield from source.iter_batches(
                    batch_size=256, row_groups=[group], columns=list(keys), use_threads=False
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
