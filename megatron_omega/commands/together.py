"""One process, or the ranks that a launcher started: they share a model, a slice each, or they share the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_omega.config.layout import Layout
from megatron_omega.generation.leading import PATIENCE
from megatron_omega.host.environment import complete_environment
from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.tensor_parallel import SERIAL, TensorParallel
from megatron_omega.parallel.topology import create_topology
from megatron_omega.tasks.sharing import ALONE, Share

_SECONDS = 1800  # that one rank waits for another inside a step


@dataclass(frozen=True)
class Together:
    """This process among those that share a model."""

    device: str
    parallel: TensorParallel = SERIAL
    peers: Peers | None = None
    """All of them; None where there is one only."""

    @property
    def is_first(self) -> bool:
        return self.parallel.rank == 0

    def agreed(self, value: Any) -> Any:
        """Return what the first rank has."""
        return value if self.peers is None else self.peers.agree(value)


@contextmanager
def join(device: str) -> Iterator[Together]:
    """Meet the other ranks, if a launcher has started several."""
    place = complete_environment()
    if place.world_size == 1:
        yield Together(device)
        return
    from megatron_omega.engine.start import start_distributed  # takes seconds, which one process need not wait

    start_distributed(local_rank=place.local_rank, timeout_seconds=_SECONDS)
    topology = create_topology(Layout(tensor=place.world_size))
    own_device = f"cuda:{place.local_rank}" if device == "cuda" else device
    try:
        yield Together(own_device, topology.tensor_parallel(sequence_parallel=False), Peers(timeout=PATIENCE))
    finally:
        dist.destroy_process_group()


@contextmanager
def dealing(device: str) -> Iterator[tuple[str, Share]]:
    """Meet the other ranks, each of which has the whole model; yield this one's device and its share of the work."""
    place = complete_environment()
    if place.world_size == 1:
        yield device, ALONE
        return
    from megatron_omega.engine.start import start_distributed

    start_distributed(local_rank=place.local_rank, timeout_seconds=_SECONDS)
    peers = Peers(timeout=PATIENCE)
    try:
        yield (
            f"cuda:{place.local_rank}" if device == "cuda" else device,
            Share(place.rank, place.world_size, peers.exchange),
        )
    finally:
        dist.destroy_process_group()
