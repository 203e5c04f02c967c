"""The manifest of a checkpoint: what it holds, where, for which model, and the checksum of every block of every file.

It is the last file written and the first one read. Reading it is reading a stranger's file: it is parsed as JSON into
the strict types below, names of files cannot lead out of the folder, and nothing is taken for granted that the numbers
do not prove (`Manifest.problems`). docs/checkpoint-format.md describes it for readers in other languages.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from megatron_omega.checkpoint.tensor_file import checksum
from megatron_omega.errors import CheckpointError
from megatron_omega.parallel.regions import Region, find_gap

FILE_NAME = "manifest.json"
FORMAT = "megatron-omega-checkpoint"
VERSION = 1
ELEMENT_BYTES = 4
MAXIMUM_BYTES = 2**30

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")

Count = Annotated[int, Field(ge=0, lt=2**62)]
Extent = Annotated[int, Field(ge=1, lt=2**62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
FileName = Annotated[str, Field(pattern=r"^(weights|optimizer)-[0-9]{5}\.safetensors$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileEntry(_Record):
    """One safetensors file."""

    name: FileName
    size_bytes: Count
    header: Digest
    """Checksum of the length prefix and the JSON header together."""


class Shard(_Record):
    """What one rank wrote."""

    weights: FileEntry
    """Weights (fp32 master), each under the parameter's name."""
    optimizer: FileEntry | None
    """Moments, under "exp_avg/" or "exp_avg_sq/" and the parameter's name; null if they were dropped."""


class Fragment(_Record):
    """What one shard holds of one parameter: the same run of the weight and of both moments."""

    shard: Count
    """Index into `shards`."""
    slice: tuple[Count, Count] | None
    """The box: [start, stop) along the parameter's axis; null: the whole parameter."""
    range: tuple[Count, Extent]
    """[first, end) of the row-major flattening of the box."""
    blocks: dict[Kind, tuple[Digest, ...]]
    """For each kind the checksum of every `block_bytes` of the tensor, the last one shorter."""

    @property
    def count(self) -> int:
        return self.range[1] - self.range[0]


class ParameterEntry(_Record):
    """One parameter."""

    shape: tuple[Extent, ...]
    """Global shape."""
    axis: Annotated[int, Field(ge=0)] | None
    """The axis that tensor parallelism splits; null: none."""
    step: Annotated[float, Field(ge=0)]
    """Updates the optimizer has made to it (the counter of Adam's bias correction)."""
    fragments: tuple[Fragment, ...]
    """Together they hold every element exactly once."""

    def region(self, fragment: Fragment) -> Region:
        """Return which elements `fragment` holds."""
        if fragment.slice is None or self.axis is None:
            return Region(self.shape, None, 0, 0, fragment.range[0], fragment.count)
        return Region(self.shape, self.axis, *fragment.slice, fragment.range[0], fragment.count)


class EngineState(_Record):
    """Counters of the engine that do not depend on the layout."""

    global_steps: Count
    global_samples: Count
    skipped_steps: Count
    loss_scaler: dict[str, float]


class SavedLayout(_Record):
    """How the run that wrote it was laid out. For people: nothing is derived from it."""

    pipeline: Extent
    data: Extent
    tensor: Extent
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    dtype: str

    def __str__(self) -> str:
        return f"PP {self.pipeline} x DP {self.data} x TP {self.tensor}, ZeRO-{self.zero_stage}, {self.dtype}"


class Manifest(_Record):
    """A whole checkpoint."""

    format: Literal["megatron-omega-checkpoint"] = FORMAT
    version: Literal[1] = VERSION
    step: Count
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    """Versions of the software that wrote it."""
    layout: SavedLayout
    identity: dict[str, JsonValue]
    """What must agree for the weights to mean the same: architecture, vocabulary, tokenizer."""
    config: dict[str, JsonValue]
    """The resolved configuration of the run."""
    state: dict[str, JsonValue]
    """The state of training: schedule, data position, batch ramp-up."""
    engine: EngineState
    validation_loss: float | None
    block_bytes: Annotated[int, Field(ge=4, le=2**30, multiple_of=ELEMENT_BYTES)]
    shards: tuple[Shard, ...]
    parameters: dict[str, ParameterEntry]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return KINDS if self.has_optimizer else KINDS[:1]

    @property
    def has_optimizer(self) -> bool:
        return all(shard.optimizer is not None for shard in self.shards)

    def files(self) -> Iterator[FileEntry]:
        """Yield every tensor file."""
        for shard in self.shards:
            yield shard.weights
            if shard.optimizer is not None:
                yield shard.optimizer

    def file(self, fragment: Fragment, kind: Kind) -> FileEntry:
        """Return the file that holds `kind` of `fragment`."""
        shard = self.shards[fragment.shard]
        entry = shard.weights if kind == "weight" else shard.optimizer
        assert entry is not None, "the optimizer state was dropped"
        return entry

    def tensors_in(self, file: FileEntry) -> list[str]:
        """Return the names of the tensors that `file` holds a piece of."""
        shard = next(index for index, shard in enumerate(self.shards) if file in (shard.weights, shard.optimizer))
        kinds = KINDS[:1] if file == self.shards[shard].weights else KINDS[1:]
        held = [name for name, entry in self.parameters.items() if any(f.shard == shard for f in entry.fragments)]
        return [tensor_key(name, kind) for kind in kinds for name in held]

    def problems(self) -> list[str]:
        """Return everything that contradicts itself: slices outside a tensor, elements held twice or nowhere."""
        found = [
            f"{name}: {problem}"
            for name, entry in self.parameters.items()
            if (problem := self._problem_of(entry)) is not None
        ]
        names = [entry.name for entry in self.files()]
        if len(set(names)) != len(names):
            found.append("a file is listed twice")
        return found

    def _problem_of(self, entry: ParameterEntry) -> str | None:
        if entry.axis is not None and entry.axis >= len(entry.shape):
            return f"no axis {entry.axis} in a tensor of shape {list(entry.shape)}"
        for fragment in entry.fragments:
            if (problem := self._fragment_problem(entry, fragment)) is not None:
                return problem
        if len({fragment.shard for fragment in entry.fragments}) != len(entry.fragments):
            return "two fragments in one shard"
        return find_gap(entry.shape, [entry.region(fragment) for fragment in entry.fragments])

    def _fragment_problem(self, entry: ParameterEntry, fragment: Fragment) -> str | None:
        if fragment.shard >= len(self.shards):
            return f"shard {fragment.shard} is not listed"
        if fragment.slice is not None:
            if entry.axis is None:
                return "a slice of a parameter that has no sharded axis"
            if not fragment.slice[0] < fragment.slice[1] <= entry.shape[entry.axis]:
                return f"slice {list(fragment.slice)} of axis {entry.axis} of {list(entry.shape)}"
        extent = math.prod(entry.region(fragment).box_shape)
        if not fragment.range[0] < fragment.range[1] <= extent:
            return f"range {list(fragment.range)} of a slice of {extent} elements"
        needed = -(-fragment.count * ELEMENT_BYTES // self.block_bytes)
        kinds = KINDS if self.shards[fragment.shard].optimizer is not None else KINDS[:1]
        if {kind: len(blocks) for kind, blocks in fragment.blocks.items()} != dict.fromkeys(kinds, needed):
            return f"the checksums do not fit {fragment.count} elements of {', '.join(kinds)}"
        return None


def tensor_key(name: str, kind: Kind) -> str:
    """Return the name of a parameter's tensor inside a file."""
    return name if kind == "weight" else f"{kind}/{name}"


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the file's bytes: a first line with the checksum of all that follows, then the rest of the object."""
    rest = manifest.model_dump_json().encode()[1:]
    return _first_line(rest) + rest


def _first_line(rest: bytes) -> bytes:
    return b'{"checksum": "%s",\n' % checksum(rest).encode()


def read_manifest(path: Path | str) -> Manifest:
    """Read the manifest of the checkpoint folder `path`.

    Raises CheckpointError if there is none, if a byte of it has changed, or if it contradicts itself.
    """
    file = Path(path) / FILE_NAME
    data = _read_plain_file(file)
    end_of_first_line = data.find(b"\n") + 1
    rest = data[end_of_first_line:]
    if data[:end_of_first_line] != _first_line(rest):
        raise CheckpointError(f"{file} is damaged: its checksum does not match; use another checkpoint")
    try:
        manifest = Manifest.model_validate_json(b"{" + rest)
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{file} is not a manifest this version can read: {where}: {first['msg']} "
            f"({error.error_count()} problems in all)"
        ) from error
    if problems := manifest.problems():
        raise CheckpointError(*(f"{file}: {problem}" for problem in problems[:10]))
    return manifest


def _read_plain_file(file: Path) -> bytes:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            data = stream.read(MAXIMUM_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}): a folder without its manifest is no checkpoint"
        ) from error
    if len(data) > MAXIMUM_BYTES:
        raise CheckpointError(f"{file} is larger than {MAXIMUM_BYTES:,} bytes: not a manifest")
    return data
