"""What a server refuses, and that it goes on."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest
from served_models import application, client_of
from starlette.testclient import TestClient

JSON = {"content-type": "application/json"}
KEY = "a-key-of-more-than-16-characters"


def refused(
    client: TestClient, status: int, sentence: str, path: str = "/v1/completions", **body: Any
) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and sentence in error["message"]
    return error


@pytest.mark.parametrize(
    ("sentence", "param", "body"),
    [
        ("there is no parameter colour", "colour", {"colour": 1}),
        ("max_tokens='9': input should be a valid integer", "max_tokens", {"max_tokens": "9"}),
        ("temperature=-1", "temperature", {"temperature": -1}),
        ("top_p=0", "top_p", {"top_p": 0}),
        ("stop has an empty text", "stop", {"stop": ["a", ""]}),
        ("prompt must be a text, a list of texts", "prompt", {"prompt": {"a": 1}}),
        ("prompt must be a text, a list of texts", "prompt", {"prompt": [-1]}),
        ("prompt must be a text, a list of texts", "prompt", {"prompt": [True]}),
        ("best_of=1 must be n=2 or more", None, {"n": 2, "best_of": 1}),
        ("best_of cannot be streamed", None, {"best_of": 2, "stream": True}),
        ("n=3 must be at most beams=2", None, {"n": 3, "beams": 2}),
        ("logit_bias is not supported", None, {"logit_bias": {"1": 2}}),
        ("max_tokens=0 asks for nothing", None, {"max_tokens": 0}),
        ("max_tokens asks for 65 new tokens; 64 are allowed", "max_tokens", {"max_tokens": 65}),
        ("n asks for 17 answers to a prompt; 16 are allowed", "n", {"n": 17}),
        ("n asks for 160 answers in all; 128 are allowed", "n", {"n": 16, "prompt": ["a"] * 10}),
        ("logprobs asks for 21 alternatives; 20 are allowed", "logprobs", {"logprobs": 21}),
        ("prompt asks for 65 prompts; 64 are allowed", "prompt", {"prompt": [""] * 65}),
        ("stop asks for 17 stop strings", "stop", {"stop": ["x"] * 17}),
        ("stop asks for 257 characters", "stop", {"stop": "x" * 257}),
        ("prompt has 91 tokens; 90 are allowed", "prompt", {"prompt": "\t" * 91}),
        ("more than 90 tokens hold", "prompt", {"prompt": "x" * 5000}),
        ("prompt has the id 420; ids of omega end at 419", "prompt", {"prompt": [420]}),
        ("prompt and suffix have 120 tokens", "suffix", {"prompt": "\t" * 60, "suffix": "\t" * 60}),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(
    client: TestClient, sentence: str, param: str | None, body: dict[str, Any]
) -> None:
    error = refused(client, 400, sentence, **body)
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_all_findings_are_said_at_once(client: TestClient) -> None:
    message = refused(client, 400, "top_p=2", top_p=2, n=0, prompt=3)["message"]
    assert message.count("; ") == 2 and "n=0" in message and "prompt must be" in message


@pytest.mark.parametrize(
    ("path", "model", "sentence", "body"),
    [
        ("fill-mask", "t5", "t5 has no MLM head", {"input": "<mask>"}),
        ("fill-mask", "omega", "the text has no mask", {"input": "The fox"}),
        ("fill-mask", "omega", "top_k=101; 100 are allowed", {"input": "<mask>", "top_k": 101}),
        ("fill-mask", "omega", "input is missing", {}),
        ("embeddings", "decoder", "decoder has no encoder", {"input": "a"}),
        ("embeddings", "omega", "dimensions=3; omega has 32", {"input": "a", "dimensions": 3}),
        ("completions", "decoder", "decoder has no encoder, so it cannot fill in", {"suffix": "a"}),
    ],
)
def test_what_a_model_cannot_do_is_said(
    client: TestClient, path: str, model: str, sentence: str, body: dict[str, Any]
) -> None:
    refused(client, 400, sentence, f"/v1/{path}", model=model, **body)


def test_unknown_models_paths_and_methods(client: TestClient) -> None:
    error = refused(client, 404, "there is no model 'gpt-4'; there are: omega, decoder, t5", model="gpt-4")
    assert error["code"] == "model_not_found"
    for answer, status in (
        (client.get("/v1/models/none"), 404), (client.get("/v2"), 404), (client.get("/v1/completions"), 405),
        (client.delete("/v1/models"), 405),
    ):  # fmt: skip
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"prompt": NaN}',
        b'{"prompt": "\\ud800"}',
        b"[" * 10000,
        b'{"n": 1e400}',
        b'"x"',
    ],
)
def test_a_body_that_is_no_question_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_long_body_is_not_read(client: TestClient) -> None:
    answer = client.post("/v1/completions", content=b"x" * (1 << 17), headers=JSON)
    assert answer.status_code == 413 and "longer than 65,536 bytes" in answer.json()["error"]["message"]
    unannounced = client.post("/v1/completions", content=iter([b"x" * 4096] * 32), headers=JSON)
    assert unannounced.status_code == 413 and unannounced.headers["connection"] == "close"


def test_a_page_of_a_stranger_is_kept_out(client: TestClient) -> None:
    assert client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 400
    for host in ("evil.example", "evil.example:8000", ""):
        assert client.get("/v1/models", headers={"host": host}).status_code == 400
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_key_is_asked_for() -> None:
    with client_of(application("omega"), KEY) as client:
        for header in (None, "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xe9", KEY):
            headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/metrics").status_code == 401
        assert client.get("/").status_code == client.get("/health").status_code == 200


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 2**200, 0.5, -0.0, 1e308, "", "x", "x" * 3000, "\0", "\u2581", "𝔘" * 50,
    "<mask>", "[MASK]" * 30, "<extra_id_0></s>", [], [[]], [None], ["a", 1], [0], [[0], [1]], [2**40], {}, {"a": {}}, [[[1]]],
    ["x"] * 200, [1] * 500,
]  # fmt: skip
FIELDS = (
    "model", "user", "prompt", "suffix", "max_tokens", "temperature", "top_p", "n", "best_of", "stream", "stream_options",
    "logprobs", "echo", "stop", "presence_penalty", "frequency_penalty", "seed", "logit_bias", "top_k", "min_p",
    "repetition_penalty", "beams", "length_penalty", "input", "encoding_format", "dimensions", "unknown", "__class__",
)  # fmt: skip


def hostile_requests(count: int, seed: int) -> list[tuple[str, str, dict[str, str], bytes]]:
    """Draw requests that are wrong in one or several ways: fields, values, bytes, headers, paths and methods."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        path = "/v1/" + draw.choice(["completions"] * 4 + ["embeddings", "fill-mask"])
        body: dict[str, Any] = {"prompt": "The"} if path.endswith("completions") else {"input": "The <mask>"}
        body |= {"max_tokens": 2} if path.endswith("completions") else {}
        body |= {draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.randint(1, 4))}
        data = bytearray(json.dumps(body).encode())
        if draw.random() < 0.25:
            for _ in range(draw.randint(1, 4)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.1:
            del data[draw.randrange(len(data)) :]
        headers = dict(JSON)
        if draw.random() < 0.1:
            name = draw.choice(["content-type", "authorization", "host", "accept", "content-encoding", "x" * 200])
            headers[name] = draw.choice(["", "text/html", "Bearer x", "gzip", "y" * 4000, "\x01"])
        if draw.random() < 0.05:
            path = draw.choice(
                ["/v1/../health", "/%00", "/v1/models/%2e%2e%2f", "/" + "a" * 2000, "//", path + "?" + "q=1&" * 100]
            )
        found.append(
            (draw.choice(["POST"] * 15 + ["PUT", "HEAD", "OPTIONS", "TRACE", "GET"]), path, headers, bytes(data))
        )
    return found


def test_500_hostile_requests_are_refused_and_the_service_goes_on(client: TestClient) -> None:
    counts: Counter[int] = Counter()
    for method, path, headers, body in hostile_requests(500, seed=19):
        answer = client.request(
            method, path, headers=[(k.encode(), v.encode("latin-1")) for k, v in headers.items()], content=body
        )
        assert answer.status_code < 500, (method, path, body, answer.text)
        if answer.status_code >= 400 and method != "HEAD":
            assert answer.json()["error"]["message"]
        counts[answer.status_code] += 1
    assert counts[400] > 300 and counts[200] > 0
    assert client.get("/health").json()["status"] == "ok"
    assert client.post("/v1/completions", json={"prompt": "The", "max_tokens": 2}).status_code == 200
