"""One line of events.jsonl: the run's own hooks write them, and the watchdog adds why the ranks were ended."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson

from megatron_omega.host.redaction import redacted
from megatron_omega.host.run_folder import EVENTS


def append_event(run_directory: Path, event: str, step: int, fields: Mapping[str, Any]) -> None:
    """Append one event with the time and the step (or the one in `fields`); secrets are left out.

    Raises OSError if it cannot be written.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    line = encode_line({"time": now, "event": event, "step": step, **redacted(dict(fields))})
    append_whole(run_directory / EVENTS, line)


def append_whole(path: Path, line: bytes) -> None:
    """Append a line in one write, or nothing of it: half a line would hide all that follow. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def encode_line(value: dict[str, Any]) -> bytes:
    """Return one line of JSON; numbers that are not finite become null, since JSON has none."""
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE, default=str)
