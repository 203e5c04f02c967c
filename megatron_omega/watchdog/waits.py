"""Who waits for whom, from the messages that every rank has counted. Pure functions of numbers; reads no stacks.

A rank that has joined more messages of a group than another waits for it there, or will as soon as it looks. The
culprit is waited for and waits for nobody. On a GPU a host runs ahead of its device, so stacks alone cannot say this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_omega.watchdog.ledger import Row


@dataclass(frozen=True)
class Missed:
    """A message that others wait in and a rank has not come to."""

    row: Row
    """As the foremost of the others know it."""
    waiting: tuple[int, ...]
    by_device: bool = False
    """Whether its host has come, but not its device."""


@dataclass(frozen=True)
class Verdict:
    """Who the others wait for, and in what; nobody where that cannot be told."""

    missed: Mapping[int, Missed]
    circle: tuple[int, ...] = ()
    """Ranks that wait for each other, one for the next and the last for the first: they do not agree on the order."""


Waits = dict[int, dict[int, Missed]]
"""Rank that waits -> rank it waits for -> message."""


def find_culprits(
    rows: Mapping[int, Sequence[Row]], stuck_in_a_wait: Collection[int], before_device: Collection[int] = ()
) -> Verdict:
    """Say who the ranks wait for.

    Args:
        rows: what each rank has counted.
        stuck_in_a_wait: ranks that are known to wait: in a message, or before a device that is not done.
        before_device: those of them whose device is not done. It may itself be what all wait for.
    """
    waits = _host_waits(_by_name(rows), stuck_in_a_wait)
    awaited = {rank for targets in waits.values() for rank in targets}
    idle, last = awaited - set(stuck_in_a_wait), awaited - set(waits)
    # A stack goes before counts: a message may have left a rank that has gone on, and some waits are not counted.
    guilty = idle & last or idle or (set() if before_device else last)
    if guilty:
        return Verdict({rank: _missed(waits, rank) for rank in sorted(guilty)})
    at_devices = _device_waits(_by_name(rows)) if before_device else {}
    under_way = {rank for rank, known in rows.items() if any(row.is_under_way for row in known)}
    guilty = {rank for targets in at_devices.values() for rank in targets} - under_way
    if guilty:
        return Verdict({rank: _missed(at_devices, rank) for rank in sorted(guilty)})
    return Verdict({}, () if before_device or not waits else _circle(waits))


_Members = dict[str, dict[int, Row]]
"""Name -> rank -> what it knows of it."""


def _by_name(rows: Mapping[int, Sequence[Row]]) -> _Members:
    by_name: _Members = defaultdict(dict)
    for rank, known in rows.items():
        for row in known:
            by_name[row.name][rank] = row
    for name, members in by_name.items():
        for rank in ends(name):
            if rank in rows:
                members.setdefault(rank, Row(name, "", 0))
    return by_name


def _host_waits(by_name: _Members, stuck_in_a_wait: Collection[int]) -> Waits:
    """Return who waits for whom by what the hosts have joined. What was only sent may have left its sender."""
    waits: Waits = defaultdict(dict)
    for name, members in by_name.items():
        sender = ends(name)[:1]
        waiting = [rank for rank in sorted(members) if (rank,) != sender or rank in stuck_in_a_wait]
        counts = {rank: row.count for rank, row in members.items()}
        _note_waits(waits, members, waiting, counts, by_device=False)
    return waits


def _device_waits(by_name: _Members) -> Waits:
    """Return who waits for whom by what the devices have begun."""
    waits: Waits = defaultdict(dict)
    for members in by_name.values():
        waiting = [rank for rank in sorted(members) if members[rank].is_under_way]
        counts = {rank: row.started for rank, row in members.items() if row.started >= 0}
        _note_waits(waits, members, waiting, counts, by_device=True)
    return waits


def _note_waits(
    waits: Waits, members: Mapping[int, Row], waiting: Sequence[int], counts: Mapping[int, int], *, by_device: bool
) -> None:
    foremost = max(waiting, key=counts.__getitem__, default=None)
    for rank, count in counts.items():
        ahead = tuple(other for other in waiting if counts[other] > count)
        if foremost is not None and ahead:
            missed = Missed(members[foremost], ahead, by_device)
            for waiter in ahead:
                waits[waiter][rank] = missed


def ends(name: str) -> tuple[int, ...]:
    """Return the two ranks of a direction; nothing for a group.

    >>> ends("12:3>5"), ends("12")
    ((3, 5), ())
    """
    _, _, pair = name.partition(":")
    parts = pair.split(">")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(map(str.isdigit, parts)) else ()


def _missed(waits: Waits, rank: int) -> Missed:
    """Return the message in which most wait for a rank."""
    return max((targets[rank] for targets in waits.values() if rank in targets), key=lambda one: len(one.waiting))


def _circle(waits: Waits) -> tuple[int, ...]:
    """Return ranks that wait for each other in a circle, where every rank that is waited for waits itself."""
    path: list[int] = [min(waits)]
    while (following := min(waits[path[-1]])) not in path:
        path.append(following)
    return tuple(path[path.index(following) :])
