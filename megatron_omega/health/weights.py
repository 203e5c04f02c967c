"""Silent faults: weights that must be equal on several ranks, and are not.

Every step, just before the optimizer moves them, each rank adds a checksum of the weights that its forward and
backward passes have used to a running sum: local work, no message. At an interval the sums are compared. So a bit that
flipped in any step since is found, even where ZeRO has overwritten it meanwhile with what the owner's master says.

Compared are, for each owner of a ZeRO-1/2 partition, the working weights on every replica and the cast of the owner's
master: three copies or more, so that the wrong one can be told. And the parameters that tensor-parallel ranks hold
alike, over tensor x data. Under ZeRO-3 a rank's shard is compared with its master. Not seen: flips in a master's bits
below the working precision, and flips in moments.

What is added is a checksum weighted by the step (health/checksums.py), some ten kernels in all.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omega.config.layout import Coordinate, Layout
from megatron_omega.engine.internals import replicated_weights, weight_copies
from megatron_omega.health.checksums import row_checksums, total_checksum
from megatron_omega.parallel.places import Places
from megatron_omega.parallel.topology import Group, Topology
from megatron_omega.training.state import Fault


class Copy(NamedTuple):
    """One copy of some weights."""

    rank: int
    is_master: bool = False


def odd_ones(copies: Mapping[Copy, int]) -> list[Copy]:
    """Return the copies that differ from the most common value; all of them if none is the most common."""
    counts = Counter(copies.values()).most_common(2)
    if len(counts) == 1:
        return []
    if counts[0][1] == counts[1][1]:
        return list(copies)
    return [copy for copy, value in copies.items() if value != counts[0][0]]


def differing(sums: Tensor, layout: Layout, *, has_masters: bool, is_sharded: bool) -> list[Copy]:
    """Return the copies that are wrong, or among which a wrong one cannot be told; empty where all agree.

    `sums` is int64 [world size, owners + 2]: a row holds a rank's sums of the working weights of every data-parallel
    owner's part (only the own one counts with `is_sharded`, ZeRO-3), of the own master, and of the parameters that
    tensor-parallel ranks hold alike. Copies are looked at one by one only where some differ.
    """
    grid = sums.view(layout.pipeline, layout.data, layout.tensor, -1)
    owners = grid.shape[-1] - 2
    own = grid[..., :owners].diagonal(dim1=1, dim2=3)  # [pipeline, tensor, owners]: what each owner says of its part
    masters = grid[:, :owners, :, -2].transpose(1, 2) if has_masters else own
    suspicious = own != masters
    if not is_sharded:
        suspicious |= (grid[..., :owners] != own.unsqueeze(1)).any(dim=1)
    found: list[Copy] = []
    for pipeline, tensor, owner in suspicious.nonzero().tolist():
        holders = [owner] if is_sharded else range(layout.data)
        ranks = [layout.rank(Coordinate(pipeline, holder, tensor)) for holder in holders]
        copies = {Copy(rank): int(sums[rank, owner]) for rank in ranks}
        if has_masters:
            owning_rank = layout.rank(Coordinate(pipeline, owner, tensor))
            copies[Copy(owning_rank, is_master=True)] = int(sums[owning_rank, -2])
        found += odd_ones(copies)
    if found or layout.tensor == 1:
        return list(dict.fromkeys(found))
    alike = sums[:, -1].view(-1, layout.tensor if is_sharded else layout.tensor * layout.data)
    for group in (alike != alike[:, :1]).any(dim=1).nonzero().flatten().tolist():
        first = group * alike.shape[1]
        found += odd_ones({Copy(first + index): int(value) for index, value in enumerate(alike[group])})
    return found


def all_agree(mine: Tensor, topology: Topology, *, has_masters: bool, is_sharded: bool) -> bool:
    """Return whether `differing` would find nothing, by messages as long as one row: collective, the same everywhere.

    `mine` is this rank's row. A replica's working sums must be equal all over the data-parallel group, and each
    owner's equal to its master's; what tensor-parallel ranks hold alike must be equal over both axes.
    """
    owners, owner = len(mine) - 2, topology.data.rank
    agrees = mine.new_ones(1)
    if has_masters and owner < owners:
        agrees *= mine[owner] == mine[-2]
    if not is_sharded:
        agrees *= _is_equal_over(mine[:owners], topology.data)
    agrees *= _is_equal_over(mine[-1:], topology.tensor)
    if not is_sharded:
        agrees *= _is_equal_over(mine[-1:], topology.data)
    if topology.layout.world_size > 1:
        dist.all_reduce(agrees, dist.ReduceOp.MIN)
    return bool(agrees)


def _is_equal_over(values: Tensor, group: Group) -> Tensor:
    """Return whether every rank of the group has the same values: 0-dim bool. Collective in the group."""
    if group.size == 1:
        return values.new_ones((), dtype=torch.bool)
    extremes = torch.stack([values, ~values])  # the complement of a maximum of complements is a minimum
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group.handle)
    return (extremes[0] == ~extremes[1]).all()


def describe_difference(wrong: Sequence[Copy], places: Places) -> str:
    """Return one sentence that names who is wrong."""
    ranks = sorted({copy.rank for copy in wrong})
    kinds = {copy.is_master for copy in wrong}
    what = "weights" if len(kinds) > 1 else "master weights" if kinds == {True} else "working weights"
    names = ", ".join(places.name(rank) for rank in ranks)
    if len(ranks) == 1:
        return f"the {what} of {names} differ from every other copy: a silent fault of that machine"
    return f"the {what} of {names} differ, and no other copy tells which of them are wrong: a silent fault of a machine"


class Integrity:
    """Watches the weights of an engine. Every rank has one, and calls it at the same places."""

    def __init__(self, engine: Any, topology: Topology, places: Places, *, interval_steps: int) -> None:
        """`engine` is DeepSpeed's, whose optimizer's steps are watched from now on."""
        self.interval_steps = interval_steps
        self._engine, self._topology, self._places = engine, topology, places
        self._sums: Tensor | None = None
        self._steps = 0
        step = engine.optimizer.step

        def watched(*arguments: Any, **options: Any) -> Any:
            self._add()
            return step(*arguments, **options)

        engine.optimizer.step = watched

    def find_fault(self) -> Fault | None:
        """Compare what was used since the last call; return what differs. Collective, the same answer everywhere."""
        mine = self._sums
        if mine is None:
            return None
        steps, copies = self._steps, weight_copies(self._engine)
        self.forget()
        kinds = {"has_masters": bool(copies.masters), "is_sharded": copies.is_sharded}
        if all_agree(mine, self._topology, **kinds):
            return None
        everyone = mine.new_empty(self._topology.layout.world_size, len(mine))
        if dist.is_initialized():
            dist.all_gather(list(everyone.unbind()), mine)
        else:
            everyone[0] = mine
        wrong = differing(everyone.cpu(), self._topology.layout, **kinds)
        if not wrong:
            return None
        ranks = tuple(sorted({copy.rank for copy in wrong}))
        hosts = sorted({self._places.hosts[rank] for rank in ranks})
        message = describe_difference(wrong, self._places)
        return Fault("silent_fault", message, ranks, {"hosts": hosts, "within_steps": steps})

    def forget(self) -> None:
        """Begin anew: the weights have been replaced, or compared."""
        self._sums, self._steps = None, 0

    @torch.no_grad()
    def _add(self) -> None:
        copies = weight_copies(self._engine)
        held = torch.zeros(copies.owners + 2, dtype=torch.int64, device=self._engine.device)
        working, master, alike = held[: copies.owners], held[-2], held[-1]
        for rows in copies.rows:
            working += row_checksums(rows)
        _add_to(working[copies.owner], total_checksum(copies.own))
        if copies.rows:
            for of, row in copies.masters:
                master += row_checksums(of.to(row.dtype).view(1, -1))[0].to(held.device)
        elif copies.masters:
            masters, weights = zip(*copies.masters, strict=True)
            _add_to(master, total_checksum(masters, weights[0].dtype))
        if self._topology.tensor.size > 1:
            _add_to(alike, total_checksum(replicated_weights(self._engine)))
        row = held * _weight(self._steps)
        self._sums = row if self._sums is None else self._sums + row
        self._steps += 1


def _add_to(total: Tensor, value: Tensor | None) -> None:
    if value is not None:
        total += value.to(total.device)


def _weight(step: int) -> int:
    """Return an odd 64-bit number that depends on `step` alone: a difference cannot cancel over steps."""
    return int.from_bytes(hashlib.blake2b(b"%d" % step, digest_size=8).digest(), "little", signed=True) | 1


def has_copies(engine: Any, layout: Layout) -> bool:
    """Return whether any weight of this run is held twice, so that there is something to compare."""
    return layout.data * layout.tensor > 1 or bool(weight_copies(engine).masters)
