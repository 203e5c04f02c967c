"""Adapters and the weights they stand beside: a checkpoint of adapters holds what is trained alone, and names its base.

What is frozen is held as working weights alone, without masters or moments; it is filled from the base at every start.
What is trained and the base has too begins there (`lora.also`).
The base is known by the checksums of its weights, so that adapters never meet others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from pydantic import JsonValue

from megatron_omega.checkpoint.catalogue import newest_whole, require_identity
from megatron_omega.checkpoint.live_state import Binding
from megatron_omega.checkpoint.manifest import Manifest
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.checkpoint.tensor_file import checksum
from megatron_omega.config.schema import LoraConfig
from megatron_omega.engine.internals import frozen_holdings, placing_frozen
from megatron_omega.errors import CheckpointError

IDENTITY = "lora"
"""Key of the identity of adapters; a checkpoint of a whole model has none."""


@dataclass(frozen=True)
class Base:
    """Where a run with adapters starts."""

    weights: Path
    """Checkpoint of the whole model."""
    fingerprint: str
    """Of its weights."""
    adapters: Path | None = None
    """Checkpoint of adapters to go on from."""


def has_adapters(manifest: Manifest) -> bool:
    """Tell whether a checkpoint holds adapters and nothing else."""
    return IDENTITY in manifest.identity


def fingerprint(manifest: Manifest) -> str:
    """Return what tells the weights of a checkpoint from all others: a checksum of their checksums and places."""
    held = {
        name: [entry.shape, [[part.slice, part.range, part.blocks["weight"]] for part in entry.fragments]]
        for name, entry in sorted(manifest.parameters.items())
    }
    return checksum(json.dumps(held).encode())


def find_base(path: Path | str) -> Base:
    """Return what the checkpoint at `path` says of where to start: itself, or the base of its adapters.

    Raises CheckpointError if either is missing or damaged, or if the base is no longer the one of the adapters.
    """
    folder = newest_whole(Path(path))
    manifest = _manifest(folder)
    if not has_adapters(manifest):
        return Base(folder, fingerprint(manifest))
    own = cast(Mapping[str, JsonValue], manifest.identity[IDENTITY])
    section = cast(Mapping[str, JsonValue], manifest.config.get("checkpoint", {}))
    place = Path(str(section.get("load")))
    try:
        found = newest_whole(place)
    except CheckpointError as error:
        raise CheckpointError(f"the base of the adapters in {folder} is not there: {error}") from None
    base = find_base(found)
    if base.fingerprint != own.get("base"):
        raise CheckpointError(
            f"{base.weights} is not what the adapters in {folder} were trained beside: its weights are others; bring "
            "that checkpoint back"
        )
    return Base(base.weights, base.fingerprint, folder)


def adapter_identity(lora: LoraConfig, base: Base) -> dict[str, JsonValue]:
    """Return what a checkpoint of adapters must share with a run, beside model and tokenizer."""
    targets: list[JsonValue] = [*sorted(lora.targets)]
    also: dict[str, JsonValue] = {"also": [*sorted(lora.also)]} if lora.also else {}
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": targets, "base": base.fingerprint, **also}


def fill_from_base(binding: Binding, path: Path, identity: Mapping[str, JsonValue]) -> None:
    """Fill all weights of an engine but the adapters from the checkpoint `path` of a model of this identity.

    Raises CheckpointError if it is another model's, or damaged.
    """
    with open_checkpoint(path) as reader:
        whole = {name: value for name, value in identity.items() if name != IDENTITY}
        require_identity(path, reader.manifest, whole)
        with placing_frozen(binding.engine):
            for mine in frozen_holdings(binding.engine):
                values = torch.empty(mine.count)
                reader.read_into(values, mine.info.name, "weight", mine.region)
                mine.working().copy_(values)
        own = {*reader.names()}
        for mine in binding.holdings:
            if mine.info.name in own:
                values = torch.empty(mine.count)
                reader.read_into(values, mine.info.name, "weight", mine.holding.region)
                mine.part(mine.flat).copy_(values)


def _manifest(folder: Path) -> Manifest:
    with open_checkpoint(folder) as reader:
        return reader.manifest
