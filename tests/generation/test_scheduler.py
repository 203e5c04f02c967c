"""A request answers the same alone and in any company, and gives everything back."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from generation_parts import answers, random_requests
from hypothesis import given, settings
from hypothesis import strategies as st
from written_models import VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer

from megatron_omega.errors import ConfigError, DataError
from megatron_omega.export.loading import TextModel
from megatron_omega.generation import decoder, matrices
from megatron_omega.generation.beams import BeamSearch
from megatron_omega.generation.decoding import Continuation, encode
from megatron_omega.generation.prompts import prompt_ids
from megatron_omega.generation.requests import Event, Finished, Limits, Request, Token
from megatron_omega.generation.sampling import Sampling, penalised
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.generation.texts import GrowingText
from megatron_omega.parallel import products

LIMITS = Limits(8, 1200, 600, 32, prefixes=3)
DECODER_ONLY = {"encoder_layers": 0, "decoder_branches": ["causal", "select", "local", "axial"], "select_blocks": 2}
GREEDY = Sampling(0)


def text_model(**fields: object) -> TextModel:
    config = tiny_config(model=fields)
    return TextModel(tiny_model(config), config, tiny_tokenizer(), Path("somewhere"))


def told_of(events: Sequence[Event]) -> list[tuple]:
    """Everything but the number of the request."""
    return [tuple(event[1:]) for event in events]


def assert_nothing_is_held(scheduler: Scheduler) -> None:
    assert scheduler.idle and (scheduler.in_use, scheduler.waiting) == (0, 0)
    while scheduler._prefixes.forget():
        pass
    assert scheduler.cache_tokens_in_use == 0
    assert scheduler.free == scheduler.limits.sequences and not scheduler._memories._users


@pytest.mark.parametrize("smallest_packed", [matrices.SMALLEST_PACKED, 0], ids=["plain", "packed"])
@pytest.mark.parametrize("fields", [{}, DECODER_ONLY], ids=["omega", "decoder-only"])
def test_requests_that_come_and_go_answer_as_one_by_one(
    fields: dict, smallest_packed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "SMALLEST_PACKED", smallest_packed)
    monkeypatch.setattr(products, "SMALLEST", min(products.SMALLEST, smallest_packed))
    model, draw = text_model(**fields), random.Random(7)
    requests = random_requests(model, 100, seed=1)
    alone = Scheduler(model, LIMITS)
    expected = [told_of(answers(alone, [request])[0]) for request in requests]
    scheduler, waiting, numbers, cancelled = Scheduler(model, LIMITS), list(requests), [], set()
    found: dict[int, list[Event]] = {}
    while waiting or not scheduler.idle:
        while waiting and draw.random() < 0.5:
            numbers.append(scheduler.submit(waiting.pop(0)))
        if numbers and draw.random() < 0.05:
            cancelled.add(draw.choice(numbers))
            scheduler.cancel(draw.choice([*cancelled]))
        for event in scheduler.step():
            found.setdefault(event.request, []).append(event)
    assert_nothing_is_held(scheduler)
    for number, wanted in zip(numbers, expected, strict=True):
        told = told_of(found[number])
        ends = [event for event in found[number] if isinstance(event, Finished)]
        assert len({end.sample for end in ends}) == len(ends)
        if any(end.reason == "cancelled" for end in ends):
            tokens = [event for event in told if len(event) == len(Token._fields) - 1]
            assert number in cancelled and set(tokens) <= set(wanted)
        else:
            assert told == wanted  # ids, texts and log-probabilities, to the last bit


@pytest.mark.parametrize("fields", [{}, DECODER_ONLY], ids=["omega", "decoder-only"])
def test_greedy_is_the_most_probable_by_the_plain_decoder(fields: dict) -> None:
    model = text_model(**fields)
    prompts = [prompt_ids(model, text) for text in ("The quick", "", "Zwölf Boxkämpfer jagen Viktor quer über den")]
    requests = [Request(*ids, 40, GREEDY, log_probabilities=3) for ids in prompts]
    allowed = torch.tensor([*model.tokenizer.text_ids, model.tokenizer.special.eos])
    for (encoder_ids, decoder_ids), told in zip(prompts, answers(Scheduler(model, LIMITS), requests), strict=True):
        with torch.inference_mode():
            continuation = Continuation(model.model, encode(model.model, encoder_ids) if encoder_ids else None)
            new = list(decoder_ids)
            for token in told[:-1]:
                assert isinstance(token, Token)
                found = continuation.read(new).log_softmax(dim=-1)
                best = found[allowed].topk(3)
                assert token.id == token.alternatives[0][0] == allowed[best.indices[0]]
                assert token.log_probability == pytest.approx(found[token.id].item(), abs=1e-4)
                values = [value for _, value in token.alternatives]
                assert values == pytest.approx(best.values.tolist(), abs=1e-4)
                new = [token.id]
        end = told[-1]
        assert isinstance(end, Finished) and end.text == "".join(t.text for t in told[:-1] if isinstance(t, Token))
        assert end.ids == tuple(t.id for t in told[:-1] if isinstance(t, Token))


def test_samples_differ_and_the_first_is_that_of_its_seed() -> None:
    model = text_model()
    one = Request(*prompt_ids(model, "The quick"), 20, Sampling(1, 0, 1), seed=4)
    ends = [e for e in answers(Scheduler(model, LIMITS), [replace(one, samples=3)])[0] if isinstance(e, Finished)]
    single = answers(Scheduler(model, LIMITS), [one])[0][-1]
    by_sample = {end.sample: end.ids for end in ends}
    assert len(set(by_sample.values())) == 3 and isinstance(single, Finished) and by_sample[0] == single.ids


def exhaustive(model: TextModel, request: Request, width: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every text of two tokens, and those of one that end there, by score."""
    allowed = [*model.tokenizer.text_ids, model.tokenizer.special.eos]
    found = []
    with torch.inference_mode():
        memory = encode(model.model, request.encoder_ids)
        first = Continuation(model.model, memory).read(request.decoder_ids).log_softmax(-1)
        for token in first[allowed].topk(width).indices.tolist():
            number = allowed[token]
            if number == model.tokenizer.special.eos:
                found.append((first[number].item(), (number,)))
                continue
            second = Continuation(model.model, memory).read([*request.decoder_ids, number]).log_softmax(-1)
            found += [((first[number] + second[other]).item() / 2, (number, other)) for other in allowed]
    return sorted(found, reverse=True)


def test_beams_find_the_best_texts() -> None:
    model = text_model()
    request = Request(*prompt_ids(model, "The quick"), 2, GREEDY, beams=4, samples=3)
    ends = [event for event in answers(Scheduler(model, LIMITS), [request])[0] if isinstance(event, Finished)]
    assert [end.ids for end in ends] == [ids for _, ids in exhaustive(model, request, 4)[:3]]


def test_a_beam_ends_with_its_end_token_and_its_length_counts() -> None:
    rows = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for penalty, best in ((0.0, (2,)), (3.0, (0, 0, 0))):
        search = BeamSearch(3, 3, penalty, lambda ids: ids[-1] == 2)
        while search.advance(rows.expand(len(search.running), -1)):
            assert all(2 not in text.ids for text in search.running)
        assert search.best(1)[0].ids == best


def test_stop_strings_end_a_text_and_are_left_out() -> None:
    model = text_model()
    request = Request(*prompt_ids(model, "The"), 60, Sampling(1, 0, 1), seed=2)
    whole = answers(Scheduler(model, LIMITS), [request])[0][-1]
    assert isinstance(whole, Finished) and len(whole.text) > 12
    stop = whole.text[8:11]
    told = answers(Scheduler(model, LIMITS), [replace(request, stop=("never there", stop))])[0]
    end = told[-1]
    assert isinstance(end, Finished) and end.reason == "stop" and end.text == whole.text[: whole.text.index(stop)]
    assert "".join(event.text for event in told[:-1]) == end.text
    assert end.ids == whole.ids[: len(end.ids)]


@settings(max_examples=80, deadline=None)
@given(st.text("ab ", max_size=30), st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_comes_out(text: str, stop: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    growing, parts = GrowingText(tokenizer, tuple(stop)), []
    for number in tokenizer.encode(text):
        parts.append(growing.add(number))
        if growing.is_stopped:
            break
    parts.append(growing.end())
    found = "".join(parts)
    assert found == growing.text and text.startswith(found)
    assert not any(one in found for one in stop)
    assert growing.is_stopped == any(one in text for one in stop) and (growing.is_stopped or found == text)


def test_penalties_are_taken_from_what_was_read_and_written() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 3.0])
    repeated = penalised(logits, Sampling(repetition_penalty=2), (0, 1), [2])
    assert repeated.tolist() == [1.0, -4.0, 0.5, 3.0]
    counted = penalised(logits, Sampling(frequency_penalty=0.5, presence_penalty=0.25), (0, 1), [2, 2, 3])
    assert counted.tolist() == [2.0, -2.0, -0.25, 2.25]


def test_scores_are_the_models_log_probabilities() -> None:
    for fields in ({}, DECODER_ONLY):
        model = text_model(**fields)
        encoder_ids, _ = prompt_ids(model, "The quick")
        ids = torch.randint(0, VOCAB_SIZE, (80,), generator=torch.Generator().manual_seed(3)).tolist()
        scored = Scheduler(model, LIMITS).prompt_log_probabilities(encoder_ids, ids, 2)
        with torch.inference_mode():
            continuation = Continuation(model.model, encode(model.model, encoder_ids) if encoder_ids else None)
            wanted = [continuation.read([now]).log_softmax(-1)[then].item() for now, then in pairwise(ids)]
        assert scored.log_probabilities == pytest.approx(wanted, abs=1e-4)
        assert [len(best) for best in scored.alternatives] == [2] * 79


def test_texts_are_encoded_together_as_alone() -> None:
    model = text_model()
    special = model.tokenizer.special
    texts = [[special.modes.mask, *[special.mask] * count, *model.tokenizer.text_ids[:length]] for count, length in
             ((1, 3), (2, 20), (1, 40), (3, 9))]  # fmt: skip
    together, alone = (
        Scheduler(model, replace(LIMITS, chunk_tokens=400)),
        Scheduler(model, replace(LIMITS, chunk_tokens=1)),
    )
    torch.testing.assert_close(together.embed(texts), alone.embed(texts), rtol=0, atol=1e-5)
    for found, wanted in zip(together.fill(texts), alone.fill(texts), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert [len(found) for found in alone.fill(texts)] == [1, 2, 1, 3]


def test_what_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(text_model(), Limits(2, 64, 16))
    with pytest.raises(ConfigError, match="3 samples or beams"):
        scheduler.submit(Request((5,), (2,), 4, samples=3))
    with pytest.raises(DataError, match="do not fit the cache"):
        scheduler.submit(Request((5,), (2,), 65))
    with pytest.raises(DataError, match="17 tokens"):
        scheduler.submit(Request((5,) * 17, (2,), 4))
    with pytest.raises(ConfigError) as caught:
        Request((5,), (), 0, stop=("",), samples=0)
    assert len(caught.value.findings) == 4
    assert scheduler.idle


@pytest.mark.parametrize("fields", [{}, DECODER_ONLY], ids=["encoder-decoder", "decoder-only"])
def test_compiled_layers_write_the_same(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_projected", "_queried", "_fed"):  # traced as they would be; what a compiler makes of it is its own
        plain = inspect.unwrap(getattr(decoder, name))
        monkeypatch.setattr(decoder, name, torch.compile(plain, backend="aot_eager", fullgraph=True))
    model = text_model(**fields)
    requests = [replace(r, sampling=GREEDY, samples=1, beams=1) for r in random_requests(model, 4, seed=3)]
    eager, compiled = Scheduler(model, LIMITS), Scheduler(model, LIMITS)
    compiled.compile()
    expected, found = (answers(scheduler, requests) for scheduler in (eager, compiled))
    assert [[event[1] for event in told] for told in expected] == [[event[1] for event in told] for told in found]
