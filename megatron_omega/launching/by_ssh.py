"""The hosts of a hostfile, and which of them answer by ssh. Knows no run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_omega.errors import ConfigError
from megatron_omega.host.regular_files import read_text
from megatron_omega.log import get_logger

log = get_logger(__name__)
PATIENCE_SECONDS = 300.0
"""How long a start waits for hosts that do not answer, if it cannot do without them: a reboot takes so long."""
_ANSWER_SECONDS, _PAUSE_SECONDS, _AT_ONCE = 10, 10.0, 64


def listed(hostfile: Path) -> list[str]:
    """Return the hosts of a DeepSpeed hostfile (`name slots=8` a line) in their order. Raises ConfigError."""
    try:
        lines = read_text(hostfile).splitlines()
    except OSError as error:
        raise ConfigError(f"{hostfile} cannot be read: {error.strerror}; write it with `launch hostfile`") from None
    words = (line.partition("#")[0].split() for line in lines)
    return [found[0] for found in words if found]


def answers(host: str) -> bool:
    """Return whether a host takes a command by ssh, without a password."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_ANSWER_SECONDS}", host, "true"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    except FileNotFoundError:
        raise ConfigError("ssh is not on this machine's path; hosts of a hostfile are reached by it") from None
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def reachable(
    hosts: Sequence[str],
    least: int,
    *,
    ask: Callable[[str], bool] = answers,
    patience_seconds: float = PATIENCE_SECONDS,
    pause: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Return the hosts that answer, in their order; wait for more while they are fewer than `least`.

    Raises:
        ConfigError: too few came.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(hosts)))) as pool:
            found = [host for host, is_there in zip(hosts, pool.map(ask, hosts), strict=True) if is_there]
        silent = ", ".join(host for host in hosts if host not in found)
        if silent:
            log.warning("no answer by ssh: %s", silent)
        if len(found) >= least:
            return found
        if time.monotonic() >= deadline:
            raise ConfigError(f"{silent}: no answer by ssh for {patience_seconds:.0f} s, and {least} hosts are needed")
        pause(_PAUSE_SECONDS)
