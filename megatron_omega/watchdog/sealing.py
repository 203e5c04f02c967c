"""Proof that the other end of a connection belongs to the run: challenge and response, and a seal on every message.

    hub      -> monitor   challenge  a number used once
    monitor  -> hub       answer     a number of its own, and what only the holder of the secret can make of both
    hub      -> monitor   welcome    the same, made another way: the hub proves itself too
    from then on both ends authenticate each message with a key of this connection, its direction and its place

The secret itself never travels (HMAC-SHA256, RFC 2104). What was heard on one connection proves nothing on another, and
a message that is changed, repeated, left out or sent back to its sender does not open. Nothing here is encrypted.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from dataclasses import dataclass

from megatron_omega.watchdog.messages import GREETING, MOST_BYTES, Line, Message, is_well_formed

STRANGERS_BYTES = 512
"""Length of a line that an end may send before it has proved itself."""
_HUB, _MONITOR = b"hub", b"monitor"


def fresh_number() -> str:
    """Return a number that nobody can guess and that is used once."""
    return secrets.token_hex(16)


def _made_of(secret: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"".join(len(part).to_bytes(4, "big") + part for part in parts), "sha256")


@dataclass
class _Seal:
    """A key for one connection; counts the messages of each direction."""

    key: bytes
    ours: bytes
    theirs: bytes
    sent: int = 0
    opened: int = 0

    def wrap(self, body: bytes) -> bytes:
        self.sent += 1
        return self._mark(self.ours, self.sent, body) + b" " + body

    def open(self, line: bytes) -> bytes | None:
        mark, _, body = line.partition(b" ")
        self.opened += 1
        return body if hmac.compare_digest(mark, self._mark(self.theirs, self.opened, body)) else None

    def _mark(self, direction: bytes, place: int, body: bytes) -> bytes:
        return _made_of(self.key, direction, place.to_bytes(8, "big"), body).hex().encode()


@dataclass(frozen=True)
class _Proofs:
    """What the holder of the secret makes of the numbers of one connection."""

    secret: str
    challenge: str
    number: str

    def of(self, side: bytes) -> str:
        return self._made(b"proof", side).hex()

    def seal(self, *, ours: bytes, theirs: bytes) -> _Seal:
        return _Seal(self._made(b"seal"), ours, theirs)

    def _made(self, *parts: bytes) -> bytes:
        return _made_of(self.secret.encode(), *parts, self.challenge.encode(), self.number.encode())


def welcome(line: Line, challenge: str, message: Message, secret: str) -> bool:
    """As the hub: judge the answer to `challenge`; return whether it is right. Then the line is sealed."""
    if message["kind"] != "answer" or not is_well_formed(message, GREETING):
        return False
    proofs = _Proofs(secret, challenge, message["number"])
    if not hmac.compare_digest(message["proof"].encode(), proofs.of(_MONITOR).encode()):
        return False
    is_taken = line.send("welcome", proof=proofs.of(_HUB))
    line.seal, line.most_bytes = proofs.seal(ours=_HUB, theirs=_MONITOR), MOST_BYTES
    return is_taken


def enter(connection: socket.socket, secret: str, seconds: float) -> Line | None:
    """As a monitor: prove oneself to the hub and let it prove itself; None if it does not within `seconds`."""
    line = Line(connection, STRANGERS_BYTES)
    until = time.monotonic() + seconds
    challenge = _only_message(line, until, "challenge")
    if challenge is None:
        return None
    proofs = _Proofs(secret, challenge["number"], fresh_number())
    line.send("answer", number=proofs.number, proof=proofs.of(_MONITOR))
    welcomed = _only_message(line, until, "welcome")
    if welcomed is None or not hmac.compare_digest(welcomed["proof"].encode(), proofs.of(_HUB).encode()):
        return None
    line.seal, line.most_bytes = proofs.seal(ours=_MONITOR, theirs=_HUB), MOST_BYTES
    return line


def _only_message(line: Line, until: float, kind: str) -> Message | None:
    """Return the next message; None if it does not come in time or is another one."""
    while (left := until - time.monotonic()) > 0:
        line.connection.settimeout(left)
        messages = line.receive()
        if messages is None or len(messages) > 1:
            return None
        if messages:
            return messages[0] if messages[0]["kind"] == kind and is_well_formed(messages[0], GREETING) else None
    return None
