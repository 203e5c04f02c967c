"""Reading a checkpoint: any region of any tensor, verified block by block. Needs no engine, no model, no GPU.

Only the blocks that hold wanted elements are read; each is compared with its checksum before an element of it is used.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from pydantic import JsonValue
from torch import Tensor

from megatron_omega.checkpoint.manifest import (
    ELEMENT_BYTES,
    FileEntry,
    Fragment,
    Kind,
    Manifest,
    read_manifest,
    tensor_key,
)
from megatron_omega.checkpoint.tensor_file import DamagedFile, TensorFile
from megatron_omega.errors import CheckpointError
from megatron_omega.parallel.regions import Region, box_of, copy_overlap, offset_inside, overlaps, whole

_OPEN_FILES = 64
_NAMED_TENSORS = 3


class _Block(NamedTuple):
    """A run of elements with a checksum of its own: the smallest part of a file that can be verified."""

    name: str
    fragment: Fragment
    index: int
    """Its number in the fragment."""
    region: Region


class _Part(NamedTuple):
    """A block of which elements are wanted."""

    block: _Block
    offset: int | None
    """Where the block begins in what is wanted, if it lies there whole and in one run."""


class ReadPlan(NamedTuple):
    """Which blocks hold a region of a parameter."""

    name: str
    region: Region
    parts: list[_Part]


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor that is contiguous on the CPU."""
    return tensor.view(torch.uint8).numpy().data


class CheckpointReader:
    """An open checkpoint. Several threads may read from it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._files: OrderedDict[str, TensorFile] = OrderedDict()
        self._lock = threading.Lock()
        self._scratch_of = threading.local()

    @property
    def config(self) -> dict[str, JsonValue]:
        """The resolved configuration of the run that wrote it."""
        return self.manifest.config

    @property
    def identity(self) -> dict[str, JsonValue]:
        """Architecture and tokenizer: what must agree for the weights to mean the same."""
        return self.manifest.identity

    def names(self) -> tuple[str, ...]:
        """Return the canonical names of all parameters."""
        return tuple(self.manifest.parameters)

    def tensor(self, name: str, kind: Kind = "weight") -> Tensor:
        """Return the whole tensor, fp32, in its global shape. Raises CheckpointError where a byte has changed."""
        return self._read(name, kind, whole(self.shape(name)))

    def slice(self, name: str, kind: Kind, axis: int, start: int, stop: int) -> Tensor:
        """Return [start, stop) along `axis`; reads little else where the tensor was sharded along that axis."""
        shape = self.shape(name)
        if self.manifest.parameters[name].axis not in (None, axis):
            return self.tensor(name, kind).narrow(axis, start, stop - start).clone()
        return self._read(name, kind, box_of(shape, axis, start, stop))

    def part(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Return [start, stop) along `axis` of a weight; as `slice`."""
        return self.slice(name, "weight", axis, start, stop)

    def _read(self, name: str, kind: Kind, region: Region) -> Tensor:
        destination = torch.empty(region.count, dtype=torch.float32)
        self.read_into(destination, name, kind, region)
        return destination.view(region.box_shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of a parameter. Raises CheckpointError where there is none of that name."""
        if name not in self.manifest.parameters:
            raise CheckpointError(f"{self.path} holds no parameter {name!r}")
        return self.manifest.parameters[name].shape

    def read_into(self, destination: Tensor, name: str, kind: Kind, region: Region) -> None:
        """Fill the 1-D tensor `destination` with the elements of `region`. Raises CheckpointError at any damage."""
        copied = sum(read() for read in self.reads(destination, kind, self.plan(name, region)))
        assert copied == region.count == destination.numel(), f"{copied} of {region.count} elements of {name} found"

    def plan(self, name: str, region: Region) -> ReadPlan:
        """Find the blocks that hold elements of `region`: the same for all kinds."""
        return ReadPlan(name, region, list(self._wanted(name, region)))

    def _wanted(self, name: str, region: Region) -> Iterator[_Part]:
        entry = self.manifest.parameters[name]
        for fragment in entry.fragments:
            source = entry.region(fragment)
            begin = offset_inside(source, region)
            if begin is None and not overlaps(source, region):
                continue
            for block in self._blocks(name, fragment):
                if begin is not None:  # all of it is one run of `region`, as between equal layouts: so is each block
                    yield _Part(block, begin + block.region.first - source.first)
                elif overlaps(block.region, region):
                    yield _Part(block, offset_inside(block.region, region))

    def _blocks(self, name: str, fragment: Fragment) -> Iterator[_Block]:
        region = self.manifest.parameters[name].region(fragment)
        step = self.manifest.block_bytes // ELEMENT_BYTES
        for index, offset in enumerate(range(0, region.count, step)):
            yield _Block(name, fragment, index, region.part(offset, min(step, region.count - offset)))

    def reads(self, destination: Tensor, kind: Kind, plan: ReadPlan) -> list[Callable[[], int]]:
        """Return what together fills the 1-D tensor `destination`: a call for each block, in the order of the file.

        They may be called from any thread. Each returns the number of elements it has copied.
        """
        if kind not in self.manifest.kinds:
            wanted = f"{kind} of {plan.name}"
            raise CheckpointError(f"{self.path} holds no optimizer state ({wanted}); load its weights only")
        memory = _memory(destination) if destination.device.type == "cpu" else None
        return [
            partial(self._read_straight, memory, kind, block, offset)
            if memory is not None and offset is not None
            else partial(self._read_part, destination, plan.region, kind, block)
            for block, offset in plan.parts
        ]

    def _read_straight(self, memory: memoryview, kind: Kind, block: _Block, offset: int) -> int:
        """Read a block that is a run of the destination into its memory, from element `offset` on."""
        self._read_block(memory[offset * ELEMENT_BYTES : (offset + block.region.count) * ELEMENT_BYTES], kind, block)
        return block.region.count

    def _read_part(self, destination: Tensor, region: Region, kind: Kind, block: _Block) -> int:
        """Read a block and copy what `destination` wants of it."""
        data = self._scratch(block.region.count)
        self._read_block(_memory(data), kind, block)
        return copy_overlap(data, block.region, destination, region)

    def _scratch(self, count: int) -> Tensor:
        buffer = getattr(self._scratch_of, "buffer", None)
        if buffer is None or buffer.numel() < count:
            buffer = self._scratch_of.buffer = torch.empty(count, dtype=torch.float32)
        return buffer[:count]

    def _read_block(self, memory: memoryview, kind: Kind, block: _Block) -> None:
        """Fill `memory` with a block and compare it with its checksum."""
        fragment, index = block.fragment, block.index
        entry = self.manifest.file(fragment, kind)
        key = tensor_key(block.name, kind)
        try:
            file = self._open(entry)
            place = file.places.get(key)
            if place is None or place.size_bytes != fragment.count * ELEMENT_BYTES:
                raise DamagedFile(f"does not hold {fragment.count:,} elements")
            offset = place.offset + index * self.manifest.block_bytes
            if file.read_block(memory, offset) != fragment.blocks[kind][index]:
                raise DamagedFile(f"has changed bytes (checksum of block {index})")
        except DamagedFile as error:
            raise CheckpointError(f"{self.path / entry.name} {error}; tensor {key}") from error

    def _open(self, entry: FileEntry) -> TensorFile:
        with self._lock:
            if entry.name not in self._files:
                path = self.path / entry.name
                self._files[entry.name] = TensorFile(path, size_bytes=entry.size_bytes, header_checksum=entry.header)
                if len(self._files) > _OPEN_FILES:  # closed by the garbage collector: another thread may be reading it
                    self._files.popitem(last=False)
            self._files.move_to_end(entry.name)
            return self._files[entry.name]

    def check_files(self) -> None:
        """Compare size and header of every file with the manifest. Raises CheckpointError with every finding."""
        findings = []
        for entry in self.manifest.files():
            try:
                self._open(entry)
            except DamagedFile as error:
                findings.append(f"{self.path / entry.name} {error}; lost with it: {self._contents(entry)}")
        if findings:
            raise CheckpointError(*findings)

    def _contents(self, entry: FileEntry) -> str:
        names = self.manifest.tensors_in(entry)
        more = f" and {len(names) - _NAMED_TENSORS} more" if len(names) > _NAMED_TENSORS else ""
        return f"tensor {', '.join(names[:_NAMED_TENSORS])}{more}" if names else "nothing"

    def verify(self) -> list[str]:
        """Read every byte and return what is damaged, naming file and tensor; an empty list where nothing is."""
        return [
            problem
            for name, entry in self.manifest.parameters.items()
            for fragment in entry.fragments
            for kind in self.manifest.kinds
            if (problem := self._damage(name, kind, fragment)) is not None
        ]

    def _damage(self, name: str, kind: Kind, fragment: Fragment) -> str | None:
        try:
            for block in self._blocks(name, fragment):
                self._read_block(_memory(self._scratch(block.region.count)), kind, block)
        except CheckpointError as error:
            return str(error)
        return None

    def element_count(self) -> int:
        """Return the number of parameters of the model."""
        return sum(math.prod(entry.shape) for entry in self.manifest.parameters.values())

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: Path | str) -> CheckpointReader:
    """Open the checkpoint folder `path`. Raises CheckpointError where its manifest is missing or damaged."""
    path = Path(path)
    return CheckpointReader(path, read_manifest(path))
