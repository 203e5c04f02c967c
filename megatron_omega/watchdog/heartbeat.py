"""What a rank is doing now, in memory that it shares with its monitor: phase, step, and when that last changed.

Times are seconds of the monotonic clock, which all processes of a host share and nobody sets back.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass

from megatron_omega.host.child_process import anonymous_file

_RECORD = struct.Struct("<qqddH94s")


@dataclass(frozen=True)
class Beat:
    """The last sign of progress of a rank."""

    count: int = 0
    step: int = 0
    """Step being done; 0 before the first."""
    at: float = 0.0
    """Monotonic time of the beat, seconds."""
    allowed_seconds: float = float("inf")
    """How long the next beat may take."""
    phase: str = "starting"


class Beacon:
    """A record in an anonymous file. One writer (the training thread), one reader (the monitor)."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _RECORD.size)
        self._last = Beat()

    @classmethod
    def create(cls) -> Beacon:
        """Make a new beacon; its file has no name and goes with its last user."""
        return cls(anonymous_file(_RECORD.size))

    def beat(self, phase: str | None = None, *, step: int | None = None, allowed_seconds: float | None = None) -> None:
        """Say that progress was made; what is not given stays as it was."""
        last = self._last
        self._last = Beat(
            last.count + 1,
            last.step if step is None else step,
            time.monotonic(),
            last.allowed_seconds if allowed_seconds is None else allowed_seconds,
            last.phase if phase is None else phase,
        )
        beat, text = self._last, self._last.phase.encode()[:94]
        record = _RECORD.pack(beat.count, beat.step, beat.at, beat.allowed_seconds, len(text), text)
        self._memory[: _RECORD.size] = record

    def read(self) -> Beat:
        """Return the last beat."""
        count, step, at, allowed, length, text = _RECORD.unpack(self._memory[: _RECORD.size])
        if count == 0:
            return Beat()
        return Beat(count, step, at, allowed, text[:length].decode(errors="replace"))

    def close(self) -> None:
        """Release the memory and the file."""
        self._memory.close()
        os.close(self.descriptor)
