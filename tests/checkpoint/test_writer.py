"""A checkpoint exists whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import KINDS, Saved, ThreadPeers, full_tensors
from pydantic import JsonValue

from megatron_omega.checkpoint import writer
from megatron_omega.checkpoint.catalogue import check_structure, list_checkpoints
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.checkpoint.writer import remove_unfinished
from megatron_omega.errors import CheckpointError


class PowerCut(BaseException):
    """The process is gone: nothing after this point runs."""


def holds(path: Path, seed: int) -> bool:
    """Whether the checkpoint holds exactly the tensors of `seed`."""
    tensors = full_tensors(seed)
    with open_checkpoint(path) as reader:
        assert set(reader.names()) == tensors.keys()
        return not reader.verify() and all(
            torch.equal(reader.tensor(name, kind), tensors[name][kind]) for name in tensors for kind in KINDS
        )


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (2, 2), (3, 1)])
def test_what_is_written_is_read(tmp_path: Path, tensor: int, data: int) -> None:
    path = Saved(tmp_path, tensor, data).write(5)
    assert path == tmp_path / "step-00000005"
    assert holds(path, 5)
    assert check_structure(path).parameters["token_table.weight"].step == 5


def test_bytes_are_written_once_and_evenly(tmp_path: Path) -> None:
    path = Saved(tmp_path, tensor=2, data=2).write(1)
    sizes = [
        shard.weights.size_bytes + (shard.optimizer.size_bytes if shard.optimizer else 0)
        for shard in check_structure(path).shards
    ]
    state = 12 * sum(tensor.numel() for kinds in full_tensors().values() for tensor in [kinds["weight"]])
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in path.glob("*.safetensors"))
    assert sum(sizes) == state + headers
    assert max(sizes) < 1.25 * min(sizes)


def test_a_whole_tensor_keeps_its_shape_in_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = Saved(tmp_path, tensor=1, data=1).write(1)
    found = load_file(path / "weights-00000.safetensors")
    assert all(torch.equal(found[name], kinds["weight"]) for name, kinds in full_tensors(1).items())


@pytest.mark.parametrize("failing_write", [0, 1, 5, 11])
def test_a_full_disk_fails_the_save_on_every_rank_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_write: int
) -> None:
    saved = Saved(tmp_path)
    older = saved.write(1)
    real, writes = os.write, []

    def write(descriptor: int, data: memoryview) -> int:
        writes.append(len(data))
        if len(writes) > failing_write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError, match="No space left on device"):
        saved.write(2)
    assert len(saved.failures[2]) == 4
    assert list(tmp_path.iterdir()) == [older]
    monkeypatch.undo()
    assert holds(older, 1)
    assert holds(saved.write(2), 2)


STAGES: dict[str, Callable[[Any], Any]] = {
    "before the manifest": lambda patch: patch.setattr(writer, "write_durably", raises),
    "after the manifest": lambda patch: patch.setattr(writer, "sync_folder", raises),
    "before the rename": lambda patch: patch.setattr(Path, "rename", raises),
}


def raises(*_: Any) -> None:
    raise PowerCut


@pytest.mark.parametrize("stage", STAGES)
def test_a_power_cut_leaves_the_older_checkpoint_and_an_unfinished_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    saved = Saved(tmp_path, tensor=1, data=1)
    older = saved.write(1)
    STAGES[stage](monkeypatch)
    with pytest.raises(PowerCut):
        saved.write(2)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [older]
    assert holds(older, 1)
    assert [path.name for path in tmp_path.iterdir() if path != older] == [".unfinished-step-00000002-t0"]
    remove_unfinished(tmp_path, token="t1")
    assert list(tmp_path.iterdir()) == [older]


def test_a_failed_manifest_is_told_to_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    saved = Saved(tmp_path)
    monkeypatch.setattr(writer, "write_durably", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        saved.write(2)
    assert len(saved.failures[2]) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    saved.write(3, seed=1)
    assert holds(saved.write(3, seed=2), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_checkpoint_is_replaced_without_a_moment_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Saved(tmp_path, tensor=1, data=1)
    saved.write(3, seed=1)
    monkeypatch.setattr(Path, "rename", raises)  # one exchange, not two renames with a kill between them
    assert holds(saved.write(3, seed=2), 2)


def test_a_checkpoint_is_replaced_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Saved(tmp_path, tensor=1, data=1)
    saved.write(3, seed=1)
    monkeypatch.setattr(writer.ctypes, "CDLL", lambda *_, **__: object())
    assert holds(saved.write(3, seed=2), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


class LostPeers(ThreadPeers):
    """Peers of whom one is gone."""

    def exchange(self, value: JsonValue) -> list[JsonValue]:
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(("rank", "remains"), [(0, 0), (1, 1)])
def test_only_the_first_rank_cleans_up_after_a_lost_one(tmp_path: Path, rank: int, remains: int) -> None:
    """Another one's hand could empty a folder that the first rank has just renamed."""
    peers = LostPeers(rank, 2, [], threading.Barrier(1))
    with pytest.raises(CheckpointError, match="another rank is gone"):
        writer.write_checkpoint(tmp_path, Saved(tmp_path, data=1).snapshots(1, 1)[rank], peers, token="t")
    assert len(list(tmp_path.iterdir())) == remains


def test_an_unfinished_save_of_this_process_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-step-00000009-mine").mkdir()
    remove_unfinished(tmp_path, token="mine")
    assert len(list(tmp_path.iterdir())) == 1


def test_ranks_that_disagree_about_the_optimizer_step_do_not_save(tmp_path: Path) -> None:
    saved = Saved(tmp_path, tensor=1, data=2)
    snapshots = saved.snapshots(1, 1)
    real = saved.snapshots
    broken = [
        type(piece)(piece.name, piece.axis, piece.region, piece.step + 1, piece.tensors)
        for piece in snapshots[1].pieces
    ]
    saved.snapshots = lambda *arguments: [real(*arguments)[0], type(snapshots[1])(broken, snapshots[1].head)]  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="optimizer steps"):
        saved.write(1)
    assert list(tmp_path.iterdir()) == []
