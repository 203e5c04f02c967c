"""A live engine seen as a checkpoint: what its ranks hold, what each of them writes, how it is filled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import Tensor

from megatron_omega.checkpoint.manifest import KINDS, Kind, Manifest
from megatron_omega.checkpoint.reader import CheckpointReader, ReadPlan
from megatron_omega.checkpoint.sharing import Duty, share_writing
from megatron_omega.checkpoint.tensor_file import copy_with_checksums
from megatron_omega.checkpoint.writer import Piece
from megatron_omega.engine.internals import (
    Engine,
    adam_step,
    base_optimizer,
    engine_holdings,
    prefill_adam,
    set_adam_step,
)
from megatron_omega.errors import CheckpointError
from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.regions import Holding, Region
from megatron_omega.parallel.topology import Topology

_READING_THREADS = 2
"""One waits for the disk while the other hashes; more break up the stream, and the system stops reading ahead."""

_Read = Callable[[], int]
"""Reads one block and returns the number of elements it has filled."""


class Binding:
    """An engine's holdings and what this rank writes of them. Creating it is collective."""

    def __init__(self, engine: Engine, peers: Peers, topology: Topology) -> None:
        self.engine = engine
        self.holdings = engine_holdings(engine)
        held = [[_decode(row) for row in cast(list[Any], rows)] for rows in peers.exchange(self._encode())]
        coordinates = [topology.layout.coordinate(rank) for rank in range(peers.size)]
        replicas = [place.pipeline * topology.layout.tensor + place.tensor for place in coordinates]
        self.shapes = {holding.name: holding.region.shape for holdings in held for holding in holdings}
        self.duties: list[Duty] = share_writing(held, replicas)[peers.rank]
        self._buffers: dict[Kind, Tensor] = {}

    def elements_of(self, kind: Kind) -> int:
        """Return how many elements of a kind this rank holds."""
        state = base_optimizer(self.engine).state
        return sum(mine.count for mine in self.holdings if kind == "weight" or kind in state[mine.flat])

    def _encode(self) -> JsonValue:
        rows = []
        for mine in self.holdings:
            region = mine.holding.region
            rows.append([mine.info.name, list(region.shape), region.axis, region.start, region.stop, region.first,
                         region.count, mine.copy])  # fmt: skip
        return rows

    def pieces(self, *, copy: bool) -> list[Piece]:
        """Return what this rank writes, as views of the live state or, with `copy`, of buffers that are reused."""
        optimizer = base_optimizer(self.engine)
        pieces, position = [], 0
        for duty in self.duties:
            mine = self.holdings[duty.holding]
            state = optimizer.state.get(mine.flat) or {}
            tensors: dict[Kind, Tensor] = {}
            checksums: dict[Kind, tuple[str, ...]] = {}
            for kind in KINDS:
                source = mine.flat if kind == "weight" else state.get(kind)
                view = (
                    torch.zeros(duty.count) if source is None else mine.part(source).narrow(0, duty.offset, duty.count)
                )
                tensors[kind] = view
                if copy:
                    tensors[kind] = self._buffer(kind)[position : position + duty.count]
                    if view.device.type == "cpu":
                        checksums[kind] = copy_with_checksums(view, tensors[kind])
                    else:  # hashed when it is written, while training goes on
                        tensors[kind].copy_(view)
            region = mine.holding.region.part(duty.offset, duty.count)
            step = adam_step(optimizer, mine.flat)
            pieces.append(Piece(mine.info.name, mine.info.axis, region, step, tensors, checksums))
            position += duty.count
        return pieces

    def _buffer(self, kind: Kind) -> Tensor:
        if kind not in self._buffers:
            count = sum(duty.count for duty in self.duties)
            self._buffers[kind] = torch.empty(count, pin_memory=torch.cuda.is_available())
        return self._buffers[kind]


def _decode(row: list[Any]) -> Holding:
    name, shape, axis, start, stop, first, count, copy = row
    return Holding(name, Region(tuple(shape), axis, start, stop, first, count), copy)


def require_same_parameters(
    path: Path, saved: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError, with every parameter that differs, where the engine has others than what is saved."""
    lines = [
        f"{path}: parameter {name} is {saved.get(name, 'absent')} there and {shapes.get(name, 'absent')} in this model"
        for name in sorted(saved.keys() | shapes.keys())
        if saved.get(name) != shapes.get(name)
    ]
    if lines:
        raise CheckpointError(*lines)


@contextmanager
def filling(binding: Binding, reader: CheckpointReader, kinds: Sequence[Kind]) -> Iterator[Callable[[Kind], None]]:
    """Read this rank's part of `kinds`, one after the other, into the engine's masters and moments, in the background.

    Yields what waits for one kind to be there, or raises CheckpointError at any damage to it. Leaving stops reading.
    """
    for mine in binding.holdings if len(kinds) > 1 else ():
        prefill_adam(base_optimizer(binding.engine), mine.flat)
    plans = [reader.plan(mine.info.name, mine.holding.region) for mine in binding.holdings]
    reads: dict[Kind, deque[_Read]] = {}
    running: dict[Kind, list[Future[int]]] = {}
    with ThreadPoolExecutor(_READING_THREADS) as pool:

        def wait(kind: Kind) -> None:
            copied, wanted = sum(run.result() for run in running[kind]), binding.elements_of(kind)
            assert copied == wanted, f"{copied} of {wanted} elements of {kind} found"

        try:
            for kind in kinds:  # the first is being read when the others are listed
                reads[kind] = deque(_reads(binding, reader, kind, plans))
                running[kind] = [pool.submit(_take_turns, reads[kind]) for _ in range(_READING_THREADS)]
            yield wait
        finally:
            for left in reads.values():
                left.clear()


def _reads(binding: Binding, reader: CheckpointReader, kind: Kind, plans: Sequence[ReadPlan]) -> Iterator[_Read]:
    optimizer = base_optimizer(binding.engine)
    for mine, plan in zip(binding.holdings, plans, strict=True):
        flat = mine.flat if kind == "weight" else optimizer.state[mine.flat].get(kind)
        if flat is not None:  # Muon's matrices have one moment
            yield from reader.reads(mine.part(flat), kind, plan)


def _take_turns(reads: deque[_Read]) -> int:
    """Read until none is left, one after the other, so that the disk reads ahead; return the number of elements.

    Threads share a deque: to wait for each other's lock would take them longer than many a block.
    """
    copied = 0
    while True:
        try:
            read = reads.popleft()
        except IndexError:
            return copied
        copied += read()


def restore_adam_steps(binding: Binding, manifest: Manifest) -> None:
    """Set how often each parameter has been updated."""
    optimizer = base_optimizer(binding.engine)
    for mine in binding.holdings:
        set_adam_step(optimizer, mine.flat, manifest.parameters[mine.info.name].step)
