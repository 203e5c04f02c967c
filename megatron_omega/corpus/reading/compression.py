"""Compressed files, read as a stream that ends without an error only if the file does.

A file is a row of streams (gz members, bz2 and xz streams, zst frames). What follows one is another, padding that its
format allows, or damage; the libraries' own readers take it for the end, and the rest of the corpus would be missing.
Every step gives a bounded number of bytes, however little the input is. Knows nothing of records.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

from typing_extensions import Buffer

from megatron_omega.corpus.reading.compressed_source import (
    INPUT_BYTES,
    CompressedSource,
    Compression,
    Note,
    ignore_note,
)
from megatron_omega.corpus.reading.zstd_frames import content_size, zstd_blocks

SUFFIXES: dict[str, Compression] = {
    ".gz": "gz",
    ".tgz": "gz",
    ".zst": "zst",
    ".zstd": "zst",
    ".xz": "xz",
    ".bz2": "bz2",
}
_BLOCK = 1 << 20
_STEP = 1 << 18
"""Most bytes that one step of a decompressor gives."""
_PROBE = 2 << 20
_TRUSTED_ERROR = 0.3
_PADDING: dict[Compression, int] = {"gz": 1, "xz": 4}
"""Formats that allow NULs behind a stream, and what their number is a multiple of (gzip -t, xz specification 1.2)."""


def open_binary(path: str, compression: Compression, note: Note = ignore_note) -> IO[bytes]:
    """Open a file for reading, decompressed. Reading raises DataError if it is damaged or cut short.

    `note` hears, at the end of the file, of data that carry no checksum.
    """
    if not compression:
        return Path(path).open("rb", buffering=_BLOCK)
    file = Path(path).open("rb", buffering=INPUT_BYTES)  # noqa: SIM115 (closed with the stream)
    source = CompressedSource(file, path, compression)
    return io.BufferedReader(_Blocks(file, _blocks(source, note)), _BLOCK)


def uncompressed_size(path: str, compression: Compression) -> int:
    """Return how many bytes a file holds when decompressed, from its beginning and what its format wrote down.

    Exact where the first megabytes are all, or where one stream says how long it is; else as if the rest were like the
    beginning. Raises DataError if the beginning is damaged.
    """
    size = Path(path).stat().st_size
    if not compression:
        return size
    with Path(path).open("rb", buffering=INPUT_BYTES) as file:
        estimate, is_all = _probed_size(CompressedSource(file, path, compression), size)
        promised = 0 if is_all else _promised_size(file, compression)
    return promised if abs(promised - estimate) < _TRUSTED_ERROR * estimate else estimate


def _probed_size(source: CompressedSource, size: int) -> tuple[int, bool]:
    """Return the size that the beginning promises, and whether it was all."""
    produced = place = 0
    consumed = (0, 0)
    for block in _blocks(source, ignore_note):
        if source.place != place:  # all that was read before this was decompressed before this
            consumed, place = (place, produced), source.place
        produced += len(block)
        if produced >= _PROBE and all(consumed):
            return size * consumed[1] // consumed[0], False
    return produced, True


def _promised_size(file: IO[bytes], compression: Compression) -> int:
    """Return the length that the first zst frame or the last gz member (modulo 2^32) gives; 0 for none."""
    if compression == "gz":
        file.seek(-4, io.SEEK_END)
        return int.from_bytes(file.read(4), "little")
    file.seek(0)
    return content_size(file.read(INPUT_BYTES)) if compression == "zst" else 0


def _blocks(source: CompressedSource, note: Note) -> Iterator[bytes]:
    return zstd_blocks(source, note) if source.compression == "zst" else _stream_blocks(source, note)


class _Blocks(io.RawIOBase):
    """Blocks of bytes as one file."""

    def __init__(self, file: IO[bytes], blocks: Iterator[bytes]) -> None:
        self._file, self._blocks, self._rest = file, blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer)
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(target), len(self._rest))
        target[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressor(Protocol):
    """What bz2 and lzma offer, for one stream."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Gzip:
    """One gzip member by zlib, in the way of bz2 and lzma. Checks the CRC and the length at its end."""

    def __init__(self) -> None:
        import zlib

        self._zlib = zlib.decompressobj(16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail and not self.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _decompressor(compression: Compression) -> _Decompressor:
    import bz2
    import lzma

    if compression == "gz":
        return _Gzip()
    return bz2.BZ2Decompressor() if compression == "bz2" else lzma.LZMADecompressor(lzma.FORMAT_XZ)


def _stream_blocks(source: CompressedSource, note: Note) -> Iterator[bytes]:
    unchecked = 0
    while True:
        source.begin_stream()
        decompressor = _decompressor(source.compression)
        yield from _one_stream(source, decompressor)
        unchecked += _is_unchecked(decompressor)
        source.back(len(decompressor.unused_data))
        if _pass_padding(source):
            break
    if unchecked:
        note(source.unchecked(unchecked))


def _one_stream(source: CompressedSource, decompressor: _Decompressor) -> Iterator[bytes]:
    import lzma
    import zlib

    while not decompressor.eof:
        data = source.read(INPUT_BYTES) if decompressor.needs_input else b""
        if decompressor.needs_input and not data:
            source.fail("is cut short")
        try:
            block = decompressor.decompress(data, _STEP)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            source.fail(f"cannot be decompressed before byte {source.place} ({error})")
        if block:
            yield block


def _is_unchecked(decompressor: _Decompressor) -> bool:
    import lzma

    return isinstance(decompressor, lzma.LZMADecompressor) and decompressor.check == lzma.CHECK_NONE


def _pass_padding(source: CompressedSource) -> bool:
    """Pass over NULs behind a stream, where its format allows them; return whether the file ends there."""
    start = source.place
    while data := source.read(INPUT_BYTES):
        rest = data.lstrip(b"\0")
        if rest:
            source.back(len(rest))
            break
    padding = source.place - start
    unit = _PADDING.get(source.compression)
    if padding and (unit is None or padding % unit):
        source.fail(f"ends at byte {start} and is followed by {padding} NULs, which are no stream")
    return not data
