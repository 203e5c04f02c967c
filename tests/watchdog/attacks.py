"""What strangers, and monitors gone mad, send to the hub: each attack takes its address and returns what it holds open."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from megatron_omega.watchdog.messages import Line
from megatron_omega.watchdog.sealing import enter

Place = tuple[str, int]
HELLO: dict[str, Any] = {
    "kind": "hello", "rank": 1, "place": "here", "host": "elsewhere", "pid": 1, "findings": [], "finding_code": 2,
    "fingerprint": {},
}  # fmt: skip
DEEP = b"[" * 60_000 + b"]" * 60_000


def connect(place: Place) -> socket.socket:
    return socket.create_connection(place, timeout=2.0)


def _says(*pieces: bytes, pause: float = 0.0) -> Callable[[Place], list[socket.socket]]:
    """Return the attack that says these bytes, and stays."""

    def attack(place: Place) -> list[socket.socket]:
        connection = connect(place)
        with contextlib.suppress(OSError):  # shown the door already
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        return [connection]

    return attack


def _line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _many(place: Place) -> list[socket.socket]:
    return [connect(place) for _ in range(1000)]


def _reset(place: Place) -> list[socket.socket]:
    for _ in range(50):
        connection = connect(place)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    return []


def _reflect(place: Place) -> list[socket.socket]:
    """Send back to the hub what it says itself."""
    connection = connect(place)
    with contextlib.suppress(OSError):
        connection.sendall(connection.recv(4096))
        connection.sendall(connection.recv(4096))
    return [connection]


WITHOUT_SECRET: Mapping[str, Callable[[Place], list[socket.socket]]] = {
    "says nothing": _says(),
    "one byte now and then": _says(*[b"{"] * 20, pause=0.01),
    "noise": _says(os.urandom(3000)),
    "a browser": _says(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"),
    "deep JSON": _says(DEEP + b"\n"),
    "a line without end": _says(*[b"x" * (1 << 16)] * 64),
    "no object": _says(b"3\n", b'"text"\n', b"null\n", b"NaN\n"),
    "a hello without proof": _says(_line(**HELLO)),
    "a wrong proof": _says(_line(kind="answer", number="0" * 32, proof="0" * 64)),
    "an answer of other types": _says(_line(kind="answer", number=[1], proof={"x": None})),
    "half a character": _says(b'{"kind": "answer", "number": "\\ud800", "proof": "\\udfff"}\n'),
    "no UTF-8": _says(b"\xff\xfe\x00{}\n"),
    "a thousand at once": _many,
    "comes and resets": _reset,
    "sends it back": _reflect,
}


class Recorder:
    """A socket that keeps what is sent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.sent = b""

    def send(self, data: bytes) -> int:
        count = self._connection.send(data)
        self.sent += data[:count]
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def _entered(place: Place, secret: str) -> tuple[Recorder, Line]:
    recorder = Recorder(connect(place))
    line = enter(recorder, secret, 10.0)  # pyright: ignore[reportArgumentType]
    assert line is not None
    return recorder, line


def _replay(place: Place, secret: str) -> list[socket.socket]:
    """Say on a new connection what was heard on another."""
    recorder, line = _entered(place, secret)
    line.send("hello", rank=1 << 40)
    line.close()
    return _says(recorder.sent)(place)


def _repeat(place: Place, secret: str) -> list[socket.socket]:
    """Say a sealed line twice."""
    recorder, line = _entered(place, secret)
    before = len(recorder.sent)
    line.send("beat")
    with contextlib.suppress(OSError):
        recorder.sendall(recorder.sent[before:])
    return [line.connection]


def _change(place: Place, secret: str) -> list[socket.socket]:
    """Change a sealed hello on its way."""
    _, line = _entered(place, secret)
    assert line.seal is not None
    wrapped = line.seal.wrap(json.dumps(HELLO).encode())
    with contextlib.suppress(OSError):
        line.connection.sendall(wrapped.replace(b"elsewhere", b"somewhere") + b"\n")
    return [line.connection]


def _sealed(body: bytes) -> Callable[[Place, str], list[socket.socket]]:
    """Return the attack that proves itself and then says this."""

    def attack(place: Place, secret: str) -> list[socket.socket]:
        _, line = _entered(place, secret)
        assert line.seal is not None
        with contextlib.suppress(OSError):
            line.connection.sendall(line.seal.wrap(body) + b"\n")
        return [line.connection]

    return attack


def _hello(**fields: Any) -> Callable[[Place, str], list[socket.socket]]:
    return _sealed(json.dumps(HELLO | fields).encode())


WITH_SECRET: Mapping[str, Callable[[Place, str], list[socket.socket]]] = {
    "what was heard elsewhere": _replay,
    "a line twice": _repeat,
    "a line that was changed": _change,
    "deep JSON": _sealed(DEEP),
    "a beat before its hello": _sealed(b'{"kind": "beat"}'),
    "a rank that there is not": _hello(rank=1 << 40),
    "a rank that is no number": _hello(rank="1"),
    "a rank below zero": _hello(rank=-1),
    "findings that are no list": _hello(findings=3),
    "a hello that lacks all": _sealed(b'{"kind": "hello"}'),
    "half a character": _hello(place="\ud800"),
}
