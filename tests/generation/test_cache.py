"""What the cache keeps is enough, is no more than it says, and is given back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from written_models import VOCAB_SIZE, WIDTH, WINDOW, tiny_config, tiny_model

from megatron_omega.generation import encoder
from megatron_omega.generation.attending import Growing, Reading
from megatron_omega.generation.cache import Cache, Held
from megatron_omega.generation.decoder import Decoder, padded
from megatron_omega.generation.encoder import Memory
from megatron_omega.generation.pages import Pages
from megatron_omega.generation.prefixes import Prefixes
from megatron_omega.model.omega import Omega, vocabulary_logits

SHAPES: dict[str, dict] = {
    "omega": {},
    "decoder-only": {"encoder_layers": 0},
    "t5-like": {"encoder_branches": ["full"], "decoder_branches": ["causal"], "mlm_head": False},
    "select": {"decoder_branches": ["causal", "select", "local"], "select_blocks": 2},
    "sinks": {"attention_sinks": True},
    "pattern": {"decoder_branches": [["causal"], ["local", "axial"]]},
    "odd heads": {"num_attention_heads": 3, "hidden_size": 48},
    "one head": {"num_attention_heads": 1, "head_dim": 32},
}
TEXTS = ((37, 120, 0), (5, 90, 40), (20, 60, 17), (11, 33, 32))
"""Tokens of the encoder, of the decoder, and how many of those are read as a prompt: past rows, columns and windows;
the first text is longer than what the model was trained on (96)."""


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole_pass(model: Omega, encoder_ids: Sequence[int], decoder_ids: Sequence[int]) -> torch.Tensor:
    """Logits [t, vocab_size] of the forward pass that training uses."""
    streams = [decoder_ids] if model.context.model.is_decoder_only else [encoder_ids, decoder_ids]
    inputs = tuple(part for ids in streams for part in (torch.tensor([list(ids)]), torch.ones(1, len(ids)).long()))
    return vocabulary_logits(model, model.hidden(inputs)[0])[0]


def new_cache(model: Omega, pages: int = 64, slots: int = 8) -> Cache:
    context = model.context
    return Cache(context.model, context.local_heads, pages=pages, slots=slots, like=model.table.weight)


def read(decoder: Decoder, cache: Cache, held: Held, memory: Memory | None, ids: Sequence[int], chunk: int) -> None:
    for start in range(held.length, len(ids), chunk):
        part = ids[start : start + chunk]
        rows = padded(part)
        reading = Reading(decoder, cache, (held, memory), len(part), len(rows))
        decoder.run(rows, padded(range(start, start + len(part))), reading)
        reading.end()


@torch.inference_mode()
@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "learned"])
@pytest.mark.parametrize("shape", SHAPES)
def test_texts_of_all_lengths_grow_as_without_a_cache(shape: str, positions: str) -> None:
    fields = {**SHAPES[shape], "positions": positions}
    longest = {"decoder_seq_length": 120} if positions == "learned" else {}
    model = tiny_model(tiny_config(model=fields, data={"encoder_seq_length": 96, "decoder_seq_length": 96, **longest}))
    cache = new_cache(model)
    decoder = Decoder(model, cache.parts)
    texts, expected, ids = [], [], []
    for number, (encoder_tokens, tokens, prompt) in enumerate(TEXTS):
        before, after = random_ids(encoder_tokens, number), random_ids(tokens, number + 10)
        is_decoder_only = model.context.model.is_decoder_only
        memory = None if is_decoder_only else encoder.project(model, encoder.encode(model, before)[0])
        held = cache.hold(tokens)
        read(decoder, cache, held, memory, after[:prompt], chunk=13)
        texts.append((held, memory))
        expected.append(whole_pass(model, before, after))
        ids.append(after)
    while growing := [number for number, (held, _) in enumerate(texts) if held.length < len(ids[number])]:
        rows = Growing(decoder, cache, [texts[number] for number in growing], -(-len(growing) // 4) * 4)
        at = [texts[number][0].length for number in growing]
        hidden = decoder.run(padded([ids[n][i] for n, i in zip(growing, at, strict=True)]), padded(at), rows)
        rows.end()
        wanted = torch.stack([expected[number][i] for number, i in zip(growing, at, strict=True)])
        torch.testing.assert_close(decoder.logits(hidden)[: len(growing)], wanted, rtol=0, atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("shape", ["decoder-only", "select"])
def test_what_goes_on_from_another_text_is_as_if_it_had_read_it(shape: str) -> None:
    model = tiny_model(tiny_config(model={**SHAPES[shape], "encoder_layers": 0}))
    cache = new_cache(model)
    decoder, ids = Decoder(model, cache.parts), random_ids(60, 1)
    first = cache.hold(60)
    read(decoder, cache, first, None, ids[:35], chunk=16)
    second = cache.hold(60, first)
    assert second.pages[:4] == first.pages[:4] and not set(second.pages[4:]) & set(first.pages)
    for held, end in ((first, 60), (second, 50)):
        rows = []
        for i in range(35, end):
            growing = Growing(decoder, cache, [(held, None)], 4)
            rows.append(decoder.logits(decoder.run(padded([ids[i]]), padded([i]), growing))[0])
            growing.end()
        torch.testing.assert_close(torch.stack(rows), whole_pass(model, [], ids[:end])[35:], rtol=0, atol=2e-5)
    for held in (first, second):
        cache.release(held)
    assert (cache.pages.free, cache.slots.free) == (64, 8)


@pytest.mark.parametrize("tokens", [64, 512, 2048])
def test_a_text_holds_what_the_patterns_need(tokens: int) -> None:
    model = tiny_model(tiny_config())
    cache = new_cache(model, pages=256, slots=2)
    heads, layers, bytes_of_one = 4, 2, 2 * 8 * 4  # a key and a value of head_dim 8, fp32
    closed_form = tokens * heads + WINDOW * heads + tokens * heads // 2 + WIDTH * heads // 2
    assert cache.bytes_held(tokens) == closed_form * layers * bytes_of_one
    total = sum(store.data.nbytes for store in cache.stores.values())
    held = cache.hold(tokens)
    paged = sum(cache.stores[keeping].data.nbytes for keeping in ("causal", "column")) * len(held.pages) // 256
    ring = sum(cache.stores[keeping].data.nbytes for keeping in ("local", "row")) // 2
    assert paged + ring == cache.bytes_held(tokens) <= total


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "share", "drop"]), st.integers(1, 6)), max_size=40))
def test_pages_are_given_out_once_and_come_back(acts: list[tuple[str, int]]) -> None:
    pages, held = Pages(24), []
    for act, count in acts:
        if act == "take" and count <= pages.free:
            taken = pages.take(count)
            assert not {page for run in held for page in run} & set(taken)
            held.append(taken)
        elif act == "share" and held:
            pages.share(held[count % len(held)])
            held.append(held[count % len(held)])
        elif act == "drop" and held:
            pages.drop(held.pop(count % len(held)))
        assert pages.free == 24 - len({page for run in held for page in run})


def test_pages_side_by_side_are_preferred() -> None:
    pages = Pages(8)
    first, second = pages.take(2), pages.take(3)
    pages.drop(first)
    assert pages.take(3) == [5, 6, 7]
    assert (pages.take(1), second) == ([0], [2, 3, 4])


@torch.inference_mode()
def test_beginnings_are_kept_until_others_need_the_room() -> None:
    model = tiny_model(tiny_config(model={"encoder_layers": 0}))
    cache = new_cache(model, pages=20, slots=4)
    prefixes = Prefixes(cache, 2)
    decoder = Decoder(model, cache.parts)
    texts = [tuple(random_ids(16, seed)) for seed in range(3)]
    for text in texts:
        held = cache.hold(16)
        read(decoder, cache, held, None, text, chunk=16)
        prefixes.remember((), text, held)
        cache.release(held)
    assert [prefixes.find((), text, [16]) is None for text in texts] == [True, False, False]
    assert prefixes.forget() and prefixes.forget() and not prefixes.forget()
    assert (cache.pages.free, cache.slots.free) == (20, 4)
