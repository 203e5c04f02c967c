"""The door of the hub: lets the monitors of this run in, and nobody else.

Whoever connects is asked for proof and has a few seconds and a few bytes for it. A connection that sends anything
else, or nothing, is closed; the oldest ones are, if there are too many. When every rank has its seat the door is shut.
"""

from __future__ import annotations

import errno
import selectors
import socket
from dataclasses import dataclass

from megatron_omega.watchdog.messages import FROM_MONITOR, Line, Message, is_well_formed
from megatron_omega.watchdog.sealing import STRANGERS_BYTES, fresh_number, welcome

_PROOF_SECONDS = 10.0
_PAUSE_SECONDS = 0.5
_ACCEPTED_AT_ONCE = 128
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_SPARE_GUESTS = 256
"""Connections that may wait at the door besides those of all ranks."""


@dataclass
class _Guest:
    """A connection that has no seat yet."""

    line: Line
    challenge: str
    since: float


class Reception:
    """Accepts connections in the selector of the hub, under whose lines they stand as `data`."""

    def __init__(self, listener: socket.socket, selector: selectors.BaseSelector, secret: str, world_size: int) -> None:
        self.listener = listener
        self._selector = selector
        self._secret = secret
        self._most_guests = world_size + _SPARE_GUESTS
        self._guests: dict[Line, _Guest] = {}
        self._pause_until: float | None = None
        self._is_open = True
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)

    def accept(self, now: float) -> None:
        """Ask everybody who has come for proof."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _FULL:
                    self._make_room(now)
                return  # else the guest has gone again
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            guest = _Guest(Line(connection, STRANGERS_BYTES), fresh_number(), now)
            self._guests[guest.line] = guest
            self._selector.register(connection, selectors.EVENT_READ, guest.line)
            guest.line.send("challenge", number=guest.challenge)
            if len(self._guests) > self._most_guests:
                self.turn_away(next((line for line in self._guests if line.seal is None), guest.line))

    def hear(self, line: Line) -> list[Message]:
        """Hear a guest; return its `hello` and what it said after that, once it has proved itself.

        It stays a guest until `seat` or `turn_away`.
        """
        messages = line.receive()
        if messages == []:
            return []
        if messages is not None and line.seal is not None and _is_hello(messages[0]):
            return messages
        answer = messages[0] if messages is not None and len(messages) == 1 and line.seal is None else None
        if answer is None or not welcome(line, self._guests[line].challenge, answer, self._secret):
            self.turn_away(line)
        return []

    def is_guest(self, line: Line) -> bool:
        return line in self._guests

    def seat(self, line: Line) -> None:
        """Let a guest go to its seat."""
        del self._guests[line]

    def look_around(self, now: float) -> None:
        """Turn away whoever has not proved itself in time, and open the door again after a pause."""
        for line in [guest.line for guest in self._guests.values() if now - guest.since > _PROOF_SECONDS]:
            self.turn_away(line)
        if self._pause_until is not None and now >= self._pause_until:
            self._pause_until = None
            self._selector.register(self.listener, selectors.EVENT_READ)

    def close(self) -> None:
        """Shut the door: nobody is expected any more."""
        if not self._is_open:
            return
        self._is_open = False
        for line in list(self._guests):
            self.turn_away(line)
        if self._pause_until is None:
            self._selector.unregister(self.listener)
        self._pause_until = None
        self.listener.close()

    def _make_room(self, now: float) -> None:
        """Turn the older half of the guests away, and accept nobody for a moment."""
        for line in list(self._guests)[: (len(self._guests) + 1) // 2]:
            self.turn_away(line)
        self._selector.unregister(self.listener)
        self._pause_until = now + _PAUSE_SECONDS

    def turn_away(self, line: Line) -> None:
        """Close the connection of a guest."""
        del self._guests[line]
        self._selector.unregister(line.connection)
        line.close()


def _is_hello(message: Message) -> bool:
    return message["kind"] == "hello" and is_well_formed(message, FROM_MONITOR)
