"""How many messages of each kind a rank has sent or joined, in memory that it shares with its monitor.

One row for each process group, and one for each direction between two ranks. What a stuck, stopped or busy process
cannot say any more stands here. Ranks count alike: who is behind in a row is who the others wait for.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_omega.host.child_process import anonymous_file

_HEAD = struct.Struct("<qqq")
_ROW = struct.Struct("<q16sqq40s")
_COUNT = struct.Struct("<q16s")
_PROGRESS = struct.Struct("<qq")
_MOST_ROWS = 256
UNKNOWN = -1


@dataclass(frozen=True)
class Row:
    """What a rank knows of the messages of one name."""

    name: str
    """The group's, at most 40 bytes, or `GROUP:3>5` for what rank 3 sends to rank 5."""
    operation: str
    """The last one, as in `allreduce`."""
    count: int
    """Messages that were sent or joined so far, this one too."""
    started: int = UNKNOWN
    """Those that the device has begun, by its own numbers, which are the same on all ranks."""
    finished: int = UNKNOWN
    """Those that it has finished."""

    @property
    def is_under_way(self) -> bool:
        """Whether the device is known to stand in one of them."""
        return self.started > self.finished


class Ledger:
    """A table in an anonymous file. The training process writes, the monitor reads."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _HEAD.size + _MOST_ROWS * _ROW.size)
        self._places: dict[str, int] = {}
        self._counts: dict[str, int] = {}

    @classmethod
    def create(cls) -> Ledger:
        """Make an empty ledger; its file has no name and goes with its last user."""
        return cls(anonymous_file(_HEAD.size + _MOST_ROWS * _ROW.size))

    def open_row(self, name: str) -> None:
        """Begin to count messages of `name`; more rows than fit are left out."""
        number = len(self._places)
        if name in self._places or number == _MOST_ROWS:
            return
        place = self._places[name] = _HEAD.size + number * _ROW.size
        self._counts[name] = 0
        self._memory[place : place + _ROW.size] = _ROW.pack(0, b"", UNKNOWN, UNKNOWN, name.encode())
        _HEAD.pack_into(self._memory, 0, number + 1, self.settled, self.is_busy)

    def count(self, name: str, operation: str) -> None:
        """Note one more message of `name`."""
        if name not in self._places:
            self.open_row(name)
        if (place := self._places.get(name)) is not None:
            self._counts[name] += 1
            _COUNT.pack_into(self._memory, place, self._counts[name], operation.encode())

    def settle(self, progress: Mapping[str, tuple[int, int]], *, is_busy: bool) -> None:
        """Write down what the device says: (started, finished) of each name, and whether it has work left."""
        for name, numbers in progress.items():
            self.open_row(name)
            if (place := self._places.get(name)) is not None:
                _PROGRESS.pack_into(self._memory, place + _COUNT.size, *numbers)
        _HEAD.pack_into(self._memory, 0, len(self._places), self.settled + 1, is_busy)

    @property
    def settled(self) -> int:
        """How often the device has been asked."""
        return _HEAD.unpack_from(self._memory)[1]

    @property
    def is_busy(self) -> bool:
        """Whether the device had work left when it was last asked."""
        return bool(_HEAD.unpack_from(self._memory)[2])

    def read(self) -> list[Row]:
        """Return all rows."""
        number = min(max(0, _HEAD.unpack_from(self._memory)[0]), _MOST_ROWS)
        records = (_ROW.unpack_from(self._memory, _HEAD.size + place * _ROW.size) for place in range(number))
        return [
            Row(_text(name), _text(operation), count, started, finished)
            for count, operation, started, finished, name in records
        ]


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
