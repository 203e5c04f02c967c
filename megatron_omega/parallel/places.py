"""Every rank's host and place in the grid, in words."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_omega.config.layout import Layout
from megatron_omega.parallel.exchange import Peers


@dataclass(frozen=True)
class Places:
    """The ranks of a run and the hosts they are on."""

    layout: Layout
    hosts: Sequence[str]

    def name(self, rank: int) -> str:
        """Return `rank 3 (pp 0, dp 1, tp 1) on n1`."""
        return f"rank {rank} ({self.layout.coordinate(rank)}) on {self.hosts[rank]}"


def gather_places(layout: Layout, peers: Peers) -> Places:
    """Return the places of all ranks. Collective."""
    return Places(layout, [str(host) for host in peers.exchange(socket.gethostname())])
