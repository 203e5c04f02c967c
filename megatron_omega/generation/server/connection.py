"""A connection with bounds in time: slow headers, an answer left unread, a close that is never taken note of.

uvicorn bounds none of them: a client that sends half a request, or reads nothing, would keep its connection for ever.
"""

from __future__ import annotations

import asyncio

import h11
import orjson
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_omega.generation.server.bounds import Bounds
from megatron_omega.generation.server.refusals import Refusal


class BoundedConnection(H11Protocol):
    """uvicorn's protocol, ended by force where the client takes too long."""

    bounds = Bounds()
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # pyright: ignore[reportArgumentType]
        if len(self.connections) > self.bounds.connections:
            self.transport.abort()
        else:
            self._end_after(self.bounds.header_seconds)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering() and not self.flow.write_paused:
            self._go_on()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._end_after(self.bounds.write_seconds)  # what is written may never be read
        elif not self._is_answering():
            self._end_after(self.bounds.header_seconds)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_after(self.bounds.write_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._is_answering():
            self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._end_after(self.bounds.write_seconds)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the form of all refusals; end a connection on which another answer has begun."""
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        refusal = Refusal(400, msg if msg.endswith(".") else f"{msg}.")
        body = orjson.dumps(refusal.content())
        headers = [
            ("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")
        ]  # fmt: skip
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._end_after(self.bounds.write_seconds)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end_after(self, seconds: float) -> None:
        self._go_on()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _go_on(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bounded(bounds: Bounds) -> type[BoundedConnection]:
    """Return the protocol of a server with these bounds."""
    return type("Connection", (BoundedConnection,), {"bounds": bounds})
