"""Tensor files are safetensors files, and no changed byte of a header passes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_omega.checkpoint.tensor_file import (
    DamagedFile,
    Entry,
    TensorFile,
    Written,
    checksum,
    copy_with_checksums,
    write_tensors,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(5, 7), "b/c": torch.randn(1000), "d": torch.randn(3, 2, 2)}


def write(path: Path, tensors: dict[str, torch.Tensor], block_bytes: int = 256) -> Written:
    return write_tensors(
        path,
        [Entry(key, tuple(value.shape), value.reshape(-1)) for key, value in tensors.items()],
        block_bytes=block_bytes,
    )


def test_the_library_reads_the_same_tensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    written = write(tmp_path / "file", tensors)
    assert (tmp_path / "file").stat().st_size == written.size_bytes
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert [len(blocks) for blocks in written.block_checksums.values()] == [1, 16, 1]


def test_blocks_carry_the_checksum_of_their_bytes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    written = write(tmp_path / "file", tensors)
    with TensorFile(tmp_path / "file", size_bytes=written.size_bytes, header_checksum=written.header_checksum) as file:
        place = file.places["b/c"]
        data = bytearray(place.size_bytes)
        file.read_into(memoryview(data), place.offset)
    assert data == tensors["b/c"].numpy().tobytes()
    assert [checksum(data[begin : begin + 256]) for begin in range(0, len(data), 256)] == list(
        written.block_checksums["b/c"]
    )


def test_an_existing_file_is_never_overwritten(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write(tmp_path / "file", tensors)
    with pytest.raises(FileExistsError):
        write(tmp_path / "file", tensors)


def test_every_flipped_bit_of_a_header_is_found(tmp_path: Path) -> None:
    written = write(tmp_path / "file", {"a": torch.zeros(2)})
    data = (tmp_path / "file").read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    for bit in range(8 * header_bytes):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(DamagedFile):
            TensorFile(tmp_path / "changed", size_bytes=written.size_bytes, header_checksum=written.header_checksum)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 40])
def test_a_truncated_file_is_found(tmp_path: Path, length: int) -> None:
    written = write(tmp_path / "file", {"a": torch.zeros(2)})
    os.truncate(tmp_path / "file", length)
    with pytest.raises(DamagedFile, match=f"has {length} bytes instead of"):
        TensorFile(tmp_path / "file", size_bytes=written.size_bytes, header_checksum=written.header_checksum)
    with pytest.raises(DamagedFile):  # nor does it help to expect what is there
        TensorFile(tmp_path / "file", size_bytes=length, header_checksum=written.header_checksum)


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    written = write(tmp_path / "file", {"a": torch.zeros(2)})
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", ".", "absent"):
        with pytest.raises(DamagedFile):
            TensorFile(tmp_path / name, size_bytes=written.size_bytes, header_checksum=written.header_checksum)


@pytest.mark.parametrize("count", [0, 1, 2**16, 2**20, 2**20 + 1, 3 * 2**20 - 5])
def test_copying_finds_the_checksums_that_writing_would(tmp_path: Path, count: int) -> None:
    source, destination = torch.randn(count), torch.empty(count)
    sums = copy_with_checksums(source, destination)
    assert torch.equal(source, destination)
    plain = write_tensors(tmp_path / "plain", [Entry("a", (count,), source)])
    given = write_tensors(tmp_path / "given", [Entry("a", (count,), destination, sums)])
    assert given == plain
    assert (tmp_path / "given").read_bytes() == (tmp_path / "plain").read_bytes()
