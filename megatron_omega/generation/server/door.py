"""What every request passes first: the name it came by, the key it brings, and whether the server is stopping.

Guards a server on a desk too: a page of a stranger that names its own host 127.0.0.1 comes with that host's name, and
one that posts to us cannot say application/json without being asked first.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_omega.generation.server.answers import refused
from megatron_omega.generation.server.metrics import Metrics
from megatron_omega.generation.server.pages import PAGE_FILES
from megatron_omega.generation.server.refusals import Refusal

OPEN_PATHS = frozenset({*PAGE_FILES, "/health"})
"""What is shown without a key."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass
class Door:
    """ASGI middleware around the whole application."""

    app: ASGIApp
    metrics: Metrics
    endpoints: Collection[str]
    """Paths that are counted by name."""
    key: str | None = None
    """What a client has to present as a bearer token."""
    names: Collection[str] | None = None
    """Host names that requests may come by; None takes all."""
    is_draining: bool = False
    """Whether new questions are refused, since the server is about to end."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                path = scope["path"] if scope["path"] in self.endpoints else "other"
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, answer)
        else:
            await refused(refusal)(scope, receive, answer)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        if self.names is not None and _host_name(headers.get("host", "")) not in self.names:
            return Refusal(400, f"this server is not called {headers.get('host', '')[:100]!r}; use 127.0.0.1")
        if scope["path"] in OPEN_PATHS:
            return None
        if self.key is not None and not self._is_key(headers.get("authorization", "")):
            return Refusal(401, "no valid API key; send it as Authorization: Bearer KEY", code="invalid_api_key")
        if self.is_draining and scope["method"] == "POST":
            return Refusal(503, "the server is stopping", wait_seconds=10)
        return None

    def _is_key(self, authorization: str) -> bool:
        kind, _, given = authorization.partition(" ")
        wanted = (self.key or "").encode()
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1", "replace"), wanted)


def _host_name(host: str) -> str:
    """Return a Host header without its port."""
    return host.rpartition(":")[0].lower() if host.rpartition(":")[2].isdigit() else host.lower()
