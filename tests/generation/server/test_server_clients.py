"""Clients that others wrote, against a server as a user starts it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from serving import Process, get, serving
from written_models import tiny_config, tiny_model, tiny_tokenizer, write_run

from megatron_omega.commands import serve
from megatron_omega.errors import ConfigError
from megatron_omega.export.loading import TextModel
from megatron_omega.generation.prompts import prompt_ids, scored_ids
from megatron_omega.generation.requests import Finished, Request
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler

KEY = "0123456789abcdef-key"
PROMPT = "The quick brown"


@pytest.fixture(scope="module")
def remote(server: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openais_package_completes_and_streams(remote: openai.OpenAI) -> None:
    whole = remote.completions.create(model="one", prompt=PROMPT, max_tokens=12, seed=5, n=2, logprobs=2, echo=True)
    assert len(whole.choices) == 2 and all(choice.text.startswith(PROMPT) for choice in whole.choices)
    found = whole.choices[0].logprobs
    assert found and found.tokens and found.token_logprobs and len(found.tokens) == len(found.token_logprobs) > 5
    parts = remote.completions.create(
        model="one", prompt=PROMPT, max_tokens=12, seed=5, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts = ["", ""]
    usage = None
    for part in parts:
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert [PROMPT + text for text in texts] == [choice.text for choice in whole.choices]
    assert usage and whole.usage and usage.total_tokens == whole.usage.total_tokens
    filled = remote.completions.create(model="two", prompt="The ", suffix=" dog", max_tokens=4, extra_body={"top_k": 5})
    assert filled.choices[0].finish_reason in ("stop", "length")


def test_openais_package_lists_and_embeds(remote: openai.OpenAI) -> None:
    assert [model.id for model in remote.models.list()] == ["one", "two"]
    vectors = remote.embeddings.create(model="one", input=["The fox", "The dog"])  # asks for base64 by itself
    assert [len(each.embedding) for each in vectors.data] == [32, 32]


def test_openais_package_understands_refusals(remote: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        remote.completions.create(model="gpt", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="top_p") as caught:
        remote.completions.create(model="one", prompt=PROMPT, top_p=2)
    assert caught.value.param == "top_p" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.RateLimitError):
        remote.completions.create(model="one", prompt=[PROMPT] * 41, max_tokens=1)


def test_lm_evals_client_measures_and_writes(server: Process) -> None:
    clients = pytest.importorskip("lm_eval.models.openai_completions", reason="needs the extra harness (lm-eval)")
    pytest.importorskip("tenacity", reason="lm-eval speaks to servers with it")
    from lm_eval.api.instance import Instance

    client = clients.LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="one", max_length=90)
    asked = [(PROMPT, " fox jumps"), ("Zwölf Boxkämpfer", " jagen Viktor"), ("The lazy", " dog.")]
    found = client.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked], disable_tqdm=True)
    config, tokenizer = tiny_config(), tiny_tokenizer()
    model = TextModel(tiny_model(config), config, tokenizer, Path("one"))
    for (context, continuation), (total, _) in zip(asked, found, strict=True):
        ids = scored_ids(model, tokenizer.encode(context + continuation))
        scored = Scheduler(model).prompt_log_probabilities(*ids).log_probabilities
        assert total == pytest.approx(sum(scored[len(tokenizer.encode(context)) :]), rel=1e-4)
    written = [Instance("generate_until", {}, (PROMPT, {"until": ["\n"], "max_gen_toks": 8}), 0)]
    (text,) = client.generate_until(written, disable_tqdm=True)
    scheduler, told = Scheduler(model), []
    scheduler.submit(Request(*prompt_ids(model, PROMPT), 8, Sampling(0), ("\n",)))
    while not scheduler.idle:
        told += scheduler.step()
    assert text == next(event.text for event in told if isinstance(event, Finished))


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_streams(server: Process) -> None:
    body = '{"prompt": "The", "max_tokens": 3, "stream": true}'
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("data: {") and done.stdout.endswith("data: [DONE]\n\n")


def test_sigterm_lets_a_stream_finish_and_ends_with_0(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        body = {"prompt": "The", "max_tokens": 96, "temperature": 5, "stream": True, "stop": []}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            threading.Timer(0, server.child.send_signal, [signal.SIGTERM]).start()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and not any('"error"' in line for line in rest)
        assert server.child.wait(timeout=60) == 0
        assert any("asked to stop" in line for line in server.errors)
        assert not any("Traceback" in line for line in server.errors)
        with pytest.raises(httpx.ConnectError):
            get(f"{server.url}/health")


def test_other_interfaces_need_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    write_run(tmp_path / "run")
    words = ["--checkpoint", str(tmp_path / "run"), "--host", "0.0.0.0"]
    with pytest.raises(ConfigError, match="no API key is set"):
        serve.main(words)
    file = tmp_path / "key"
    for content, sentence in (
        (b"short", "16 printable"),
        (b"\xff" * 20, "not text"),
        (("é" * 20).encode(), "16 printable"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=sentence):
            serve.main([*words, "--api-key-file", str(file)])
    with pytest.raises(ConfigError, match="cannot be read"):
        serve.main([*words, "--api-key-file", str(tmp_path / "none")])
    file.write_text(f"{KEY}\n")
    assert serve.api_key(file) == KEY
    monkeypatch.setenv(serve.KEY_VARIABLE, KEY)
    assert serve.api_key(None) == KEY


def test_what_cannot_be_served_is_said(server: Process, tmp_path: Path) -> None:
    words = ["--checkpoint", str(tmp_path)]
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        serve.main([*words, "--port", str(server.port)])
    for port in ("99999", "-1"):
        with pytest.raises(ConfigError, match="cannot listen"):
            serve.main([*words, "--port", port])
    with pytest.raises(ConfigError, match="answer_seconds=0 must be more than 0"):
        serve.main([*words, "--port", "0", "--max-seconds", "0"])
