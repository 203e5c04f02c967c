"""A connection with bounds in time: slow headers, an answer left unread, a close that is never taken note of.

uvicorn bounds none of them: a client that sends half a request, or reads nothing, would keep its connection for ever.
"""

from __future__ import annotations

import asyncio
from typing import Literal

import h11
import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_omega.generation.server.bounds import Bounds
from megatron_omega.generation.server.refusals import Refusal


class BoundedConnection(H11Protocol):
    """uvicorn's protocol, ended by force where the client takes too long."""

    bounds = Bounds()
    _waits_for: Literal["request", "answer", "reader"] | None = None
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # pyright: ignore[reportArgumentType]
        if len(self.connections) > self.bounds.connections:
            self.transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the form of all refusals; end a connection on which another answer has begun."""
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = orjson.dumps(Refusal(400, msg).content())
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        """See what the connection waits for; if that has changed, its time begins."""
        if self.transport.is_closing() or self.flow.write_paused:
            waits_for, seconds = "reader", self.bounds.write_seconds
        elif self._is_answering():
            waits_for, seconds = "answer", None  # the application's own bounds
        else:
            waits_for, seconds = "request", self.bounds.header_seconds
        if waits_for == self._waits_for:
            return
        self._waits_for = waits_for
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self.transport.abort) if seconds else None


def bounded(bounds: Bounds) -> type[BoundedConnection]:
    """Return the protocol of a server with these bounds."""
    return type("Connection", (BoundedConnection,), {"bounds": bounds})
