"""One folder, one writer: a lease in the folder says who holds it, and lapses by itself when the holder is gone.

On the holder's own host its process decides: the number, and when that process started. Elsewhere the age of the last
renewal does, by the clock of the file server, so that hosts may disagree about the time. Taking is a hard link, which
fails if the name exists, on NFS too; taking over is done under a lock of the file server if it grants any, and looked
at again after a moment if it grants none. A holder taken for gone that is not learns it at its next renewal.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_omega.host.private import make_folders
from megatron_omega.host.regular_files import read_text

RENEWAL_SECONDS = 10.0
LAPSE_SECONDS = 60.0
"""Without a renewal, after which a holder on another host counts as gone."""
_DOUBT_SECONDS = 1.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """Who holds a folder."""

    host: str
    pid: int
    started: str
    """When the process started, in the clock of its kernel; with `kernel` no other process ever has the same."""
    kernel: str
    """Boot and PID namespace in which `pid` means something."""
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()), _kernel(), now, secrets.token_hex(8))

    def is_known_alive(self) -> bool | None:
        """Return whether the holder's process is there; None if it is not this host's to say."""
        return None if self.kernel != _kernel() else self.started == _start_of(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class HeldError(Exception):
    """The folder is another's."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(str(holder or "another start"))


class Lease:
    """Holds a folder from `take` to `release`; renewed by a thread meanwhile."""

    def __init__(self, path: Path, *, renewal_seconds: float, lapse_seconds: float) -> None:
        self._path = path
        self._me = Holder.this_process()
        self._renewal_seconds, self._lapse_seconds = renewal_seconds, lapse_seconds
        self._made: list[Path] = []
        self._lost_to: Holder | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew_on, name="lease", daemon=True)

    @classmethod
    def take(
        cls, path: Path, *, renewal_seconds: float = RENEWAL_SECONDS, lapse_seconds: float = LAPSE_SECONDS
    ) -> Lease:
        """Take the lease at `path`; the folder is made if it does not exist.

        A holder on another host that may be gone is waited for: until it renews, or its lease lapses.

        Raises HeldError if somebody holds it; OSError if the folder cannot be written.
        """
        lease = cls(path, renewal_seconds=renewal_seconds, lapse_seconds=lapse_seconds)
        lease._made = make_folders(path.parent)
        try:
            lease._take()
        except BaseException:
            lease._unmake()
            raise
        lease._thread.start()
        return lease

    @property
    def lost_to(self) -> Holder | None:
        """Who has taken the folder over from this process: it was not heard of for too long."""
        return self._lost_to

    def release(self) -> None:
        """Give the folder back; folders that were made for the lease, and are empty, go with it."""
        self._over.set()
        with contextlib.suppress(OSError), _locked(self._path):
            if _read(self._path) == self._me:
                self._path.unlink()
        self._unmake()

    # ---- taking

    def _take(self) -> None:
        found: Holder | None = None
        seen = ""
        while True:
            with _locked(self._path) as is_locked:
                found = _read(self._path)
                if self._is_free(found):
                    self._write(over=self._path.exists())
                    break
                if found is not None and found.is_known_alive():
                    raise HeldError(found)
                sign = _sign(self._path)
            if seen and sign != seen:
                raise HeldError(found)  # renewed while this one looked on
            seen = sign
            time.sleep(_POLL_SECONDS)
        if not is_locked:
            time.sleep(_DOUBT_SECONDS)  # two that took over in the same moment: the last one has it
            if (now := _read(self._path)) != self._me:
                raise HeldError(now)

    def _is_free(self, found: Holder | None) -> bool:
        if found is None:
            return not self._path.exists() or self._age() > self._lapse_seconds
        alive = found.is_known_alive()
        return alive is False or (alive is None and self._age() > self._lapse_seconds)

    def _age(self) -> float:
        """Return how long ago the lease was renewed, by the file server's clock."""
        probe = self._path.with_name(f"{self._path.name}.{self._me.token}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self._path.stat().st_mtime
        except FileNotFoundError:
            return float("inf")
        finally:
            probe.unlink(missing_ok=True)

    def _write(self, *, over: bool) -> None:
        """Write the lease: as a new name, or in the place of one that has lapsed."""
        own = self._path.with_name(f"{self._path.name}.{self._me.token}")
        own.write_text(json.dumps(asdict(self._me)), encoding="utf-8")
        try:
            if over:
                own.replace(self._path)
            else:
                _link(own, self._path)
        except FileExistsError:
            raise HeldError(_read(self._path)) from None
        finally:
            own.unlink(missing_ok=True)

    def _unmake(self) -> None:
        with contextlib.suppress(OSError):
            _lock_path(self._path).unlink()
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    # ---- holding

    def _renew_on(self) -> None:
        while not self._over.wait(self._renewal_seconds):
            with contextlib.suppress(OSError):  # a file system that is away for a moment: tried again
                found = _read(self._path)
                if found is not None and found != self._me:
                    self._lost_to = found
                    return
                if found is None and not self._path.exists():
                    self._write(over=False)  # removed by hand
                os.utime(self._path)


def _link(own: Path, path: Path) -> None:
    """Give a file a second name, which must not exist. Raises FileExistsError."""
    try:
        os.link(own, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("x", encoding="utf-8") as file:
            file.write(own.read_text(encoding="utf-8"))


def _read(path: Path) -> Holder | None:
    """Return who holds the lease; None if nobody does, or it does not say."""
    try:
        return Holder(**json.loads(read_text(path)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _sign(path: Path) -> str:
    """Return what changes with every renewal."""
    found = path.stat()
    return f"{found.st_ino} {found.st_mtime_ns}"


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Be alone with the lease; yield whether the file server grants locks at all. The kernel drops them with us."""
    while True:
        with _lock_path(path).open("a") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError:
                yield False
                return
            if not _is_same(file.fileno(), _lock_path(path)):
                continue  # the one that held it has removed it: lock the new one
            yield True
            return


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks since boot; empty if there is none, or it has ended already."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()
