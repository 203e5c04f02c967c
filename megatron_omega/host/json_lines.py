"""JSON Lines that several processes append to, any of which may be killed at any moment, and that anybody reads."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

_TRIES, _BETWEEN_SECONDS = 20, 0.005
_CHUNK = 1 << 16


def encode_line(value: dict[str, Any]) -> bytes:
    """Return one line of JSON; numbers that are not finite become null, since JSON has none."""
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE, default=str)


def append_line(path: Path, line: bytes) -> None:
    """Append a line, or nothing of it. Raises OSError.

    A full disk and a SIGKILL both leave half a line: the kernel ends a write between two pages. The next writer takes
    it away. That is safe under the lock alone: what another process is still writing looks the same. Where there is no
    lock (some network file systems; a holder that is stopped), half a line stays, on a line of its own.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        alone = _locked(descriptor)
        size = os.fstat(descriptor).st_size
        before = _end_of_lines(descriptor, size)
        if before < size and alone:
            os.ftruncate(descriptor, before)
        elif before < size:
            before, line = size, b"\n" + line
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            if alone:
                os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)  # and the lock with it


def _locked(descriptor: int) -> bool:
    """Lock the file, and return whether that could be done in a moment: nobody waits for a process that is stopped."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_BETWEEN_SECONDS)
        except OSError:
            return False
        else:
            return True
    return False


def _end_of_lines(descriptor: int, size: int) -> int:
    """Return the byte behind the last whole line."""
    end, chunk = size, 1  # nearly always it is the last byte
    while end:
        start = max(0, end - chunk)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end, chunk = start, _CHUNK
    return 0


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file; nothing if there is no file. Half a line, which a crash leaves, is passed over."""
    for _, value in read_places(path):
        yield value


def read_places(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (byte behind its line, object) for every whole line."""
    if not path.is_file():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            value = _object(line)
            if value is not None and line.endswith(b"\n"):
                yield end, value


def objects_in(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of lines that were read already, half a line passed over."""
    yield from (value for value in map(_object, lines) if value is not None)


def _object(line: bytes | str) -> dict[str, Any] | None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
