"""Compressed files, read as a stream. A file that ends in the middle of its data is an error, whatever the format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any, Literal, cast

from typing_extensions import Buffer

Compression = Literal["", "gz", "zst", "xz", "bz2"]
SUFFIXES: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".bz2": "bz2"}
_BLOCK = 1 << 20
_ZSTD_INPUT = 1 << 14


def open_binary(path: str, compression: Compression) -> IO[bytes]:
    """Open a file for reading, decompressed. Reading raises EOFError where it was cut short."""
    if compression == "gz":
        import gzip

        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == "bz2":
        import bz2

        return cast(IO[bytes], bz2.open(path, "rb"))
    if compression == "xz":
        import lzma

        return cast(IO[bytes], lzma.open(path, "rb"))
    if compression == "zst":
        return io.BufferedReader(_ZstdFile(path), _BLOCK)
    return Path(path).open("rb", buffering=_BLOCK)


class _ZstdFile(io.RawIOBase):
    """All frames of a .zst file one after another. The library's own reader takes a cut frame for the end."""

    def __init__(self, path: str) -> None:
        import zstandard

        self._file = Path(path).open("rb")  # noqa: SIM115 (closed with this object)
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer)
        while not self._output:
            if not self._advance():
                return 0
        count = min(len(target), len(self._output))
        target[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _advance(self) -> bool:
        """Decompress some more input; return whether there was any."""
        data = self._input or self._file.read(_ZSTD_INPUT)
        if not data:
            if self._frame is not None:
                raise EOFError("compressed file ended before the end of its last frame")
            return False
        frame = self._frame or self._decompressor.decompressobj()
        self._output = memoryview(frame.decompress(data))
        self._input, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        return True
