"""Every byte of a compressed file counts: whatever follows a stream is another one, legal padding or an error."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron_omega.corpus.reading.compressed_source import Compression
from megatron_omega.corpus.reading.compression import open_binary, uncompressed_size
from megatron_omega.errors import DataError


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESSORS: dict[Compression, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zst": zstd,
}
TEXTS = [b"first stream\n" * 40, b"", b"second \xff stream\n" * 30, b"third"]
every_format = pytest.mark.parametrize("compression", COMPRESSORS)


def streams(compression: Compression) -> bytes:
    return b"".join(COMPRESSORS[compression](text) for text in TEXTS)


def read(path: Path, data: bytes, compression: Compression, notes: list[str] | None = None) -> bytes:
    path.write_bytes(data)
    with open_binary(str(path), compression, (notes if notes is not None else []).append) as file:
        return file.read()


def refused(path: Path, data: bytes, compression: Compression) -> str:
    with pytest.raises(DataError) as caught:
        read(path, data, compression)
    return str(caught.value)


@every_format
def test_all_streams_are_read_and_every_cut_is_noticed(tmp_path: Path, compression: Compression) -> None:
    data = streams(compression)
    assert read(tmp_path / "a", data, compression) == b"".join(TEXTS)
    ends = [len(b"".join(COMPRESSORS[compression](text) for text in TEXTS[:n])) for n in range(1, len(TEXTS))]
    for length in range(len(data)):
        if length not in ends:
            assert "is damaged" in refused(tmp_path / "a", data[:length], compression)


@every_format
def test_no_changed_byte_gives_another_text(tmp_path: Path, compression: Compression) -> None:
    data, whole, source = streams(compression), b"".join(TEXTS), random.Random(0)
    outcomes = {"refused": 0, "same": 0}
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= source.randrange(1, 256)
        try:
            assert read(tmp_path / "a", bytes(damaged), compression) == whole, place
            outcomes["same"] += 1
        except DataError as error:
            assert str(tmp_path / "a") in str(error) and "byte" in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 0.5 * len(data)


@pytest.mark.parametrize(
    ("compression", "behind", "is_legal"),
    [
        ("gz", b"\0", True),
        ("gz", b"\0\0x", False),
        ("xz", b"\0" * 4, True),
        ("xz", b"\0" * 3, False),
        ("bz2", b"\0", False),
        ("zst", b"\0", False),
        ("gz", b"x", False),
        ("bz2", b"garbage", False),
        ("zst", b"\x50\x2a\x4d\x18\x03\0\0\0abc", True),
        ("zst", b"\x50\x2a\x4d\x18\x04\0\0\0abc", False),
    ],
)
def test_what_follows_a_stream(tmp_path: Path, compression: Compression, behind: bytes, is_legal: bool) -> None:
    data = streams(compression)
    more = COMPRESSORS[compression](b"more")
    if not is_legal:
        assert "stream" in refused(tmp_path / "a", data + behind, compression)
        return
    assert read(tmp_path / "a", data + behind, compression) == b"".join(TEXTS)
    assert read(tmp_path / "a", data + behind + more, compression) == b"".join(TEXTS) + b"more"


@every_format
def test_a_bomb_comes_in_small_steps(tmp_path: Path, compression: Compression) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(COMPRESSORS[compression](bytes(8 << 20)))
    with open_binary(str(path), compression) as file:
        raw = file.raw  # type: ignore[attr-defined]
        steps = [len(block) for block in raw._blocks]
    assert sum(steps) == 8 << 20 and max(steps) <= 1 << 18


def test_a_long_window_is_read_and_one_beyond_is_named(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True, write_checksum=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(b"x" * 1000) + compressor.flush()
    assert read(tmp_path / "a", data, "zst") == b"x" * 1000
    assert data[5] == (30 - 10) << 3
    wider = data[:5] + bytes([(35 - 10) << 3]) + data[6:]
    assert "--long=31" in refused(tmp_path / "a", wider, "zst")


def test_streams_without_checksums_are_said_once(tmp_path: Path) -> None:
    notes: list[str] = []
    read(tmp_path / "a", zstandard.compress(b"x") * 3 + zstd(b"y"), "zst", notes)
    read(tmp_path / "b", lzma.compress(b"x", check=lzma.CHECK_NONE), "xz", notes)
    assert [note.partition(": ")[2].partition(" no")[0] for note in notes] == [
        "3 zst streams carry",
        "1 xz stream carries",
    ]


@every_format
def test_the_size_is_known_from_the_beginning(tmp_path: Path, compression: Compression) -> None:
    source = random.Random(1)
    data = b"".join(f"{source.random()} is line {n}\n".encode() for n in range(100_000))
    for number, content in ((0, data[:1000]), (1, data)):
        path = tmp_path / f"{number}"
        path.write_bytes(COMPRESSORS[compression](content))
        assert abs(uncompressed_size(str(path), compression) / len(content) - 1) < (0.06 if number else 1e-9)
