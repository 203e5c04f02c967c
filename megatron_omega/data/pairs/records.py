"""Records of a task: files of this machine first, else a data set of the hub. Knows no template and no tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from megatron_omega.errors import DataError
from megatron_omega.host.regular_files import open_regular

Record = Mapping[str, Any]
LINES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
TABLES = (".parquet", ".arrow")
_SAVED = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be read."""

    reason: str


@dataclass(frozen=True)
class Part:
    """Some records of one place, in order."""

    place: str
    """File or data set."""
    version: str
    """Changes when the content does."""
    records: Iterable[Record | BadRecord]


def open_records(path: str, split: str) -> list[Part]:
    """Return the records at `path`: a file, a folder of files or of `save_to_disk`, or a name of the hub.

    Raises:
        DataError: nothing is there, or what is there holds no records.
    """
    local = Path(path)
    if local.is_file():
        return [_file(local)]
    if local.is_dir():
        if any((local / name).exists() for name in _SAVED):
            return [_saved_dataset(path, split)]
        files = sorted(file for file in local.iterdir() if file.name.endswith((*LINES, *TABLES)))
        if not files:
            raise DataError(f"{path} holds no records; name a .jsonl or .parquet file, or a folder that has some")
        return [_file(file) for file in files]
    if path.startswith(("/", ".")) or path.endswith((*LINES, *TABLES)):
        raise DataError(f"{path} does not exist; correct the path")
    return [_hub_dataset(path, split)]


def _file(path: Path) -> Part:
    if not path.name.endswith((*LINES, *TABLES)):
        raise DataError(f"{path} is of no known kind; name a file that ends in {', '.join((*LINES[:3], *TABLES))}")
    status = path.stat()
    version = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return Part(str(path), version, _Lines(path) if path.name.endswith(LINES) else _Table(path))


@dataclass(frozen=True)
class _Lines:
    path: Path

    def __iter__(self) -> Iterator[Record | BadRecord]:
        try:
            with self._open() as file:
                yield from (_parsed(line) for line in file if line.strip())
        except (OSError, EOFError) as error:
            raise DataError(f"{self.path} cannot be read ({error}); mend it or leave it out") from None

    def _open(self) -> IO[bytes]:
        file = open(open_regular(self.path), "rb")  # noqa: PTH123, SIM115 (a descriptor; the caller closes it)
        return gzip.open(file) if self.path.name.endswith(".gz") else file  # pyright: ignore[reportReturnType]


def _parsed(line: bytes) -> Record | BadRecord:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return BadRecord(f"is not JSON ({error.msg})")
    return value if isinstance(value, dict) else BadRecord(f"is a JSON {type(value).__name__}, not an object")


@dataclass(frozen=True)
class _Table:
    path: Path

    def __iter__(self) -> Iterator[Record | BadRecord]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(f"{self.path} needs the package pyarrow; install the extra hf, or pyarrow") from None
        try:
            for batch in self._batches(pyarrow):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{self.path} cannot be read ({error}); mend it or leave it out") from None

    def _batches(self, arrow: Any) -> Iterator[Any]:
        if self.path.name.endswith(".parquet"):
            with arrow.parquet.ParquetFile(self.path) as file:
                yield from file.iter_batches()
            return
        with arrow.memory_map(str(self.path)) as mapped:
            try:
                yield from arrow.ipc.open_stream(mapped)
            except arrow.ArrowInvalid:
                reader = arrow.ipc.open_file(mapped)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _saved_dataset(path: str, split: str) -> Part:
    datasets = _library(path)
    try:
        found = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data set {path} cannot be read ({error}); save it again") from None
    if not isinstance(found, Mapping):
        return Part(path, str(found._fingerprint), found)
    if split not in found:
        raise DataError(f"data set {path} has no split {split!r}; it has {', '.join(found)}")
    return Part(f"{path}/{split}", str(found[split]._fingerprint), found[split])


def _hub_dataset(name: str, split: str) -> Part:
    datasets = _library(name)
    dataset, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(dataset, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{name} is no file or folder here, and no data set that can be loaded ({reason}); correct the name"
        ) from None
    return Part(f"{name}/{split}", str(found._fingerprint), found)


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name} is no file, and data sets need the package datasets; install the extra hf") from None
    return datasets


def versions(parts: Sequence[Part]) -> str:
    """Return a text that changes when any of the records does."""
    return json.dumps([[part.place, part.version] for part in parts])
