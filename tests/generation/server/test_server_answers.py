"""What a server answers, held against the scheduler asked directly."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from served_models import text_model
from starlette.testclient import TestClient
from written_models import tiny_tokenizer

from megatron_omega.generation.fill_mask import fill_mask
from megatron_omega.generation.prompts import gap_ids, prompt_ids, scored_ids
from megatron_omega.generation.requests import Finished, Request, Token
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.generation.server.pages import PAGE_FILES

PROMPT = "The quick brown"


def post(client: TestClient, path: str = "completions", **body: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    answer = client.post("/v1/completions", json={**body, "stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    *lines, last, _ = answer.text.split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def direct(shape: str, request: Request) -> tuple[list[Finished], list[Token]]:
    scheduler = Scheduler(text_model(shape))
    scheduler.submit(request)
    events = []
    while not scheduler.idle:
        events += scheduler.step()
    return [e for e in events if isinstance(e, Finished)], [e for e in events if isinstance(e, Token)]


@pytest.mark.parametrize("shape", ["omega", "decoder", "t5"])
def test_a_completion_is_what_the_scheduler_writes(client: TestClient, shape: str) -> None:
    encoder, decoder = prompt_ids(text_model(shape), PROMPT)
    sampling = Sampling(0.9, 40, 0.9, 0.01, 1.1, 0.2, 0.1)
    finished, tokens = direct(shape, Request(encoder, decoder, 12, sampling, samples=2, seed=7, log_probabilities=3))
    body = {
        "model": shape, "prompt": PROMPT, "max_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01,
        "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1, "n": 2, "seed": 7, "logprobs": 3,
    }  # fmt: skip
    found = post(client, **body)
    assert found["model"] == shape and found["object"] == "text_completion"
    assert [choice["text"] for choice in found["choices"]] == [each.text for each in finished]
    assert [choice["finish_reason"] for choice in found["choices"]] == [each.reason for each in finished]
    first = [token for token in tokens if token.sample == 0]
    logprobs = found["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx([token.log_probability for token in first])
    for name, value, top, token in zip(
        *map(logprobs.get, ("tokens", "token_logprobs", "top_logprobs")), first, strict=True
    ):
        others = dict(token.alternatives)
        assert top[name] == value and len(top) == len({*others, token.id})
        assert max(top.values()) == pytest.approx(max(*others.values(), value))
    written = sum(len(each.ids) for each in finished)
    count = len(tiny_tokenizer().encode(PROMPT))
    assert found["usage"] == {"prompt_tokens": count, "completion_tokens": written, "total_tokens": count + written}


def test_a_stream_is_the_whole_answer_in_parts(client: TestClient) -> None:
    body = {"prompt": [PROMPT, "Zwölf"], "max_tokens": 20, "n": 2, "seed": 3, "logprobs": 2, "echo": True}
    whole = post(client, **body)
    chunks = streamed(client, **body, stream_options={"include_usage": True})
    assert chunks.pop()["usage"] == whole["usage"]
    assert len(chunks) > len(whole["choices"]) and len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values


def test_an_echo_measures_its_prompt(client: TestClient) -> None:
    found = post(client, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    (choice,) = found["choices"]
    ids = tiny_tokenizer().encode(PROMPT)
    scored = Scheduler(text_model("omega")).prompt_log_probabilities(*scored_ids(text_model("omega"), ids), 1)
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(scored.log_probabilities)
    assert choice["logprobs"]["tokens"] == [tiny_tokenizer().decode([number]) for number in ids]
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        assert PROMPT[offset:].startswith(token)
    assert found["usage"]["completion_tokens"] == 0


def test_ids_are_a_prompt_too(client: TestClient) -> None:
    ids = tiny_tokenizer().encode(PROMPT)
    texts = [
        post(client, prompt=prompt, max_tokens=8, temperature=0)["choices"][0]["text"]
        for prompt in (PROMPT, ids, [ids])
    ]
    assert len(set(texts)) == 1
    assert post(client, prompt=[ids], max_tokens=0, echo=True)["choices"][0]["text"] == PROMPT


def test_the_best_of_several_is_answered(client: TestClient) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "seed": 5, "logprobs": 0}
    every = post(client, **body, n=4)["choices"]
    means = [sum(each["logprobs"]["token_logprobs"]) / len(each["logprobs"]["token_logprobs"]) for each in every]
    best = post(client, **body, n=1, best_of=4)
    assert best["choices"][0]["text"] == every[max(range(4), key=means.__getitem__)]["text"]
    assert best["usage"]["completion_tokens"] == sum(len(each["logprobs"]["tokens"]) for each in every)


def test_a_seed_makes_it_repeatable_and_each_prompt_has_its_own(client: TestClient) -> None:
    body = {"prompt": [PROMPT, PROMPT], "max_tokens": 12}
    first, again, other = (post(client, **body, seed=seed)["choices"] for seed in (1, 1, 2))
    assert first == again != other
    assert first[0]["text"] != first[1]["text"]
    assert post(client, **body)["choices"] != post(client, **body)["choices"]


def test_a_suffix_is_filled_up_to_by_the_span_objective(client: TestClient) -> None:
    tokenizer = tiny_tokenizer()
    before, after = tokenizer.encode("The quick "), tokenizer.encode(" fox")
    for most, mode in ((6, tokenizer.special.modes.span), (30, tokenizer.special.modes.extreme)):
        encoder, decoder, ends = gap_ids(text_model("omega"), before, after, most)
        assert encoder == (mode, *before, tokenizer.special.sentinels[0], *after)
        assert decoder == (tokenizer.special.bos, tokenizer.special.sentinels[0]) and ends == (
            tokenizer.special.sentinels[1],
        )
        finished, _ = direct("omega", Request(encoder, decoder, most, Sampling(1, 0, 1), end_ids=ends, seed=4))
        found = post(client, prompt="The quick ", suffix=" fox", max_tokens=most, seed=4)
        assert found["choices"][0]["text"] == finished[0].text
        assert found["usage"]["prompt_tokens"] == len(before) + len(after)


def test_masks_are_filled(client: TestClient) -> None:
    texts = ["The <mask> fox[MASK].", "A <mask>"]
    found = post(client, "fill-mask", input=texts, top_k=4)
    for text, answer in zip(texts, found["data"], strict=True):
        expected = fill_mask(text_model("omega"), text, top_k=4)
        assert answer["text"] == expected.text
        for mask, wanted in zip(answer["masks"], expected.masks, strict=True):
            assert [each["token"] for each in mask] == [each.token_id for each in wanted]
            assert [each["text"] for each in mask] == [each.piece for each in wanted]
            assert [each["probability"] for each in mask] == pytest.approx(
                [each.probability for each in wanted], rel=1e-4
            )


def test_embeddings_are_means_of_the_memory(client: TestClient) -> None:
    texts = ["The fox", "Zwölf", ""]
    numbers = post(client, "embeddings", input=texts)["data"]
    packed = post(client, "embeddings", input=texts, encoding_format="base64")["data"]
    mode = tiny_tokenizer().special.modes.prefix
    expected = Scheduler(text_model("omega")).embed([(mode, *tiny_tokenizer().encode(text)) for text in texts]).numpy()
    for place in range(3):
        np.testing.assert_allclose(numbers[place]["embedding"], expected[place], atol=1e-6)
        np.testing.assert_allclose(
            np.frombuffer(base64.b64decode(packed[place]["embedding"]), "<f4"), expected[place], atol=1e-6
        )


def test_texts_are_cut_as_the_model_cuts_them(client: TestClient) -> None:
    ids, special = tiny_tokenizer().encode(PROMPT), tiny_tokenizer().special
    assert client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"] == ids
    opened = client.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": True}).json()
    assert opened["tokens"] == [special.bos, *ids] and opened["count"] == len(ids) + 1
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPT}
    assert client.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    card = client.get("/tokenizer_info", params={"model": "t5"}).json()
    assert client.post("/tokenize", json={"prompt": card["eos_token"]}).json()["tokens"] == [special.eos]


def test_models_are_listed_with_what_they_can(client: TestClient) -> None:
    cards = {card["id"]: card["abilities"] for card in client.get("/v1/models").json()["data"]}
    assert cards == {
        "omega": {"fill_mask": True, "suffix": True, "embeddings": True},
        "decoder": {"fill_mask": False, "suffix": False, "embeddings": False},
        "t5": {"fill_mask": False, "suffix": True, "embeddings": True},
    }
    assert client.get("/v1/models/t5").json()["id"] == "t5"


def test_metrics_count_what_was_done(client: TestClient) -> None:
    def figure(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))

    names = ("omega_generated_tokens_total", "omega_prompt_tokens_total", "omega_first_token_seconds_count")
    before = [figure(name) for name in names]
    usage = post(client, prompt=PROMPT, max_tokens=5)["usage"]
    streamed(client, prompt=PROMPT, max_tokens=1)
    wanted = [usage["completion_tokens"] + 1, 2 * usage["prompt_tokens"], 2]
    assert [figure(name) - start for name, start in zip(names, before, strict=True)] == wanted
    assert figure("omega_answers_in_flight") == 0
    assert client.get("/health").json()["status"] == "ok"


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    for path in PAGE_FILES:
        answer = client.get(path)
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert answer.status_code == 200 and text and "http:" not in text and "https:" not in text
