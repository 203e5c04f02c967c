"""One request and its answer: reading a body within bounds, working while the client stays, streaming events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
from typing import Any, TypeVar

import anyio
import orjson
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megatron_omega.generation.server.answers import refused
from megatron_omega.generation.server.bounds import Bounds
from megatron_omega.generation.server.metrics import Metrics
from megatron_omega.generation.server.questions import Question
from megatron_omega.generation.server.refusals import Refusal, misfit

Asked = TypeVar("Asked", bound=Question)
Answer = TypeVar("Answer")


async def read_question(request: Request, kind: type[Asked], bounds: Bounds) -> Asked:
    """Return the body of `request` as a question. Raises Refusal, or ClientDisconnect."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Refusal(400, f"the body is said to be {media[:60] or 'nothing'}; send Content-Type: application/json")
    body = await _read_body(request, bounds)
    try:
        return kind.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is no JSON: {str(error)[:100]}") from None
    except ValidationError as error:
        raise misfit(error) from None


async def _read_body(request: Request, bounds: Bounds) -> bytes:
    too_long = Refusal(413, f"the body is longer than {bounds.body_bytes:,} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced[:20]) > bounds.body_bytes:
        raise too_long
    body = bytearray()
    try:
        with anyio.fail_after(bounds.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > bounds.body_bytes:
                    raise too_long
    except TimeoutError:
        raise Refusal(408, f"the body was not there after {bounds.body_seconds:g} seconds") from None
    return bytes(body)


async def while_client_stays(receive: Receive, work: Callable[[], Awaitable[Answer]]) -> Answer:
    """Return what `work` returns; end it and raise ClientDisconnect if the client goes."""
    found: list[Answer] = []
    failed: list[Exception] = []

    async def do() -> None:
        try:
            found.append(await work())
        except Exception as error:  # a task group would wrap it
            failed.append(error)
        group.cancel_scope.cancel()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(do)
        group.start_soon(watch)
    if failed:
        raise failed[0]
    if not found:
        raise ClientDisconnect
    return found[0]


async def within(seconds: float, work: Awaitable[Answer]) -> Answer:
    """Return what `work` gives, or raise Refusal if it takes longer than an answer may."""
    try:
        with anyio.fail_after(seconds):
            return await work
    except TimeoutError:
        raise late(seconds) from None


def late(seconds: float) -> Refusal:
    """Return what a client is told whose answer takes too long."""
    return Refusal(503, f"the answer took longer than {seconds:g} seconds; ask for fewer tokens", wait_seconds=10)


class Events(Response):
    """Server-sent events: one for each object, then [DONE].

    A refusal before the first object is an answer of its own, with a status; after it, the last object.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        objects: AsyncGenerator[dict[str, Any], None],
        admission: AbstractContextManager[None],
        seconds: float,
        metrics: Metrics,
    ) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._objects, self._admission, self._seconds, self._metrics = objects, admission, seconds, metrics
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._admission:
            try:
                await while_client_stays(receive, lambda: self._answer(scope, receive, send))
            except ClientDisconnect:
                self._metrics.left.inc()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await within(self._seconds, self._send_all(send))
        except Refusal as refusal:
            if not self._has_begun:
                await refused(refusal)(scope, receive, send)
                return
            await self._put(send, orjson.dumps(refusal.content()))
        await self._put(send, b"[DONE]", is_last=True)

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._objects) as objects:
            async for each in objects:
                await self._put(send, orjson.dumps(each))

    async def _put(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b"data: %b\n\n" % data, "more_body": not is_last})
