"""Adapters merged into their base: a checkpoint that holds adapters alone, read as the whole model it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from torch import Tensor
from typing_extensions import Self

from megatron_omega.checkpoint.adapters import find_base, fingerprint, has_adapters
from megatron_omega.checkpoint.manifest import Manifest
from megatron_omega.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_omega.config.schema import LoraConfig
from megatron_omega.model.adapters import adapter_names, is_adapter, merged


class AdaptedReader:
    """A base and adapters, read as one checkpoint."""

    def __init__(self, base: CheckpointReader, adapters: CheckpointReader) -> None:
        self._base, self._adapters = base, adapters
        self._own = set(adapters.names())
        self.path = adapters.path
        self.folders = (base.path, adapters.path)
        own = adapters.manifest
        config = {name: value for name, value in own.config.items() if name != "lora"}
        self.manifest: Manifest = base.manifest.model_copy(
            update={"step": own.step, "config": config, "state": own.state}
        )
        """The base's, with step and settings of the adapters' run."""

    @property
    def lora(self) -> LoraConfig:
        """Rank, alpha and targets."""
        return LoraConfig.model_validate(self._adapters.config["lora"])

    @property
    def base_fingerprint(self) -> str:
        """Checksum of the weights that the adapters stand beside."""
        return fingerprint(self._base.manifest)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every adapter's parameters, by canonical name, as they were trained."""
        for name in filter(is_adapter, sorted(self._own)):
            yield name, self._adapters.tensor(name)

    @property
    def config(self) -> dict[str, JsonValue]:
        return self.manifest.config

    @property
    def identity(self) -> dict[str, JsonValue]:
        return self.manifest.identity

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def element_count(self) -> int:
        return self._base.element_count()

    def tensor(self, name: str) -> Tensor:
        """Return a weight with its adapter merged in, or as it was trained beside them."""
        if name in self._own:
            return self._adapters.tensor(name)
        weight = self._base.tensor(name)
        a, b = adapter_names(name)
        if a not in self._own:
            return weight
        return merged(weight, self._adapters.tensor(a), self._adapters.tensor(b), self.lora.scale)

    def part(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Return [start, stop) along `axis` of a weight with its adapter merged in."""
        return self.tensor(name).narrow(axis, start, stop - start).clone()

    def close(self) -> None:
        self._base.close()
        self._adapters.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def open_whole(folder: Path) -> CheckpointReader | AdaptedReader:
    """Open a checkpoint as a whole model.

    Raises CheckpointError if it is missing or damaged, or if it holds adapters and their base is not there.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(open_checkpoint(folder))
        if has_adapters(reader.manifest):
            base = stack.enter_context(open_checkpoint(find_base(folder).weights))
            stack.pop_all()
            return AdaptedReader(base, reader)
        stack.pop_all()
        return reader
