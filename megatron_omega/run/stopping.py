"""Requests to stop: a signal, a file, the time that a run was given. All ranks stop after the same step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_omega.host.run_folder import STOP

_MINUTES = 1  # numbers below every signal's that means stop
_FILE = 2


class StopRequests:
    """What asks the run to end early. `agreed` is collective; a request at any rank counts for all."""

    def __init__(
        self,
        run_directory: Path,
        *,
        is_main: bool,
        max_minutes: float | None,
        stop_signal: Callable[[], int],
        started: float,
        device: torch.device,
    ) -> None:
        """`started`: monotonic time at which the process began, seconds; `device`: where the ranks' group reduces."""
        self._file = run_directory / STOP
        self._is_main = is_main
        self._deadline = None if max_minutes is None else started + 60 * max_minutes
        self._max_minutes = max_minutes
        self._stop_signal = stop_signal
        self._device = device

    def agreed(self) -> str | None:
        """Return why the run is to stop now, the same on all ranks, or None. Collective."""
        request = torch.tensor([self._own()], device=self._device)
        if dist.is_initialized():
            dist.all_reduce(request, op=dist.ReduceOp.MAX)
        number = int(request)
        if number == 0:
            return None
        if number == _MINUTES:
            return f"{self._max_minutes:g} minutes are over"
        if number == _FILE:
            self._remove_file()
            return f"found {self._file}"
        return signal.Signals(number - _FILE).name

    def _own(self) -> int:
        number = self._stop_signal()
        if number:
            return number + _FILE
        if not self._is_main:
            return 0
        if self._file.exists():
            return _FILE
        return _MINUTES if self._deadline is not None and time.monotonic() >= self._deadline else 0

    def _remove_file(self) -> None:
        """Remove the stop file, so that the next start does not stop at once."""
        if self._is_main:
            self._file.unlink(missing_ok=True)
