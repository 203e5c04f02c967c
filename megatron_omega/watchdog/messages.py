"""JSON lines over a stream socket: how a rank, its monitor and the hub talk, and which messages there are.

What arrives is bounded in size and strictly JSON. A line can be sealed (`watchdog.sealing`): then every message proves
that it comes from the other end, and in its place.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from typing import Any, Protocol

Message = dict[str, Any]
MOST_BYTES = 1 << 20
_HALVES = re.compile("[\ud800-\udfff]")

GREETING: Mapping[str, Mapping[str, str]] = {
    "challenge": {"number": "text"},
    "answer": {"number": "text", "proof": "text"},
    "welcome": {"proof": "text"},
}
"""What both ends say before they know each other."""

_STANDING: Mapping[str, str] = {"phase": "text", "step": "count", "age": "number", "allowed": "number", "state": "text"}
FROM_MONITOR: Mapping[str, Mapping[str, str]] = {
    "hello": {
        "rank": "count", "place": "text", "host": "text", "pid": "count", "findings": "texts", "finding_code": "code",
        "fingerprint": "names",
    },
    "beat": _STANDING,
    "dump": {**_STANDING, "frames": "frames", "text": "text", "device": "flag", "rows": "rows"},
    "failed": {"phase": "text", "message": "text", "error": "text", "trace": "text", "code": "code"},
    "lost": {"phase": "text"},
    "done": {},
}  # fmt: skip
"""Messages of a monitor to the hub: the fields of each kind, and what they hold."""

FROM_HUB: Mapping[str, Mapping[str, str]] = {
    "go": {},
    "beat": {},
    "dump": {"resume": "flag"},
    "end": {"code": "code"},
}


class Seal(Protocol):
    """Wraps the lines that are sent, and opens those that arrive; None: this one is not from the other end."""

    def wrap(self, body: bytes) -> bytes: ...
    def open(self, line: bytes) -> bytes | None: ...


class Line:
    """One end of a connection. Neither reading nor writing blocks longer than the socket's timeout."""

    def __init__(self, connection: socket.socket, most_bytes: int = MOST_BYTES) -> None:
        self.connection = connection
        self.most_bytes = most_bytes
        self.seal: Seal | None = None
        self._received = b""
        self._unsent = b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, kind: str, **fields: Any) -> bool:
        """Send one message, or as much of it as the other end takes now; return whether it still takes any."""
        body = json.dumps({"kind": kind, **fields}).encode()
        self._unsent += (self.seal.wrap(body) if self.seal else body) + b"\n"
        return self.flush()

    def flush(self) -> bool:
        """Send what the other end did not take before; return whether it still takes any."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except (BlockingIOError, TimeoutError):
            return len(self._unsent) <= 2 * MOST_BYTES
        except OSError:
            return False
        return True

    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived; None where the other end is gone, or is none of ours."""
        try:
            data = self.connection.recv(1 << 16)
        except (TimeoutError, BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if max(map(len, (*lines, self._received))) > self.most_bytes:
            return None
        messages = [self._read(line) for line in lines]
        return None if None in messages else [message for message in messages if message is not None]

    def _read(self, line: bytes) -> Message | None:
        body = self.seal.open(line) if self.seal else line
        try:
            message = None if body is None else json.loads(body, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        return message if isinstance(message, dict) and isinstance(message.get("kind"), str) else None

    def close(self) -> None:
        self.connection.close()


def is_well_formed(message: Message, known: Mapping[str, Mapping[str, str]]) -> bool:
    """Return whether a message is of a known kind and its fields hold what they have to.

    >>> is_well_formed({"kind": "lost", "phase": "in a step"}, FROM_MONITOR)
    True
    >>> [is_well_formed(odd, FROM_MONITOR) for odd in ({"kind": "lost"}, {"kind": "lost", "phase": 3}, {"kind": "x"})]
    [False, False, False]
    """
    fields = known.get(message["kind"])
    return fields is not None and all(_HOLDS[what](message.get(name)) for name, what in fields.items())


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_text(value: object) -> bool:
    """Return whether this is text that can be written down: JSON may hold halves of characters."""
    return isinstance(value, str) and _HALVES.search(value) is None


def _is_frame(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    file, line, function = value
    return _is_text(file) and type(line) is int and _is_text(function)


def _is_row(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 5:
        return False
    name, operation, *numbers = value
    return _is_text(name) and _is_text(operation) and all(type(n) is int and -1 <= n < 1 << 62 for n in numbers)


_HOLDS: Mapping[str, Any] = {
    "count": _is_count,
    "code": lambda value: type(value) is int and 0 <= value < 256,
    "flag": lambda value: isinstance(value, bool),
    "number": lambda value: type(value) in (int, float) and 0 <= value <= 1e30,
    "text": _is_text,
    "texts": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "names": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "frames": lambda value: isinstance(value, list) and all(map(_is_frame, value)),
    "rows": lambda value: isinstance(value, list) and all(map(_is_row, value)),
}
