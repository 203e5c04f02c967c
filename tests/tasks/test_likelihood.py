"""Likelihoods equal those found token by token, whatever the model, the batch and the number of ranks."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
import torch
from task_parts import DECODER_ONLY, text_model
from written_models import ThreadPeers

from megatron_omega.export.loading import TextModel
from megatron_omega.generation.decoding import Continuation, encode
from megatron_omega.generation.prompts import prompt_ids
from megatron_omega.tasks.likelihood import Asked, Likelihood, Room, is_cut, likelihoods, room_of, windows
from megatron_omega.tasks.sharing import Share

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "encoder-decoder": {},
    "begins with begin": {"model": {"decoder_start": "begin"}},
    "reads one token again": {"model": {"decoder_overlap": 1}},
    "select and sinks": {"model": {"decoder_branches": ["select", "local"], "select_blocks": 1, "attention_sinks": True}},
    "decoder-only": DECODER_ONLY,
}  # fmt: skip


@torch.inference_mode()
def token_by_token(model: TextModel, asked: Asked) -> Likelihood:
    """One window, read as a text that is generated: one token after the other."""
    encoder, start = prompt_ids(model, asked.context)
    continuation = Continuation(model.model, encode(model.model, encoder) if encoder else None)
    logits = continuation.read([*start, *asked.before])
    nats, is_greedy = 0.0, True
    for token in asked.continuation:
        nats += float(logits.double().log_softmax(-1)[token])
        is_greedy &= int(logits.argmax()) == token
        logits = continuation.read([token])
    return Likelihood(nats, is_greedy)


def random_asked(model: TextModel, count: int, *, longest: int, seed: int = 0) -> list[Asked]:
    """Contexts with one to five continuations each, some of one token, some empty contexts, some with examples before."""
    draw, ids = random.Random(seed), model.tokenizer.text_ids
    found = []
    while len(found) < count:
        context = tuple(draw.choices(ids, k=draw.choice([0, draw.randint(1, longest)])))
        before = tuple(draw.choices(ids, k=draw.choice([0, 0, draw.randint(1, 9)])))
        for _ in range(draw.randint(1, 5)):
            found.append(Asked(context, tuple(draw.choices(ids, k=draw.choice([1, draw.randint(1, longest)]))), before))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_are_those_token_by_token(name: str) -> None:
    model = text_model(**MODELS[name])
    asked = random_asked(model, 60, longest=40)
    found = likelihoods(model, asked)
    for one, value in zip(asked, found, strict=True):
        expected = token_by_token(model, one)
        assert value.nats == pytest.approx(expected.nats, rel=1e-6), one
        assert value.is_greedy == expected.is_greedy


@pytest.mark.parametrize("name", MODELS)
def test_a_long_text_is_the_sum_of_its_windows(name: str) -> None:
    model = text_model(**MODELS[name])
    has_encoder = name != "decoder-only"
    read_again = max(0, model.config.model.resolved_overlap - 1) if has_encoder else 0
    room = Room(95 if has_encoder else 0, 96 - read_again)
    assert room == room_of(model)
    ids = tuple(random.Random(1).choices(model.tokenizer.text_ids, k=500))
    for asked in (Asked((), ids), Asked(ids[:300], ids[300:]), Asked(ids[:10], ids[10:200], ids[:20])):
        parts = list(windows(asked, room))
        assert sum((part.continuation for part in parts), ()) == asked.continuation
        for part in parts:
            assert (
                len(part.context) <= room.encoder
                if room.encoder
                else len(part.before + part.context + part.continuation) <= 96
            )
            assert (asked.context + asked.continuation).index(part.continuation[0]) >= 0
        expected = sum(token_by_token(model, part).nats for part in parts)
        assert likelihoods(model, [asked])[0].nats == pytest.approx(expected, rel=1e-6)


def test_windows_leave_no_token_without_its_context() -> None:
    for room in (Room(0, 16), Room(11, 16)):
        for length in range(1, 80):
            for split in range(0, length, 7):
                text = tuple(range(length))
                parts = list(windows(Asked(text[:split], text[split:]), room))
                assert sum((part.continuation for part in parts), ()) == text[split:]
                for part in parts:
                    at = part.continuation[0]
                    assert part.context == text[at - len(part.context) : at]
                    if room.encoder:
                        assert len(part.continuation) <= 16 and len(part.context) == min(at, 11)
                    else:
                        assert len(part.context + part.continuation) <= 16
                        assert len(part.context) >= min(at, 8)
    assert is_cut(Asked(tuple(range(20)), (1,)), Room(11, 16))
    assert not is_cut(Asked(tuple(range(11)), (1,) * 50), Room(11, 16))


@pytest.mark.parametrize("name", ["encoder-decoder", "decoder-only"])
def test_neither_batches_nor_ranks_change_a_likelihood(name: str) -> None:
    model = text_model(**MODELS[name])
    asked = random_asked(model, 40, longest=150, seed=2)
    alone = likelihoods(model, asked)
    for batch_tokens in (1, 400):
        other = likelihoods(model, asked, batch_tokens=batch_tokens)
        assert [one.nats for one in other] == pytest.approx([one.nats for one in alone], rel=1e-6)
    board: list[Any] = [None] * 3
    barrier = threading.Barrier(3, timeout=60)

    def one_rank(rank: int) -> list[Likelihood]:
        peers = ThreadPeers(rank, board, barrier)
        return likelihoods(
            model, asked, Share(rank, 3, lambda value: peers.exchange(orjson.loads(orjson.dumps(value))))
        )

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one_rank, range(3))) == [alone] * 3
