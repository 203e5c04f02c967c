"""Random requests, and what a scheduler answers to them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_omega.export.loading import TextModel
from megatron_omega.generation.requests import Event, Request
from megatron_omega.generation.sampling import Sampling
from megatron_omega.generation.scheduler import Scheduler


def random_requests(model: TextModel, count: int, seed: int, *, most_tokens: int = 30) -> list[Request]:
    """Requests with all options; some begin alike."""
    draw, special = random.Random(seed), model.tokenizer.special
    texts = [[draw.choice(model.tokenizer.text_ids) for _ in range(70)] for _ in range(4)]
    found = []
    for _ in range(count):
        text = draw.choice(texts)[: draw.randint(1, 60)]
        beams = draw.choice([1, 1, 1, 2, 3])
        sampling = Sampling(
            draw.choice([0.0, 0.7, 1.0, 1.5]), draw.choice([0, 0, 3, 20]), draw.choice([1.0, 0.9, 0.5]),
            draw.choice([0.0, 0.0, 0.1]), draw.choice([1.0, 1.0, 1.3]), draw.choice([0.0, 0.0, 0.5]),
            draw.choice([0.0, 0.0, 0.4]),
        )  # fmt: skip
        is_decoder_only = model.config.model.is_decoder_only
        found.append(Request(
            () if is_decoder_only else (special.modes.prefix, *text),
            (special.bos, *text) if is_decoder_only else (text[-1],),
            draw.randint(1, most_tokens), sampling, draw.choice([(), ("a", "the"), ("e ",)]),
            draw.choice([(), (special.sentinels[0],)]),
            draw.choice([1, 1, 2, 3]) if beams == 1 else draw.randint(1, beams), beams,
            draw.choice([0.5, 1.0, 2.0]), draw.choice([0, 2]), draw.randint(0, 10**6),
        ))  # fmt: skip
    return found


def answers(scheduler: Scheduler, requests: Sequence[Request]) -> list[list[Event]]:
    """Submit all, and return what each is told."""
    numbers = [scheduler.submit(request) for request in requests]
    told: dict[int, list[Event]] = {number: [] for number in numbers}
    while not scheduler.idle:
        for event in scheduler.step():
            told[event.request].append(event)
    return [told[number] for number in numbers]
