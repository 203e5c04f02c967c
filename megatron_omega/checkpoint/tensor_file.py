"""Safetensors files, written and read in blocks with a checksum each. Knows nothing of parameters or checkpoints.

A file is 8 bytes (little-endian length of the header), a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes back to back. The library's writer copies every tensor and does not flush; its reader maps the file, so
that pages count as this process's memory. Both matter for tensors of many gigabytes, hence these few lines.
"""

from __future__ import annotations

import json
import os
import stat
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
import xxhash
from torch import Tensor

BLOCK_BYTES = 4 * 2**20
_PAGE_BYTES = 4096
_PIECE_BYTES = 2**20
MAXIMUM_HEADER_BYTES = 100 * 2**20
_DTYPES = {torch.float32: "F32"}


class DamagedFile(Exception):
    """A file does not hold what its writer put there. The message says where, without the file's name."""


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Return the 64-bit XXH3 of `data` as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name, the shape it is given in the file, its elements (1-D, fp32)."""

    key: str
    shape: tuple[int, ...]
    data: Tensor
    checksums: tuple[str, ...] | None = None
    """Of its blocks, where they are known already."""


@dataclass(frozen=True)
class Written:
    """What `write_tensors` wrote."""

    size_bytes: int
    header_checksum: str
    block_checksums: dict[str, tuple[str, ...]]


def write_tensors(path: Path, entries: Sequence[Entry], *, block_bytes: int = BLOCK_BYTES) -> Written:
    """Create the safetensors file `path` and flush it to the disk. Raises OSError, FileExistsError among them."""
    header = _encode_header(entries)
    blocks: dict[str, tuple[str, ...]] = {}
    with path.open("xb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(header))
        for entry in entries:
            blocks[entry.key] = _write_tensor(file.fileno(), entry, block_bytes)
        os.fsync(file.fileno())
        size = file.tell()
    return Written(size, checksum(header), blocks)


def _encode_header(entries: Sequence[Entry]) -> bytes:
    table, position = {}, 0
    for entry in entries:
        end = position + entry.data.numel() * entry.data.element_size()
        table[entry.key] = {
            "dtype": _DTYPES[entry.data.dtype], "shape": list(entry.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PAGE_BYTES)  # pages of the file copy to and from memory fastest when aligned
    return len(text).to_bytes(8, "little") + text


def _write_tensor(descriptor: int, entry: Entry, block_bytes: int) -> tuple[str, ...]:
    """Write a tensor and return the checksums of its blocks."""
    blocks = _blocks(entry.data, block_bytes)
    if entry.checksums is None:
        return tuple(_write_block(descriptor, block) for block in blocks)
    assert len(entry.checksums) == -(-entry.data.numel() * entry.data.element_size() // block_bytes), entry.key
    for block in blocks:
        _write_all(descriptor, block)
    return entry.checksums


def copy_with_checksums(source: Tensor, destination: Tensor) -> tuple[str, ...]:
    """Copy between 1-D tensors in memory; return the checksums of the blocks.

    In pieces that are still in the cache when they are hashed: half the price of reading them again.
    """
    given, copied = (tensor.detach().view(torch.uint8).numpy() for tensor in (source, destination))
    sums = []
    for start in range(0, len(given), BLOCK_BYTES):
        total = xxhash.xxh3_64()
        for begin in range(start, min(start + BLOCK_BYTES, len(given)), _PIECE_BYTES):
            piece = slice(begin, min(begin + _PIECE_BYTES, start + BLOCK_BYTES))
            copied[piece] = given[piece]
            total.update(copied[piece].data)
        sums.append(total.hexdigest())
    return tuple(sums)


def _blocks(data: Tensor, block_bytes: int) -> Iterator[memoryview]:
    step = block_bytes // data.element_size()
    for begin in range(0, data.numel(), step):
        block = data[begin : begin + step].detach().cpu().contiguous()
        yield block.view(torch.uint8).numpy().data


def _write_block(descriptor: int, block: memoryview) -> str:
    """Write a block and return its checksum; in pieces, so that writing finds in the cache what hashing has read."""
    total = xxhash.xxh3_64()
    for begin in range(0, len(block), _PIECE_BYTES):
        piece = block[begin : begin + _PIECE_BYTES]
        total.update(piece)
        _write_all(descriptor, piece)
    return total.hexdigest()


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]  # a write may be cut short


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    offset: int
    size_bytes: int


def _places(header: dict[str, dict[str, list[int]]], start: int, size_bytes: int) -> dict[str, Place]:
    """Return where each tensor lies; raise ValueError if one does not lie in the file."""
    places = {}
    for key, row in header.items():
        if key == "__metadata__":
            continue
        begin, end = row["data_offsets"]
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= size_bytes - start:
            raise ValueError(f"{key} does not lie in the file")
        places[key] = Place(start + begin, end - begin)
    return places


class TensorFile:
    """An open safetensors file whose header has been verified."""

    def __init__(self, path: Path, *, size_bytes: int, header_checksum: str) -> None:
        """Open `path`. Raises DamagedFile if it is no plain file, or its size or header is not the expected one."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise DamagedFile(f"cannot be opened ({error.strerror})") from error
        self._descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        try:
            self._check_size(size_bytes)
            self.places = self._read_header(size_bytes, header_checksum)
        except BaseException:
            self.close()
            raise

    def _check_size(self, size_bytes: int) -> None:
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedFile("is not a plain file")
        if found.st_size != size_bytes:
            raise DamagedFile(f"has {found.st_size:,} bytes instead of {size_bytes:,}")

    def _read_header(self, size_bytes: int, expected: str) -> dict[str, Place]:
        prefix = self._read_exactly(0, min(8, size_bytes))
        length = int.from_bytes(prefix, "little")
        if not 2 <= length <= min(size_bytes - 8, MAXIMUM_HEADER_BYTES):
            raise DamagedFile("has no safetensors header")
        text = self._read_exactly(8, length)
        if checksum(prefix + text) != expected:
            raise DamagedFile("has another header than was written (checksum)")
        try:
            return _places(json.loads(text), 8 + length, size_bytes)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DamagedFile("has a header that is none of safetensors") from None

    def read_block(self, buffer: memoryview, offset: int) -> str:
        """Fill `buffer` from byte `offset` and return its checksum; in pieces, so that hashing finds them in the cache.

        Raises DamagedFile if the file ends too early.
        """
        total = xxhash.xxh3_64()
        for begin in range(0, len(buffer), _PIECE_BYTES):
            piece = buffer[begin : begin + _PIECE_BYTES]
            self.read_into(piece, offset + begin)
            total.update(piece)
        return total.hexdigest()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of the file. Raises DamagedFile if the file ends too early."""
        while buffer:
            try:
                count = os.preadv(self._descriptor, [buffer], offset)
            except OSError as error:
                raise DamagedFile(f"cannot be read at byte {offset:,} ({error.strerror})") from error
            if count == 0:
                raise DamagedFile(f"ends at byte {offset:,}")
            buffer, offset = buffer[count:], offset + count

    def _read_exactly(self, offset: int, count: int) -> bytes:
        data = bytearray(count)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
