"""Filling the weights of a live engine from named tensors that are no checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pydantic import JsonValue
from torch import Tensor

from megatron_omega.checkpoint.live_state import Binding, require_same_parameters
from megatron_omega.parallel.regions import copy_overlap, whole


class InitialWeights(Protocol):
    """Whole parameters by their canonical names, and which model they are of."""

    path: Path

    @property
    def identity(self) -> dict[str, JsonValue]: ...

    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...

    def close(self) -> None: ...


def fill_weights(binding: Binding, weights: InitialWeights) -> None:
    """Fill what this rank owns of the masters; each parameter is read once, in turn.

    Raises CheckpointError, with every parameter that differs, or if one cannot be read.
    """
    saved = {name: weights.shape(name) for name in weights.names()}
    require_same_parameters(weights.path, saved, binding.shapes)
    for mine in sorted(binding.holdings, key=lambda mine: mine.info.name):
        values = weights.tensor(mine.info.name).reshape(-1).float()
        region = mine.holding.region
        copied = copy_overlap(values, whole(region.shape), mine.part(mine.flat), region)
        assert copied == mine.count, f"{copied} of {mine.count} elements of {mine.info.name} filled"
