"""Clients that go, wait, push and stall; models that fail; an end that lets answers finish."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import pytest
from served_models import BOUNDS, Gated, application
from serving import ThreadServer, get, post, read_all, request_bytes
from starlette.testclient import TestClient

from megatron_omega.generation.requests import Event
from megatron_omega.generation.scheduler import Scheduler

LONG = {"prompt": "The quick", "max_tokens": 60, "temperature": 0}


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@pytest.fixture
def pool() -> Any:
    with ThreadPoolExecutor(4) as found:
        yield found


def posted(pool: ThreadPoolExecutor, server: ThreadServer, **body: Any) -> Future[httpx.Response]:
    return pool.submit(post, f"{server.url}/v1/completions", body)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_goes_frees_its_place(gated: Gated, is_stream: bool) -> None:
    with ThreadServer(gated.app) as server:
        connection = server.connect(request_bytes(json.dumps({**LONG, "stream": is_stream, "n": 2}).encode()))
        until(lambda: not gated.schedulers[0].idle)
        assert gated.worker.in_flight == 2
        gated.gate.release(3)  # it is in the middle of its text
        connection.close()
        until(lambda: gated.worker.in_flight == 0 and gated.schedulers[0].idle)
        assert gated.schedulers[0].cancelled == [1]
        assert gated.schedulers[0].free == gated.schedulers[0].limits.sequences
        assert "omega_clients_left_total 1.0" in get(f"{server.url}/metrics").text


def test_a_full_queue_sends_away_with_the_time_to_come_back(pool: ThreadPoolExecutor) -> None:
    gated = Gated(queue=5)
    with ThreadServer(gated.app) as server:
        waiting = posted(pool, server, **LONG, n=4)
        until(lambda: gated.worker.in_flight == 4)
        for is_stream in (False, True):
            refused = post(f"{server.url}/v1/completions", {**LONG, "n": 2, "stream": is_stream})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        fitting = posted(pool, server, **LONG)
        gated.open()
        assert waiting.result().status_code == fitting.result().status_code == 200
        assert gated.worker.in_flight == 0


def test_an_answer_has_its_time(pool: ThreadPoolExecutor) -> None:
    gated = Gated(answer_seconds=0.2)
    with ThreadServer(gated.app) as server:
        late = post(f"{server.url}/v1/completions", LONG)
        assert late.status_code == 503 and "took longer than 0.2 seconds" in late.json()["error"]["message"]
        assert post(f"{server.url}/v1/completions", {**LONG, "stream": True}).status_code == 503
        begun = post(f"{server.url}/v1/completions", {**LONG, "stream": True, "echo": True})
        assert begun.status_code == 200 and "took longer" in begun.text and begun.text.endswith("data: [DONE]\n\n")
        until(lambda: gated.schedulers[0].idle)
        assert gated.worker.in_flight == 0


def test_masks_are_filled_while_texts_wait(pool: ThreadPoolExecutor, gated: Gated) -> None:
    with ThreadServer(gated.app) as server:
        waiting = posted(pool, server, **LONG)
        until(lambda: not gated.schedulers[0].idle)
        filled = post(f"{server.url}/v1/fill-mask", {"input": ["The <mask>"] * 3})
        assert filled.status_code == 200 and not waiting.done()
        gated.open()
        assert waiting.result().status_code == 200


def test_a_stop_lets_answers_finish_and_takes_no_more(pool: ThreadPoolExecutor, gated: Gated) -> None:
    with ThreadServer(gated.app) as server, httpx.Client(base_url=server.url) as kept:
        assert kept.get("/health").status_code == 200
        waiting = [posted(pool, server, **LONG, stream=is_stream) for is_stream in (True, False)]
        until(lambda: gated.worker.in_flight == 2)
        server.drain()
        until(lambda: server.server.should_exit)
        with pytest.raises(httpx.HTTPError):  # the listening socket and idle connections are closed
            until(lambda: post(f"{server.url}/v1/completions", LONG).status_code == 200, 5)
        gated.open()
        stream, whole = (each.result() for each in waiting)
        assert stream.text.endswith("data: [DONE]\n\n") and "error" not in stream.text
        assert whole.status_code == 200 and whole.json()["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_stop_ends_answers_that_take_too_long(pool: ThreadPoolExecutor) -> None:
    gated = Gated(drain_seconds=0.3)
    with ThreadServer(gated.app) as server:
        waiting = [posted(pool, server, **LONG, stream=is_stream, echo=is_stream) for is_stream in (True, False)]
        until(lambda: gated.worker.in_flight == 2)
        server.drain()
        stream, whole = (each.result() for each in waiting)
        assert "the server is stopping" in stream.text and stream.text.endswith("data: [DONE]\n\n")
        assert whole.status_code == 503 and whole.headers["retry-after"]


def test_a_door_that_is_shut_says_so(client: TestClient) -> None:
    door: Any = client.app
    door.is_draining = True
    try:
        refused = client.post("/v1/completions", json=LONG)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert client.get("/health").status_code == 200
    finally:
        door.is_draining = False


class Faulty(Scheduler):
    """A scheduler whose steps fail where the prompt asks for it."""

    def step(self) -> list[Event]:
        if any(request.max_new_tokens == 13 for _, request in self._waiting):
            raise RuntimeError("a fault of the test")
        return super().step()


def test_a_fault_ends_its_answers_and_a_fresh_scheduler_takes_over(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_omega.generation.server import served

    monkeypatch.setattr(served, "Scheduler", Faulty)
    with ThreadServer(application("omega")) as server:
        for is_last in (False, False, True):
            failed = post(f"{server.url}/v1/completions", {**LONG, "max_tokens": 13})
            assert failed.status_code == 500 and "the model failed" in failed.json()["error"]["message"]
            if not is_last:  # one that works between two faults: they are not in a row
                assert post(f"{server.url}/v1/completions", LONG).status_code == 200
        for _ in range(2):
            post(f"{server.url}/v1/completions", {**LONG, "max_tokens": 13})
        assert get(f"{server.url}/health").status_code == 503
        assert post(f"{server.url}/v1/completions", LONG).status_code == 503


QUICK = {"header_seconds": 1.5, "body_seconds": 0.5, "write_seconds": 0.5}
BODY = json.dumps({"prompt": "The", "max_tokens": 2}).encode()


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", b""),
        (b"POST /v1/comp", b""),
        (b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n", b""),
        (b"\x16\x03\x01\x02\x00" + bytes(range(256)), b"HTTP/1.1 400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 100_000, b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", b"HTTP/1.1 400"),
        (request_bytes(BODY, content_length=len(BODY) + 5), b"HTTP/1.1 408"),
        (request_bytes(b"", content_length=10**30), b"HTTP/1.1 400"),
        (request_bytes(b"", content_length=10**15), b"HTTP/1.1 413"),
        (request_bytes(b"", content_length=10_000_000), b"HTTP/1.1 413"),
        (request_bytes(b"", content_length=None, transfer_encoding="chunked"), b"HTTP/1.1 408"),
        (request_bytes(b"zz\r\nxx\r\n", content_length=None, transfer_encoding="chunked"), b"HTTP/1.1 400"),
        (request_bytes(BODY, upgrade="websocket", connection="upgrade, close"), b"HTTP/1.1 200"),
    ],
    ids=range(16),
)
def test_half_open_slow_and_broken_connections_are_ended(stalled: ThreadServer, data: bytes, answer: bytes) -> None:
    found = read_all(stalled.connect(data))
    assert found.startswith(answer) and bool(found) == bool(answer), found
    assert get(f"{stalled.url}/health").status_code == 200


@pytest.fixture(scope="module")
def stalled() -> Any:
    with ThreadServer(application("omega", **QUICK)) as found:
        yield found


def test_a_body_of_ten_megabytes_is_cut_off(stalled: ThreadServer) -> None:
    connection = stalled.connect(request_bytes(b"", content_length=10_000_000))
    try:
        for _ in range(160):
            connection.sendall(b"x" * 65536)
    except ConnectionError:
        pass
    assert read_all(connection)[:12] in (b"", b"HTTP/1.1 413")


def test_bytes_one_by_one_are_no_way_around_the_clock(stalled: ThreadServer) -> None:
    connection = stalled.connect(b"GET / HTTP/1.1\r\nx: ")
    started = time.monotonic()
    with pytest.raises(ConnectionError):
        while time.monotonic() - started < 20:
            connection.sendall(b"a")
            time.sleep(0.05)


def test_a_kept_connection_is_let_go(stalled: ThreadServer) -> None:
    connection = stalled.connect(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    assert b'"status":"ok"' in read_all(connection)


def test_an_answer_that_nobody_reads_ends() -> None:
    with ThreadServer(application("omega", **{**QUICK, "header_seconds": 60})) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection = server.connect()
        with pytest.raises(ConnectionError):  # not TimeoutError, which is the client's own
            while True:  # pipelined: answers pile up
                connection.sendall(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 16)
        until(lambda: not server.server.server_state.connections)


def test_too_many_connections_are_closed() -> None:
    app = application("omega", connections=3)
    with ThreadServer(app) as server:
        kept = [server.connect() for _ in range(3)]
        until(lambda: len(server.server.server_state.connections) == 3)
        assert read_all(server.connect()) == b""
        for connection in kept:
            connection.close()
        until(lambda: not server.server.server_state.connections)
        assert get(f"{server.url}/health").status_code == 200


def test_bounds_make_sense() -> None:
    from megatron_omega.errors import ConfigError

    with pytest.raises(ConfigError, match="queue=0 must be more than 0"):
        replace(BOUNDS, queue=0)
