"""A server from its first connection to its last: sockets, signals, draining. Knows no model."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from megatron_omega.errors import ConfigError
from megatron_omega.generation.server.bounds import Bounds
from megatron_omega.generation.server.connection import bounded
from megatron_omega.generation.server.door import Door
from megatron_omega.log import get_logger

logger = get_logger(__name__)
_BACKLOG = 2048
_LAST_SECONDS = 5
"""For answers that were ended to reach their clients."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one. Who connects before the server runs waits for it.

    Raises ConfigError if it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}); give another --host or --port") from None
    return found


class Server(uvicorn.Server):
    """uvicorn's server; a request to stop lets answers finish, and the process end as done."""

    def __init__(self, door: Door, bounds: Bounds, end_all: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                door,
                http=bounded(bounds),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=int(bounds.header_seconds) or 1,
                timeout_graceful_shutdown=int(bounds.drain_seconds) + _LAST_SECONDS,
                h11_max_incomplete_event_size=bounds.header_bytes,
            )
        )
        self._door, self._bounds, self._end_all = door, bounds, end_all

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at SIGTERM or SIGINT, end at the second; uvicorn's own would end the process by the signal."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        for number in numbers:
            loop.add_signal_handler(number, self.drain)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def drain(self) -> None:
        """Take no more requests, let answers finish as long as they may, and end. A second call ends at once."""
        if self.should_exit:
            self.force_exit = True
            self._end_all()
            return
        logger.info("asked to stop: answers have %g seconds to finish", self._bounds.drain_seconds)
        self._door.is_draining = True
        self.should_exit = True
        asyncio.get_running_loop().call_later(self._bounds.drain_seconds, self._end_all)


def run(door: Door, bounds: Bounds, sock: socket.socket, end_all: Callable[[], None]) -> None:
    """Serve until asked to stop."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what strangers send is no warning
    Server(door, bounds, end_all).run([sock])
