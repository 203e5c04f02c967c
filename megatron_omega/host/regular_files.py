"""Files that others may have made: opened only if they are regular, and read only up to a size that makes sense.

A pipe, a terminal or /dev/zero in the place of a file would let a reader wait, or fill its memory, for ever. The same
holds for what is written: a pipe that nobody reads holds its writer.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST_TEXT_BYTES = 64 << 20


def open_regular(path: str | Path) -> int:
    """Return a descriptor that reads `path`, links followed. Raises OSError if it is no regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, _kind(mode), str(path))


def read_regular(path: str | Path, most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """Return the content of a regular file. Raises OSError if it is none, or longer than `most_bytes`."""
    with os.fdopen(open_regular(path), "rb") as file:
        is_short = os.fstat(file.fileno()).st_size <= most_bytes
        data = file.read(most_bytes + 1) if is_short else b""
    if not is_short or len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"is longer than {most_bytes:,} bytes", str(path))
    return data


def read_text(path: str | Path, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Return the text of a regular file in UTF-8.

    Raises OSError if it is none, is longer than `most_bytes`, or is no such text: `strerror` is the reason.
    """
    try:
        return read_regular(path, most_bytes).decode()
    except UnicodeDecodeError:
        raise OSError(errno.EILSEQ, "is not text in UTF-8", str(path)) from None


def require_writable_name(path: Path) -> None:
    """Raise OSError if something is at `path` that is no regular file, such as a folder, a pipe or a device."""
    if path.exists() and not stat.S_ISREG(mode := path.stat().st_mode):
        raise OSError(errno.EINVAL, _kind(mode), str(path))


def _kind(mode: int) -> str:
    return "is no regular file" + (" but a folder" if stat.S_ISDIR(mode) else "")
