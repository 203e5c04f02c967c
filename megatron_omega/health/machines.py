"""Every device does a product, a copy and a turn of a ring before the start; one far slower than the others is named.

One slow device slows a run of thousands. Products and copies, done for some tenths of a second without a pause (a
device that is throttled is fast at first), say it of a rank. A turn of the ring, in which every rank sends to the next
and hears from the one before, says it of the link between two hosts: where both links of a host are slow, it is the
cause.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist

from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.places import Places

_REPEATS = 5
_ROUNDS, _ROUND_SECONDS = 3, 0.15
_SIDE = {"cpu": 256, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""
_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Copied, and sent around the ring."""


class Seconds(NamedTuple):
    """What one rank took for one of each."""

    product: float
    copy: float
    ring: float
    """From the start of a turn to the end of what came from the rank before; the fastest of some."""


def measure(device: torch.device) -> Seconds:
    """Measure this rank. Collective."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    matrix = torch.ones(_SIDE[device.type], _SIDE[device.type], dtype=dtype, device=device)
    source = torch.zeros(_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Seconds(
        _sustained(lambda: matrix @ matrix, device),
        _sustained(lambda: target.copy_(source), device),
        _fastest(lambda: _turn(source, target), device) if dist.is_initialized() else 0.0,
    )


def _turn(source: torch.Tensor, target: torch.Tensor) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    transfers = [
        dist.P2POp(dist.isend, source, (rank + 1) % size),
        dist.P2POp(dist.irecv, target, (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(transfers):
        work.wait()


def _sustained(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of `action` in the best of some rounds in which it is done again and again."""
    _seconds(action, device)  # loads kernels
    return min(_mean_seconds(action, device) for _ in range(_ROUNDS))


def _mean_seconds(action: Callable[[], object], device: torch.device) -> float:
    began, count = time.perf_counter(), 0
    while (past := time.perf_counter() - began) < _ROUND_SECONDS or not count:
        _seconds(action, device)
        count += 1
    return past / count


def _fastest(action: Callable[[], object], device: torch.device) -> float:
    _seconds(action, device)  # connects
    return min(_seconds(action, device) for _ in range(_REPEATS))


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    action()
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def slow_hosts(everyone: Sequence[Seconds], hosts: Sequence[str], factor: float) -> dict[str, str]:
    """Return the hosts that are slower than `factor` times the median of all ranks, with what is slow there.

    >>> usual = Seconds(1.0, 1.0, 1.0)
    >>> slow_hosts([usual, usual, usual, Seconds(1.0, 2.5, 1.0)], ["n1", "n2", "n3", "n4"], 1.5)
    {'n4': 'a copy takes 2.5 times the median'}
    """
    found: dict[str, str] = {}
    for name, what in (("product", "a product"), ("copy", "a copy")):
        values = [getattr(one, name) for one in everyone]
        usual = statistics.median(values)
        for host, value in zip(hosts, values, strict=True):
            if value > factor * usual and host not in found:
                found[host] = f"{what} takes {value / usual:.1f} times the median"
    return found | dict.fromkeys(_badly_connected(everyone, hosts, factor), "messages to and from it are slow")


def _badly_connected(everyone: Sequence[Seconds], hosts: Sequence[str], factor: float) -> list[str]:
    """Return the hosts both of whose links to others are slow; nobody where two slow links are no minority."""
    links = [(hosts[rank - 1], hosts[rank], everyone[rank].ring) for rank in range(len(hosts))]
    between = [link for link in links if link[0] != link[1]]
    if len(between) < 5:
        return []
    usual = statistics.median(seconds for *_, seconds in between)
    ends = Counter(host for *pair, seconds in between if seconds > factor * usual for host in pair)
    return [host for host, count in ends.items() if count >= 2]


def find_slow_hosts(places: Places, peers: Peers, device: torch.device, factor: float) -> dict[str, str]:
    """Measure all ranks and return the slow hosts, the same everywhere. Collective."""
    mine = measure(device)
    everyone = [Seconds(*cast(list[float], values)) for values in peers.exchange(list(mine))]
    return slow_hosts(everyone, places.hosts, factor)
