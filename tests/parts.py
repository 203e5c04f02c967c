"""Checkpoints made without engines: parameters cut up like ranks cut them, ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from megatron_omega.checkpoint.manifest import KINDS, EngineState, Kind, SavedLayout
from megatron_omega.checkpoint.sharing import share_writing
from megatron_omega.checkpoint.writer import Piece, Snapshot, write_checkpoint
from megatron_omega.errors import CheckpointError
from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.regions import Holding, Region

SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "token_table.weight": ((37, 6), 0),
    "decoder.0.attention.qkv": ((2, 3, 4, 2, 6), 2),
    "decoder.0.ffn.down": ((6, 10), 1),
    "decoder.0.norm.weight": ((6,), None),
}
IDENTITY: dict[str, JsonValue] = {"model": {"hidden_size": 6, "vocab_size": 37}, "tokenizer": "abc"}


class ThreadPeers(Peers):
    """Peers that are threads of one process."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier

    def exchange(self, value: JsonValue) -> list[JsonValue]:
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values


def thread_peers(size: int) -> list[ThreadPeers]:
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=20)
    return [ThreadPeers(rank, size, board, barrier) for rank in range(size)]


def full_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Return every parameter's weight and moments, full size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {kind: torch.randn(shape, generator=generator) for kind in KINDS} for name, (shape, _) in SHAPES.items()
    }


def cut(total: int, parts: int) -> list[tuple[int, int]]:
    return [(total * index // parts, total * (index + 1) // parts) for index in range(parts)]


def holdings(tensor: int, data: int) -> list[list[Holding]]:
    """Return what the ranks (data x tensor, tensor fastest) hold: uneven shards, each parted over replicas."""
    ranks = []
    for data_rank in range(data):
        for tensor_rank in range(tensor):
            mine = []
            for name, (shape, axis) in SHAPES.items():
                bounds = (0, 0) if axis is None else cut(shape[axis], tensor)[tensor_rank]
                box = Region(shape, axis, *bounds, 0, 0)
                count = torch.Size(box.box_shape).numel()
                first, end = cut(count, data)[data_rank]
                if end > first:
                    mine.append(Holding(name, Region(shape, axis, *bounds, first, end - first)))
            ranks.append(mine)
    return ranks


def elements(full: torch.Tensor, region: Region) -> torch.Tensor:
    """Return the elements of `region`, from the full tensor."""
    box = full if region.axis is None else full.narrow(region.axis, region.start, region.stop - region.start)
    return box.reshape(-1)[region.first : region.first + region.count].clone()


@dataclass
class Saved:
    """Checkpoints written by threads."""

    directory: Path
    tensor: int = 2
    data: int = 2
    failures: dict[int, list[CheckpointError]] = field(default_factory=dict)

    def snapshots(self, step: int, seed: int, head: dict[str, Any] | None = None) -> list[Snapshot]:
        held = holdings(self.tensor, self.data)
        tensors = full_tensors(seed)
        duties = share_writing(held, [rank % self.tensor for rank in range(len(held))])
        snapshots = []
        for rank, mine in enumerate(duties):
            pieces = []
            for duty in mine:
                holding = held[rank][duty.holding]
                region = holding.region.part(duty.offset, duty.count)
                data: dict[Kind, torch.Tensor] = {kind: elements(tensors[holding.name][kind], region) for kind in KINDS}
                pieces.append(Piece(holding.name, SHAPES[holding.name][1], region, float(step), data))
            snapshots.append(Snapshot(pieces, self.head(step) | (head or {})))
        return snapshots

    def head(self, step: int) -> dict[str, Any]:
        return {
            "step": step, "versions": {"torch": "test"}, "identity": IDENTITY, "config": {"training": {"seed": 1}},
            "layout": SavedLayout(pipeline=1, data=self.data, tensor=self.tensor, zero_stage=1, dtype="float32"),
            "state": {"consumed_samples": 8 * step}, "validation_loss": None,
            "engine": EngineState(global_steps=step, global_samples=8 * step, skipped_steps=0, loss_scaler={}),
        }  # fmt: skip

    def write(self, step: int, *, seed: int | None = None, token: str = "t0", **head: Any) -> Path:
        """Write the checkpoint of `step`; raises the first rank's CheckpointError, all are in `failures`."""
        snapshots = self.snapshots(step, step if seed is None else seed, head)
        peers = thread_peers(len(snapshots))

        def one(rank: int) -> Path | CheckpointError:
            try:
                return write_checkpoint(self.directory, snapshots[rank], peers[rank], token=token)
            except CheckpointError as error:
                return error

        with ThreadPoolExecutor(len(snapshots)) as pool:
            results = list(pool.map(one, range(len(snapshots))))
        self.failures[step] = [result for result in results if isinstance(result, CheckpointError)]
        if self.failures[step]:
            raise self.failures[step][0]
        assert isinstance(results[0], Path)
        return results[0]


def files_of(path: Path) -> Sequence[Path]:
    return sorted(path.iterdir())
