"""Servers that real clients reach: as a process of its own, as a user starts it, and as a thread of the tests."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
from written_models import tiny_config, tiny_model, write_run

from megatron_omega.generation.server.app import Application
from megatron_omega.generation.server.bounds import LOOPBACK_NAMES
from megatron_omega.generation.server.running import Server, listen

ROOT = Path(__file__).parents[3]


class Process:
    """A running `megatron-omega serve`."""

    def __init__(self, *words: object, **environment: str) -> None:
        command = [sys.executable, str(ROOT / "tools/serve.py"), *map(str, words)]
        self.child = subprocess.Popen(
            command, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.child.stdout is not None and self.child.stderr is not None
        self.errors: list[str] = []
        threading.Thread(target=self.errors.extend, args=(self.child.stderr,), daemon=True).start()
        self.announcement = self.child.stdout.readline()
        assert "http://" in self.announcement, self.errors
        self.url = self.announcement.split()[-1].rstrip("/")
        self.port = int(self.url.rpartition(":")[2])

    def end(self) -> int:
        """Ask it to stop; return its exit code."""
        self.child.terminate()
        return self.child.wait(timeout=60)


@contextmanager
def serving(folder: Path, *words: object) -> Iterator[Process]:
    """Serve two random models called one and two."""
    for seed, name in enumerate(("one", "two")):
        if not (folder / name).exists():
            write_run(folder / name, tiny_model(tiny_config(), seed))
    found = Process("--checkpoint", folder / "one", folder / "two", "--port", 0, *words)
    try:
        yield found
    finally:
        found.child.kill()
        found.child.wait()


class ThreadServer:
    """A server in a thread, its bounds as the test wants them."""

    def __init__(self, app: Application, key: str | None = None) -> None:
        self.server = Server(app.behind_door(key, LOOPBACK_NAMES), app.bounds, app.end_all)
        self.socket = listen("127.0.0.1", 0)
        self.port: int = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> ThreadServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()

    def drain(self) -> None:
        """Do what SIGTERM does."""
        if self._thread.is_alive() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self.server.should_exit or self.server.drain())

    def connect(self, data: bytes = b"") -> socket.socket:
        """Return a connection on which `data` was sent."""
        found = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        found.sendall(data)
        return found

    def _run(self) -> None:
        self._loop.run_until_complete(self.server.serve([self.socket]))
        self._loop.close()


def get(url: str) -> httpx.Response:
    """GET, with patience for a busy machine."""
    return httpx.get(url, timeout=60)


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    """POST JSON, likewise."""
    return httpx.post(url, json=body, timeout=60)


def request_bytes(body: bytes, **headers: object) -> bytes:
    """Return a POST to /v1/completions as bytes; `headers` replace its own."""
    found = {"host": "127.0.0.1", "content-type": "application/json", "content-length": len(body)}
    found |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in found.items() if value is not None]
    return "\r\n".join(["POST /v1/completions HTTP/1.1", *lines, "", ""]).encode() + body


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the server closes."""
    found = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionError:
            return found
        if not part:
            return found
        found += part
