"""The frames of a .zst file, block by block (RFC 8878), so that each step is small and each place is known.

The library decompresses; this finds the borders, which its own reader does not tell: it takes a cut frame for the end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from megatron_omega.corpus.reading.compressed_source import INPUT_BYTES, CompressedSource, Note

_WINDOW_LOG = 31
_MAGIC, _FIRST_SKIPPABLE, _LAST_SKIPPABLE = 0xFD2FB528, 0x184D2A50, 0x184D2A5F
_LONGEST_HEADER = 18
_RLE = 1


def content_size(header: bytes) -> int:
    """Return the length of the first frame's content as its header gives it; 0 if it does not."""
    import zstandard

    try:
        return max(0, zstandard.frame_content_size(header))
    except zstandard.ZstdError:
        return 0


def zstd_blocks(source: CompressedSource, note: Note) -> Iterator[bytes]:
    """Yield the content of all frames, block by block (RFC 8878); a block holds at most 128 KiB."""
    import zstandard

    library = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
    unchecked = 0
    while True:
        source.begin_stream()
        magic = source.read(4)
        if not magic and source.stream > 1:
            break
        number = int.from_bytes(magic, "little") if len(magic) == 4 else -1
        if _FIRST_SKIPPABLE <= number <= _LAST_SKIPPABLE:
            _skip_frame(source)
        elif number == _MAGIC:
            source.back(4)
            has_checksum = yield from _one_frame(source, library)
            unchecked += not has_checksum
        else:
            source.fail(f"begins with {magic.hex() or 'nothing'}, which is no zstd frame")
    if unchecked:
        note(source.unchecked(unchecked))


def _skip_frame(source: CompressedSource) -> None:
    left = struct.unpack("<I", source.need(4))[0]
    while left:
        left -= len(source.need(min(left, INPUT_BYTES)))


def _one_frame(source: CompressedSource, library: Any) -> Iterator[bytes]:
    """Yield the blocks of one frame; return whether it carries a checksum of its content."""
    import zstandard

    header = source.read(_LONGEST_HEADER)
    try:
        size, parameters = zstandard.frame_header_size(header), zstandard.get_frame_parameters(header)
        source.back(max(0, len(header) - size))
        frame = library.decompressobj()
        _expect_nothing(source, frame.decompress(header[:size]))
        is_last = False
        while not is_last:
            head = source.need(3)
            is_last, kind, length = _block_header(head)
            data = source.need(1 if kind == _RLE else length)
            checksum = source.need(4) if is_last and parameters.has_checksum else b""
            yield frame.decompress(head + data + checksum)
        if not frame.eof:
            source.fail("does not end with its last block")
    except zstandard.ZstdError as error:
        source.fail(f"cannot be decompressed before byte {source.place} ({_reason(error, header)})")
    return parameters.has_checksum


def _expect_nothing(source: CompressedSource, content: bytes) -> None:
    if content:
        source.fail("has content in its header")


def _block_header(head: bytes) -> tuple[bool, int, int]:
    """Return (is the last, kind, size) of a block."""
    number = int.from_bytes(head, "little")
    return bool(number & 1), number >> 1 & 3, number >> 3


def _reason(error: Exception, header: bytes) -> str:
    """Return the library's words, and what a frame needs that cannot be had."""
    import zstandard

    if "too much memory" in str(error):
        return (
            f"{error}: its window is beyond 2^{_WINDOW_LOG} bytes, compress it again with --long={_WINDOW_LOG} at most"
        )
    try:
        dictionary = zstandard.get_frame_parameters(header).dict_id
    except zstandard.ZstdError:
        return str(error)
    if dictionary:
        return f"{error}; it was compressed with dictionary {dictionary}, compress it again without"
    return str(error)
