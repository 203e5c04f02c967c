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
from megatron_omega.checkpoint.mapping import Region, box_of, copy_overlap, offset_inside, overlaps, whole
from megatron_omega.checkpoint.tensor_file import DamagedFile, TensorFile
from megatron_omega.errors import CheckpointError

_OPEN_FILES = 64
_NAMED_TENSORS = 3


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
        return self._read(name, kind, whole(self._shape(name)))

    def slice(self, name: str, kind: Kind, axis: int, start: int, stop: int) -> Tensor:
        """Return [start, stop) along `axis`; reads little else where the tensor was sharded along that axis."""
        shape = self._shape(name)
        if self.manifest.parameters[name].axis not in (None, axis):
            return self.tensor(name, kind).narrow(axis, start, stop - start).clone()
        return self._read(name, kind, box_of(shape, axis, start, stop))

    def _read(self, name: str, kind: Kind, region: Region) -> Tensor:
        destination = torch.empty(region.count, dtype=torch.float32)
        self.read_into(destination, name, kind, region)
        return destination.view(region.box_shape)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.manifest.parameters:
            raise CheckpointError(f"{self.path} holds no parameter {name!r}")
        return self.manifest.parameters[name].shape

    def read_into(self, destination: Tensor, name: str, kind: Kind, region: Region) -> None:
        """Fill the 1-D tensor `destination` with the elements of `region`. Raises CheckpointError at any damage."""
        copied = sum(read() for read in self.reads(destination, name, kind, region))
        assert copied == region.count == destination.numel(), f"{copied} of {region.count} elements of {name} found"

    def reads(self, destination: Tensor, name: str, kind: Kind, region: Region) -> list[Callable[[], int]]:
        """Return what together does `read_into`: a call for each block, in the order of the file, for any thread.

        Each returns the number of elements it has copied.
        """
        entry = self.manifest.parameters[name]
        if kind not in self.manifest.kinds:
            raise CheckpointError(f"{self.path} holds no optimizer state ({kind} of {name}); load its weights only")
        found = [
            (fragment, index, block)
            for fragment in entry.fragments
            for index, block in enumerate(self._blocks(entry.region(fragment)))
            if overlaps(block, region)
        ]
        return [partial(self._read_part, destination, region, name, kind, *part) for part in found]

    def _read_part(
        self, destination: Tensor, region: Region, name: str, kind: Kind, fragment: Fragment, index: int, block: Region
    ) -> int:
        """Read one block into `destination`: straight into it where the block is a run of it in memory."""
        offset = offset_inside(block, region) if destination.device.type == "cpu" else None
        if offset is not None:
            self._read_block(destination[offset : offset + block.count], name, kind, fragment, index)
            return block.count
        data = self._scratch(block.count)
        self._read_block(data, name, kind, fragment, index)
        return copy_overlap(data, block, destination, region)

    def _scratch(self, count: int) -> Tensor:
        buffer = getattr(self._scratch_of, "buffer", None)
        if buffer is None or buffer.numel() < count:
            buffer = self._scratch_of.buffer = torch.empty(count, dtype=torch.float32)
        return buffer[:count]

    def _blocks(self, region: Region) -> Iterator[Region]:
        step = self.manifest.block_bytes // ELEMENT_BYTES
        for offset in range(0, region.count, step):
            yield region.part(offset, min(step, region.count - offset))

    def _read_block(self, data: Tensor, name: str, kind: Kind, fragment: Fragment, index: int) -> None:
        """Fill `data` with block `index` of a tensor and compare it with its checksum."""
        view = data.view(torch.uint8).numpy().data
        entry = self.manifest.file(fragment, kind)
        key = tensor_key(name, kind)
        try:
            file = self._open(entry)
            place = file.places.get(key)
            if place is None or place.size_bytes != fragment.count * ELEMENT_BYTES:
                raise DamagedFile(f"does not hold {fragment.count:,} elements")
            if file.read_block(view, place.offset + index * self.manifest.block_bytes) != fragment.blocks[kind][index]:
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
            for index, block in enumerate(self._blocks(self.manifest.parameters[name].region(fragment))):
                self._read_block(self._scratch(block.count), name, kind, fragment, index)
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
