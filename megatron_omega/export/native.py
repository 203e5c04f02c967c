"""Weights to hand on: safetensors, an omega.json that explains them, the tokenizer. No optimizer, no layout.

    model.safetensors                       or model-00001-of-00003.safetensors ... with model.safetensors.index.json
    omega.json                              settings, for every parameter its shape, file and checksum, and its own sum
    tokenizer.model                         SentencePiece
    README.md                               what the numbers mean (`export_card`)
    config.json, tokenizer.json, *.py, ...  what Transformers loads it by (`hugging_face.exporting`)

Tensors have the names and shapes that Transformers wants (`hugging_face.names`); this reader gives them their canonical
ones. Exports of version 1 have canonical ones, and are described by config.json. An export exists whole or not at all:
it is written into a hidden folder that is renamed at the end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_omega.checkpoint.manifest import Manifest
from megatron_omega.checkpoint.tensor_file import checksum
from megatron_omega.checkpoint.writer import HIDDEN_PREFIX, sync_folder, write_durably
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import CheckpointError
from megatron_omega.export.card import model_card
from megatron_omega.export.hugging_face.exporting import hub_files
from megatron_omega.export.hugging_face.names import stored_name, stored_shape
from megatron_omega.host import run_folder
from megatron_omega.host.regular_files import open_regular, read_regular

DESCRIPTION_NAME = "omega.json"
FIRST_DESCRIPTION_NAME = "config.json"
"""Of version 1."""
TOKENIZER_NAME = run_folder.TOKENIZER
CARD_NAME = "README.md"
INDEX_NAME = "model.safetensors.index.json"
FORMAT = "megatron-omega-export"
_WHAT_TO_DO = "export it again, or megatron-omega import-hf it if it was trained on since"
_MOST_HEADER_BYTES = 100_000_000
"""As safetensors itself has it."""
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class HasSettings(Protocol):
    """A checkpoint, or an export."""

    path: Path

    @property
    def config(self) -> dict[str, JsonValue]: ...


class Exportable(HasSettings, Protocol):
    """Weights to be written: a checkpoint's, or those of one with its adapters merged into them."""

    manifest: Manifest

    def tensor(self, name: str) -> Tensor: ...


class ExportedParameter(BaseModel):
    """One parameter of an export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    file: str
    checksum: str
    """XXH3 (64 bit) of its bytes."""


class ExportDescription(BaseModel):
    """The content of omega.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: Literal["gpt-omega"]
    format: Literal["megatron-omega-export"]
    version: Literal[1, 2]
    """1: without checksum, tensors under canonical names, in canonical shapes."""
    checksum: str = ""
    """XXH3 (64 bit) of everything else here, as compact JSON with sorted keys."""
    dtype: Literal["fp32", "bf16"]
    step: int
    """Optimizer steps the weights have seen."""
    identity: dict[str, JsonValue]
    """Architecture, and the SHA-256 of the tokenizer."""
    config: dict[str, JsonValue]
    """Every setting of the run."""
    parameters: dict[str, ExportedParameter]
    headers: dict[str, str] = {}
    """XXH3 (64 bit) of the header of each safetensors file, with its length; since version 2."""


def write_export(
    target: Path, source: Exportable, tokenizer: Tokenizer, *, dtype: Literal["fp32", "bf16"], shard_bytes: int
) -> ExportDescription:
    """Write the weights of `source` into the new folder `target`, one file after the other.

    Args:
        shard_bytes: a file gets no further tensor when it holds that much; also the memory this takes.

    Raises:
        CheckpointError: the folder exists, cannot be written, or the checkpoint is damaged.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; choose a new folder, an export is never mixed with something else")
    staging = target.with_name(f"{HIDDEN_PREFIX}{target.name}-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        description = _write(staging, source, tokenizer, dtype, shard_bytes)
        sync_folder(staging)
        staging.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}; free space or choose a place") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return description


def _write(
    folder: Path, source: Exportable, tokenizer: Tokenizer, dtype: Literal["fp32", "bf16"], shard_bytes: int
) -> ExportDescription:
    config = settings_of(source)
    parameters: dict[str, ExportedParameter] = {}
    headers: dict[str, str] = {}
    shards = list(_shards(source, DTYPES[dtype].itemsize, shard_bytes))
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: source.tensor(name).to(DTYPES[dtype]) for name in names}
        stored = {stored_name(name): tensor.view(stored_shape(name, tensor.shape)) for name, tensor in tensors.items()}
        save_file(stored, folder / file, metadata={"format": "pt"})
        publish(folder / file)
        headers[file] = _header_checksum(folder / file)
        for name, tensor in tensors.items():
            parameters[name] = ExportedParameter(shape=tuple(tensor.shape), file=file, checksum=_checksum(tensor))
    manifest = source.manifest
    description = ExportDescription(
        model_type="gpt-omega", format=FORMAT, version=2, dtype=dtype, step=manifest.step,
        identity=manifest.identity, config=manifest.config, parameters=parameters, headers=headers,
    )  # fmt: skip
    if len(shards) > 1:
        write_durably(folder / INDEX_NAME, json.dumps(_index(description), indent=2).encode())
    for name, content in hub_files(config, tokenizer, dtype).items():
        write_durably(folder / name, content)
    write_durably(folder / TOKENIZER_NAME, tokenizer.model)
    write_durably(folder / CARD_NAME, model_card(dtype, config.model, len(shards)).encode())
    description = description.model_copy(update={"checksum": _own_checksum(description)})
    write_durably(folder / DESCRIPTION_NAME, description.model_dump_json(indent=2).encode())
    return description


def settings_of(weights: HasSettings) -> RunConfig:
    """Return the settings that weights were trained with. Raises CheckpointError where this version knows others."""
    try:
        return RunConfig.model_validate(weights.config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{weights.path} was written with settings that this version does not know ({place}: {first['msg']}); "
            "use the version that wrote it"
        ) from None


def _own_checksum(description: ExportDescription) -> str:
    values = description.model_dump(mode="json", exclude={"checksum"})
    return checksum(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())


def publish(path: Path) -> None:
    """Flush a file to the disk; let those read it who may read its folder (safetensors lets its owner alone)."""
    path.chmod(path.parent.stat().st_mode & 0o666)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _shards(source: Exportable, element_bytes: int, shard_bytes: int) -> Iterator[list[str]]:
    """Yield the names that share a file."""
    names: list[str] = []
    size = 0
    for name, entry in source.manifest.parameters.items():
        num_bytes = math.prod(entry.shape) * element_bytes
        if names and size + num_bytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _index(description: ExportDescription) -> dict[str, Any]:
    element = DTYPES[description.dtype].itemsize
    total = sum(math.prod(parameter.shape) * element for parameter in description.parameters.values())
    weight_map = {stored_name(name): parameter.file for name, parameter in description.parameters.items()}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _checksum(tensor: Tensor) -> str:
    return checksum(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _header_checksum(path: Path) -> str:
    """Return the checksum of what a safetensors file says before its tensors. Raises OSError."""
    with os.fdopen(open_regular(path), "rb") as file:
        length = file.read(8)
        size = int.from_bytes(length, "little")
        return checksum(length + (file.read(size) if size <= _MOST_HEADER_BYTES else b""))


class ExportReader:
    """An open export."""

    def __init__(self, path: Path, description: ExportDescription) -> None:
        self.path = path
        self.description = description
        self._files = ExitStack()
        self._opened: dict[str, Any] = {}

    @property
    def config(self) -> dict[str, JsonValue]:
        """The resolved configuration of the run that made the weights."""
        return self.description.config

    @property
    def identity(self) -> dict[str, JsonValue]:
        """Architecture and tokenizer."""
        return self.description.identity

    def names(self) -> tuple[str, ...]:
        """Return the canonical names of all parameters."""
        return tuple(self.description.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the description gives a parameter."""
        return self.description.parameters[name].shape

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as it is stored. Raises CheckpointError where it is missing or a byte has changed."""
        entry = self.description.parameters[name]
        is_first = self.description.version == 1
        key, shape = (name, entry.shape) if is_first else (stored_name(name), stored_shape(name, entry.shape))
        try:
            if entry.file not in self._opened:
                self._require_header(entry.file)
                file = safe_open(self.path / entry.file, framework="pt")
                self._opened[entry.file] = self._files.enter_context(file)
            tensor: Tensor = self._opened[entry.file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / entry.file} cannot be read ({error}); tensor {name}") from None
        if tuple(tensor.shape) != shape or _checksum(tensor) != entry.checksum:
            raise CheckpointError(f"{self.path / entry.file} has changed bytes; tensor {name}; {_WHAT_TO_DO}")
        return tensor.view(entry.shape)

    def _require_header(self, file: str) -> None:
        wanted = self.description.headers.get(file)
        if self.description.version > 1 and wanted != _header_checksum(self.path / file):
            raise CheckpointError(f"{self.path / file} has changed bytes in its header; {_WHAT_TO_DO}")

    def part(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Return [start, stop) along `axis`. All of the tensor is read, since the checksum is of all of it."""
        return self.tensor(name).narrow(axis, start, stop - start).clone()

    def close(self) -> None:
        """Close all files."""
        self._opened.clear()
        self._files.close()


def is_export(path: Path) -> bool:
    """Tell whether `path` is the folder of an export."""
    return _description_file(path) is not None


def _description_file(path: Path) -> Path | None:
    for name in (DESCRIPTION_NAME, FIRST_DESCRIPTION_NAME):
        with suppress(OSError):
            if f'"{FORMAT}"' in read_regular(path / name).decode(errors="replace")[:400]:
                return path / name
    return None


def _require_own_files(folder: Path, names: set[str]) -> None:
    """Raise CheckpointError where a file of an export is a link out of its folder, or no regular file."""
    for name in sorted(names):
        path = folder / name
        if path.exists() and (path.resolve().parent != folder.resolve() or not path.is_file()):
            raise CheckpointError(f"{path} is a link out of the export, or no regular file; do not use it")


def open_export(path: Path | str) -> ExportReader:
    """Open the export in the folder `path`. Raises CheckpointError where what describes it is missing or damaged."""
    file = _description_file(Path(path)) or Path(path) / DESCRIPTION_NAME
    try:
        description = ExportDescription.model_validate_json(read_regular(file))
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise CheckpointError(f"{file} cannot be read ({reason}); export the checkpoint again") from None
    if (description.version == 1) != (file.name == FIRST_DESCRIPTION_NAME):
        raise CheckpointError(f"{file} is not where version {description.version} has it; export the checkpoint again")
    if description.version > 1 and description.checksum != _own_checksum(description):
        raise CheckpointError(f"{file} is damaged: its checksum does not match; export the checkpoint again")
    for name, entry in description.parameters.items():
        if Path(entry.file).name != entry.file or "\0" in entry.file:
            raise CheckpointError(f"{file}: {name} is said to be in {entry.file!r}, outside the folder; do not use it")
    _require_own_files(Path(path), {file.name, TOKENIZER_NAME} | {e.file for e in description.parameters.values()})
    return ExportReader(Path(path), description)
