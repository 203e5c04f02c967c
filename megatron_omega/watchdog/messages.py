"""JSON lines over a stream socket: how a rank, its monitor and the hub talk."""

from __future__ import annotations

import json
import socket
from typing import Any

Message = dict[str, Any]
_MOST_BYTES = 1 << 20


class Line:
    """One end of a connection. Reading never blocks longer than the socket's timeout."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, kind: str, **fields: Any) -> bool:
        """Send one message; return whether the other end still takes any."""
        try:
            self.connection.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived; None where the other end is gone."""
        try:
            data = self.connection.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > _MOST_BYTES:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None  # not one of ours
        return [message for message in messages if isinstance(message, dict) and "kind" in message]

    def close(self) -> None:
        self.connection.close()
