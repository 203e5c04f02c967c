"""The bytes of a compressed file, and which of its streams is being read: the place that an error names."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import IO, Literal, NoReturn

from megatron_omega.errors import DataError

Compression = Literal["", "gz", "zst", "xz", "bz2"]
Note = Callable[[str], None]
INPUT_BYTES = 1 << 14
"""How much is read at a time."""


def ignore_note(text: str) -> None:
    """Take no notice of what is said about a file as a whole."""


class CompressedSource:
    """The compressed bytes, and which stream is being read."""

    def __init__(self, file: IO[bytes], path: str, compression: Compression) -> None:
        self._file, self.path = file, path
        self.compression: Compression = compression
        self.place = self.start = self.stream = 0

    def read(self, count: int) -> bytes:
        """Return up to `count` bytes; fewer at the end of the file only."""
        data = self._file.read(count)
        self.place += len(data)
        return data

    def need(self, count: int) -> bytes:
        """Return exactly `count` bytes of the stream under way."""
        data = self.read(count)
        if len(data) < count:
            self.fail("is cut short")
        return data

    def back(self, count: int) -> None:
        """Give the last `count` bytes back."""
        self._file.seek(-count, io.SEEK_CUR)
        self.place -= count

    def begin_stream(self) -> None:
        """Say that a stream begins here."""
        self.start, self.stream = self.place, self.stream + 1

    def unchecked(self, count: int) -> str:
        """Return what is to be said of `count` streams without a checksum."""
        return (
            f"{self.path}: {count} {self.compression} stream{'s carry' if count > 1 else ' carries'} no checksum, so "
            "damage to the content may pass unnoticed; compress with --check"
        )

    def fail(self, what: str) -> NoReturn:
        """Raise DataError: what is wrong with the stream under way, and where that begins."""
        raise DataError(
            f"{self.path} is damaged: its {self.compression} stream {self.stream}, which begins at byte {self.start}, "
            f"{what}; restore the file or leave it out, then run again"
        )
