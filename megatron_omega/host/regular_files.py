"""Files that others may have made: opened only if they are regular, and read only up to a size that makes sense.

A pipe, a terminal or /dev/zero in the place of a file would let a reader wait, or fill its memory, for ever.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST_TEXT_BYTES = 64 << 20


def open_regular(path: str | Path) -> int:
    """Return a descriptor that reads `path`, links followed. Raises OSError where it is no regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "is no regular file", str(path))


def read_regular(path: str | Path, most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """Return the content of a regular file. Raises OSError where it is none, or longer than `most_bytes`."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"is longer than {most_bytes:,} bytes", str(path))
    return data
