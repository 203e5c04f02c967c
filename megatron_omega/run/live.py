"""A run that is under way, as something that measures its model sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_omega.checkpoint.live_weights import LiveWeights
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.sources import Sources
from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.topology import Topology
from megatron_omega.training.loop import Answer


@dataclass(frozen=True)
class LiveRun:
    """What a measurement may ask for."""

    config: RunConfig
    sources: Sources
    topology: Topology
    peers: Peers
    device: torch.device
    weights: Callable[[], LiveWeights]
    """What is trained, as it is now. Collective."""


MakeAnswer = Callable[[LiveRun], Answer]
"""What makes, once for each run, what answers in its validations."""
