"""One line of events.jsonl: the run's own hooks write them, and the watchdog adds why the ranks were ended."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_omega.host.json_lines import append_line, encode_line
from megatron_omega.host.redaction import redacted
from megatron_omega.host.run_folder import EVENTS


def append_event(run_directory: Path, event: str, step: int, fields: Mapping[str, Any]) -> None:
    """Append one event with the time and the step (or the one in `fields`); secrets are left out.

    Raises OSError if it cannot be written.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    line = encode_line({"time": now, "event": event, "step": step, **redacted(dict(fields))})
    append_line(run_directory / EVENTS, line)
