"""Which rank writes which elements of a checkpoint: each element once, the load even. Pure arithmetic."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_omega.parallel.regions import Holding


@dataclass(frozen=True)
class Duty:
    """What one rank writes: `count` elements from `offset` on of its holding number `holding`."""

    holding: int
    offset: int
    count: int


def share_writing(held: Sequence[Sequence[Holding]], replica_of_rank: Sequence[int]) -> list[list[Duty]]:
    """Decide which rank writes what, so that every element is written exactly once and the load is even.

    `held[rank]` lists what each rank holds; ranks with equal `replica_of_rank` partition one replica of their
    parameters among themselves (a data-parallel group). A parameter that several replicas hold (a norm on all
    tensor-parallel ranks, the table on the first and last stage) is written by the one with the least to do; ranks
    that hold the very same elements (no ZeRO) share them evenly. Every rank computes the same answer.
    """
    duties: list[list[Duty]] = [[] for _ in held]
    load = [0] * len(held)
    boxes: dict[tuple[str, tuple[int, int]], dict[tuple[int, int], list[tuple[int, int]]]] = defaultdict(dict)
    for rank, holdings in enumerate(held):
        for index, holding in enumerate(holdings):
            replicas = boxes[holding.name, holding.region.box]
            replicas.setdefault((replica_of_rank[rank], holding.copy), []).append((rank, index))

    def elements(replicas: dict[tuple[int, int], list[tuple[int, int]]]) -> int:
        rank, index = next(iter(replicas.values()))[0]
        return math.prod(held[rank][index].region.box_shape)

    for _, replicas in sorted(boxes.items(), key=lambda item: (-elements(item[1]), item[0])):
        members = min(replicas.values(), key=lambda members: max(load[rank] for rank, _ in members))
        for rank, duty in _divide(held, members):
            duties[rank].append(duty)
            load[rank] += duty.count
    return [sorted(mine, key=lambda duty: duty.holding) for mine in duties]


def _divide(held: Sequence[Sequence[Holding]], members: Sequence[tuple[int, int]]) -> list[tuple[int, Duty]]:
    by_interval: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for rank, index in members:
        region = held[rank][index].region
        by_interval[region.first, region.count].append((rank, index))
    parts = []
    for (_, count), owners in sorted(by_interval.items()):
        for place, (rank, index) in enumerate(owners):
            begin, end = count * place // len(owners), count * (place + 1) // len(owners)
            if begin < end:
                parts.append((rank, Duty(index, begin, end - begin)))
    return parts
