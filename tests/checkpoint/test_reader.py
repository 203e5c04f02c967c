"""Every damage is refused, naming file and tensor; every slice is the slice of the whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import KINDS, SHAPES, Saved, elements, full_tensors, holdings

from megatron_omega.checkpoint.catalogue import check_structure
from megatron_omega.checkpoint.manifest import FILE_NAME
from megatron_omega.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_omega.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def checkpoint(saved: Saved) -> Path:
    return saved.write(3)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "copy")


def read_all(path: Path) -> None:
    """Read as a resuming run does: structure first, then every tensor."""
    check_structure(path)
    with open_checkpoint(path) as reader:
        for name in reader.names():
            for kind in KINDS:
                reader.tensor(name, kind)


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (3, 1), (2, 3), (1, 5)])
def test_every_layout_reads_what_it_would_hold(checkpoint: Path, tensor: int, data: int) -> None:
    full = full_tensors(3)
    with open_checkpoint(checkpoint) as reader:
        for mine in holdings(tensor, data):
            for holding in mine:
                found = torch.empty(holding.region.count)
                reader.read_into(found, holding.name, "exp_avg", holding.region)
                assert torch.equal(found, elements(full[holding.name]["exp_avg"], holding.region))


@settings(max_examples=40)
@given(st.data())
def test_a_slice_is_the_slice_of_the_whole(checkpoint: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(SHAPES)))
    shape = SHAPES[name][0]
    axis = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[axis] - 1))
    stop = data.draw(st.integers(start + 1, shape[axis]))
    with open_checkpoint(checkpoint) as reader:
        found = reader.slice(name, "weight", axis, start, stop)
    assert torch.equal(found, full_tensors(3)[name]["weight"].narrow(axis, start, stop - start))


def test_small_blocks_are_read_alone(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_omega.checkpoint import tensor_file, writer

    monkeypatch.setattr(writer, "BLOCK_BYTES", 64)
    monkeypatch.setattr(
        writer, "write_tensors", lambda path, entries: tensor_file.write_tensors(path, entries, block_bytes=64)
    )
    path = Saved(tmp_path, tensor=1, data=1).write(1)
    read: list[int] = []
    real = CheckpointReader._read_block
    monkeypatch.setattr(
        CheckpointReader,
        "_read_block",
        lambda self, memory, kind, block: read.append(block.index) or real(self, memory, kind, block),
    )
    with open_checkpoint(path) as reader:
        rows = reader.slice("token_table.weight", "weight", 0, 5, 8)  # elements 30 .. 48 of 16 a block
    assert torch.equal(rows, full_tensors(1)["token_table.weight"]["weight"][5:8])
    assert read == [1, 2]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_refused(checkpoint: Path, tmp_path: Path, place: float, bit: int) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy", dirs_exist_ok=True)
    files = sorted(copy.iterdir())
    position = int(place * sum(file.stat().st_size for file in files))
    for file in files:
        if position < file.stat().st_size:
            break
        position -= file.stat().st_size
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=file.name):
        read_all(copy)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.integers(0, 8), place=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_refused(checkpoint: Path, tmp_path: Path, index: int, place: float) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy", dirs_exist_ok=True)
    file = sorted(copy.iterdir())[index]
    os.truncate(file, int(place * file.stat().st_size))
    with pytest.raises(CheckpointError, match=rf"{file.name}.*(lost with it: tensor |checksum)"):
        check_structure(copy)


def test_a_flipped_bit_names_file_and_tensor(copy: Path) -> None:
    file = copy / "optimizer-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as raised:
        read_all(copy)
    assert "optimizer-00001.safetensors has changed bytes" in str(raised.value)
    assert "tensor exp_avg_sq/" in str(raised.value)
    with open_checkpoint(copy) as reader:
        assert reader.verify() == [str(raised.value)]


@pytest.mark.parametrize("index", range(9))
def test_a_missing_file_is_refused(copy: Path, index: int) -> None:
    file = sorted(copy.iterdir())[index]
    file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        check_structure(copy)


def test_files_swapped_between_ranks_are_refused(copy: Path) -> None:
    first, second = copy / "weights-00000.safetensors", copy / "weights-00001.safetensors"
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)
    with pytest.raises(CheckpointError, match=r"weights-0000[01].safetensors"):
        check_structure(copy)


def test_files_of_two_steps_are_refused(saved: Saved, copy: Path) -> None:
    shutil.copy(saved.write(4) / "weights-00002.safetensors", copy / "weights-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"weights-00002.safetensors has changed bytes"):
        read_all(copy)


def test_the_manifest_of_another_step_is_refused(saved: Saved, copy: Path) -> None:
    with pytest.raises(CheckpointError, match="is of step 3, not of the folder it lies in"):
        check_structure(copy.rename(copy.with_name("step-00000005")))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_plain_files_are_read(copy: Path, checkpoint: Path, kind: str) -> None:
    file = copy / "weights-00000.safetensors"
    file.unlink()
    {"link": lambda: file.symlink_to(checkpoint / file.name), "pipe": lambda: os.mkfifo(file), "folder": file.mkdir}[
        kind
    ]()
    with pytest.raises(CheckpointError, match=file.name):
        check_structure(copy)


def test_an_unknown_parameter_is_a_sentence(checkpoint: Path) -> None:
    with open_checkpoint(checkpoint) as reader, pytest.raises(CheckpointError, match="holds no parameter 'decoder.9'"):
        reader.tensor("decoder.9")


def test_the_manifest_comes_with_the_reader(checkpoint: Path) -> None:
    with open_checkpoint(checkpoint) as reader:
        assert reader.config == {"training": {"seed": 1}}
        assert reader.manifest.state == {"consumed_samples": 24}
        assert reader.element_count() == sum(torch.Size(shape).numel() for shape, _ in SHAPES.values())
        assert (checkpoint / FILE_NAME).exists()
