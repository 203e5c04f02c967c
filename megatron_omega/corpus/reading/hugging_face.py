"""Hugging Face data sets as input: a folder of `save_to_disk`, a local folder of files, or a name on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import orjson

from megatron_omega.corpus.reading.finding import expand_inputs, saved_splits
from megatron_omega.corpus.reading.input_file import InputFile
from megatron_omega.errors import DataError


def local_files(name: str, split: str) -> list[InputFile] | None:
    """Return the files of a data set on this machine; None where `name` is no local path."""
    folder = Path(name)
    if not folder.exists():
        return None
    if (folder / "dataset_dict.json").exists():
        splits = saved_splits(folder)
        if split not in splits:
            raise DataError(f"data set {name} has no split {split!r}; it has {', '.join(splits)}: set --dataset-split")
        folder = folder / split
    return expand_inputs([str(folder)])


def hub_blocks(name: str, split: str, keys: Sequence[str], block_bytes: int) -> Iterator[bytes]:
    """Stream a data set of the hub as blocks of JSON lines that hold `keys`."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"--dataset {name} is no local path and needs the package `datasets`; install the extra hf"
        ) from None
    dataset, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(dataset, configuration or None, split=split, streaming=True)
        lines: list[bytes] = []
        size = 0
        for row in rows:
            line = orjson.dumps({key: row[key] for key in keys if key in row}, default=str) + b"\n"
            lines.append(line)
            size += len(line)
            if size >= block_bytes:
                yield b"".join(lines)
                lines, size = [], 0
        if lines:
            yield b"".join(lines)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"data set {name} cannot be read ({error}); check the name, the split and the connection"
        ) from None


def line_blocks(stream: IO[bytes], block_bytes: int) -> Iterator[bytes]:
    """Cut a binary stream of lines into blocks of whole lines."""

    rest = b""
    while block := stream.read(block_bytes):
        block = rest + block
        cut = block.rfind(b"\n") + 1
        if cut:
            yield block[:cut]
        rest = block[cut:]
    if rest:
        yield rest
