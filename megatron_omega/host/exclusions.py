"""Hosts that a run no longer uses: `excluded.jsonl` in its folder, one line for each time that one was blamed.

Whoever finds a faulty machine writes the line: the hub, the comparison of weights, the preflight. Whoever starts the
run next reads them. A host is left out for a while, not for ever: it may have been repaired.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_omega.host.json_lines import append_line, encode_line
from megatron_omega.host.run_folder import EXCLUDED

DAYS = 7.0
"""How long a host is left out."""
_DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class Exclusion:
    """A host that is left out, and why."""

    host: str
    reason: str
    at: float
    """Seconds since 1970."""

    def __str__(self) -> str:
        hours = max(0.0, time.time() - self.at) / 3600
        return f"{self.host} ({self.reason}; {f'{hours:.0f} hours' if hours < 48 else f'{hours / 24:.0f} days'} ago)"


def exclude(run_directory: Path, hosts: Iterable[str], reason: str) -> None:
    """Note hosts that the run is not to use. What cannot be written is left: the same fault will be found again."""
    for host in hosts:
        with contextlib.suppress(OSError):
            line = encode_line({"host": host, "reason": reason, "at": round(time.time(), 3)})
            append_line(run_directory / EXCLUDED, line)


def excluded(run_directory: Path, now: float | None = None) -> list[Exclusion]:
    """Return the hosts that are left out, those that were blamed last first, each once."""
    now = time.time() if now is None else now
    try:
        lines = (run_directory / EXCLUDED).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found: dict[str, Exclusion] = {}
    for line in reversed(lines):
        one = _read(line)
        if one is not None and short_name(one.host) not in found and now - one.at < DAYS * _DAY_SECONDS:
            found[short_name(one.host)] = one
    return list(found.values())


def _read(line: str) -> Exclusion | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        values = json.loads(line)
        return Exclusion(str(values["host"]), str(values["reason"]), float(values["at"]))
    return None


def choose(hosts: Sequence[str], left_out: Sequence[Exclusion], least: int) -> tuple[list[str], list[Exclusion]]:
    """Return the hosts to use, and those of the excluded that are used all the same because too few are left.

    The ones that were blamed longest ago come back first. Hosts keep their order.
    """
    known = {short_name(host) for host in hosts}
    out = [one for one in left_out if short_name(one.host) in known]
    missing = max(0, least - (len(hosts) - len(out)))
    back = out[len(out) - missing :]
    unused = {short_name(one.host) for one in out if one not in back}
    return [host for host in hosts if short_name(host) not in unused], back


def short_name(host: str) -> str:
    """Return a host's name without its domain: some call it by the one, some by the other."""
    return host.partition(".")[0]
