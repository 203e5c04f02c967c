"""Writing to a disk that is full, over quota or away for a while: training goes on, and what is missing is named."""

from __future__ import annotations

import errno
from collections.abc import Callable

from megatron_omega.log import get_logger

log = get_logger(__name__)

PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOBUFS, errno.ETIMEDOUT})
"""What a file system may get over, or be helped with, while a run goes on."""
_NAMED = 8


def is_passing(error: BaseException) -> bool:
    """Return whether a failure is the file system's and may end by itself."""
    return isinstance(error, OSError) and error.errno in PASSING


class Lasting:
    """Tries again and again: one warning when writing begins to fail, one that names what is missing when it works."""

    def __init__(self, name: str) -> None:
        """`name` is what is written, for people."""
        self._name = name
        self._missing: list[str] = []
        self._reason = ""

    def attempt(self, write: Callable[[], object], item: str) -> bool:
        """Write `item`, for people such as `step 7`; return whether that worked. Other errors are raised."""
        try:
            write()
        except OSError as error:
            if not is_passing(error):
                raise
            if not self._missing:
                self._reason = error.strerror or str(error)
                log.warning("%s cannot be written (%s): training goes on, and so do the attempts", self._name, error)
            self._missing.append(item)
            return False
        if self._missing:
            log.warning("%s is written again; missing: %s (%s)", self._name, _shortened(self._missing), self._reason)
            self._missing = []
        return True

    def close(self) -> None:
        """Name what is still missing, for good now."""
        if self._missing:
            log.warning("%s could not be written: %s (%s)", self._name, _shortened(self._missing), self._reason)
            self._missing = []


def _shortened(items: list[str]) -> str:
    """Return some items, the first and the last among them.

    >>> _shortened([f"step {number}" for number in range(20, 40)])
    '20 lines, step 20 to step 39'
    """
    return ", ".join(items) if len(items) <= _NAMED else f"{len(items)} lines, {items[0]} to {items[-1]}"
