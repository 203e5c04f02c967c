"""Stacks of all ranks as files, written beside the diagnosis and never before it: a slow file system delays nobody."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path

_WRITERS = 16
_MOST_SECONDS = 5.0


class StackFiles:
    """Writes `rank-00000.txt` and so on into a folder, in threads that end with the process."""

    def __init__(self, folder: Path, stacks: Mapping[int, str]) -> None:
        self._folder = folder
        self._waiting: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        for stack in stacks.items():
            self._waiting.put(stack)
        self._until = time.monotonic() + _MOST_SECONDS
        count = min(_WRITERS, len(stacks))
        self._writers = [threading.Thread(target=self._write, name="stacks", daemon=True) for _ in range(count)]
        self._num_failed = 0
        for writer in self._writers:
            writer.start()

    def finish(self) -> list[str]:
        """Wait for the files, a few seconds at most; return a line that says what could not be written."""
        for writer in self._writers:
            writer.join(max(0.0, self._until - time.monotonic()))
        if any(writer.is_alive() for writer in self._writers):
            return [f"  the file system is slow: not all stacks could be written within {_MOST_SECONDS:.0f} s"]
        return [f"  {self._num_failed} stacks could not be written"] if self._num_failed else []

    def _write(self) -> None:
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < self._until:
                rank, text = self._waiting.get_nowait()
                try:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    (self._folder / f"rank-{rank:05d}.txt").write_text(text, encoding="utf-8", errors="replace")
                except OSError:
                    self._num_failed += 1
