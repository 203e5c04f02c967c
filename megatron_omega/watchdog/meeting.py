"""Where the monitors of a run meet: the hub's socket, its address and the secret that proves who belongs to the run.

The address lies in a folder of the run folder that only this user can enter; if that cannot be written, in one of this
host. A launcher may hand the secret to all ranks in OMEGA_RUN_SECRET instead; then it is written nowhere. What is left
of an earlier start leads to no hub that knows its secret, and is read again until it is the address of this start.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import socket
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_omega.host import run_folder
from megatron_omega.host.environment import run_secret
from megatron_omega.host.private import make_folders, refuse_others, write_private
from megatron_omega.watchdog.sealing import fresh_number

_MOST_BYTES = 4096
_BACKLOG = 4096
_ELSEWHERE = "192.0.2.1"
"""An address of nobody (RFC 5737): which of this host's addresses leads outwards? No packet is sent to ask that."""


@dataclass(frozen=True)
class Address:
    """Where the hub listens, and the secret of the run."""

    host: str
    port: int
    secret: str


def open_hub(master: str) -> tuple[socket.socket, Address]:
    """Listen on one interface: the one that `master`, the name of rank 0's host, stands for.

    Raises OSError if this host has no interface to listen on.
    """
    *others, last = _interfaces(master)
    for host in others:
        with contextlib.suppress(OSError):  # a name may stand for an address that is not this host's own
            return _listen_on(host)
    return _listen_on(last)


def _listen_on(host: str) -> tuple[socket.socket, Address]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    return listener, Address(host, listener.getsockname()[1], run_secret() or fresh_number())


def _interfaces(master: str) -> list[str]:
    """Return the addresses to try. A host's own name may stand for its loopback, which no other host can reach."""
    if master == "localhost":
        return ["127.0.0.1"]
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(master).is_loopback:
            return [master]
    found: list[str] = []
    with contextlib.suppress(OSError):
        found = [str(place[4][0]) for place in socket.getaddrinfo(master, 0, type=socket.SOCK_STREAM)]
    outwards = [address for address in found if not ipaddress.ip_address(address.partition("%")[0]).is_loopback]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((_ELSEWHERE, 9))
        outwards.append(str(probe.getsockname()[0]))
    return [*dict.fromkeys(outwards), "127.0.0.1"]


@dataclass(frozen=True)
class Published:
    """An address that has been written."""

    path: Path
    made: tuple[Path, ...]
    """Folders that had to be made for it, the outermost first."""

    def withdraw(self) -> None:
        """Remove the address, and the folders that were made for it and are empty."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        for folder in (self.path.parent, *reversed(self.made)):
            with contextlib.suppress(OSError):
                folder.rmdir()


def publish(address: Address, run_directory: Path, start: str) -> Published:
    """Write the address where the monitors of all ranks look for it. Raises OSError.

    `start` is what all ranks of one start have in common, and no other start in the same folder.
    """
    is_handed_out = run_secret() is not None
    written = replace(address, secret="") if is_handed_out else address
    for folder in _folders(run_directory):
        with contextlib.suppress(OSError):
            made = make_folders(folder.parent)
            folder.mkdir(exist_ok=True, mode=0o700)
            path = folder / _name(start)
            write_private(path, "")  # who owns it is seen before the secret stands in it
            if not is_handed_out:
                _refuse_others(path)
            write_private(path, json.dumps(asdict(written)))
            return Published(path, tuple(made))
    raise OSError("neither the run folder nor the temporary folder keeps a file to this user alone")


def find_address(run_directory: Path, start: str) -> Address | None:
    """Return where the hub of a start is; None if nobody of this user has said so yet."""
    for folder in _folders(run_directory):
        with contextlib.suppress(OSError, ValueError):
            return _read(folder / _name(start))
    return None


def _read(path: Path) -> Address:
    if run_secret() is None:
        _refuse_others(path)
    with path.open("rb") as file:
        values = json.loads(file.read(_MOST_BYTES))
    if not isinstance(values, dict):
        raise ValueError("not an address")
    host, port, secret = values.get("host"), values.get("port"), run_secret() or values.get("secret")
    if not (isinstance(host, str) and type(port) is int and 0 < port < 1 << 16 and isinstance(secret, str) and secret):
        raise ValueError("not an address")
    return Address(host, port, secret)


def _refuse_others(path: Path) -> None:
    refuse_others(path.parent, is_folder=True)
    refuse_others(path)


def _name(start: str) -> str:
    return f"{hashlib.sha256(start.encode()).hexdigest()[:12]}.json"


def _folders(run_directory: Path) -> list[Path]:
    key = hashlib.sha256(str(run_directory).encode()).hexdigest()[:16]
    return [run_directory / run_folder.MONITOR, Path(tempfile.gettempdir()) / f"omega-monitor-{os.geteuid()}-{key}"]
