"""/v1/embeddings and /v1/fill-mask: what the encoder makes of texts, in portions between the steps of growing texts."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError
from megatron_omega.generation.fill_mask import masked_ids
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.generation.server.questions import EmbeddingQuestion, FillMaskQuestion
from megatron_omega.generation.server.refusals import Refusal
from megatron_omega.generation.server.served import Served

Ids = tuple[int, ...]
_PORTION_TOKENS = 2048


def embedded_ids(served: Served, question: EmbeddingQuestion) -> list[Ids]:
    """Return what the encoder reads of each text. Raises Refusal."""
    if not served.has_encoder:
        raise Refusal(400, f"{served.name} has no encoder, so it gives no embeddings", param="model")
    width = served.text_model.config.model.hidden_size
    if question.dimensions not in (None, width):
        raise Refusal(400, f"dimensions={question.dimensions}; {served.name} has {width}", param="dimensions")
    _keep_count(served, len(question.input))
    mode = served.text_model.tokenizer.special.modes.prefix
    return [(mode, *served.encode(text, "input")) for text in question.input]


async def embeddings(served: Served, question: EmbeddingQuestion, texts: Sequence[Ids]) -> dict[str, Any]:
    """Return the means of the encoder's memory, as OpenAI's /v1/embeddings does."""
    found: list[list[float] | str] = []
    for portion in _portions(texts):
        vectors = await served.worker.call(lambda scheduler, portion=portion: scheduler.embed(portion).cpu().numpy())
        found += [_written(vector, question.encoding_format) for vector in vectors]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(found)]
    read = sum(map(len, texts)) - len(texts)
    return {
        "object": "list", "data": data, "model": served.name,
        "usage": {"prompt_tokens": read, "total_tokens": read},
    }  # fmt: skip


def filled_ids(served: Served, question: FillMaskQuestion) -> list[Ids]:
    """Return what the encoder reads of each text with masks. Raises Refusal."""
    if not served.fills_masks:
        raise Refusal(400, f"{served.name} has no MLM head, so it fills no masks", param="model")
    most = served.bounds.candidates
    if question.top_k > most:
        raise Refusal(400, f"top_k={question.top_k}; {most} are allowed", param="top_k")
    _keep_count(served, len(question.input))
    return [_masked(served, text) for text in question.input]


async def filled(served: Served, question: FillMaskQuestion, texts: Sequence[Ids]) -> dict[str, Any]:
    """Return the candidates of each mask, and the texts with the first of them."""
    tokenizer, data = served.text_model.tokenizer, []
    for portion in _portions(texts):
        found = await served.worker.call(
            lambda scheduler, portion=portion: _best(scheduler, tokenizer, portion, question.top_k)
        )
        data += [_answer(tokenizer, ids, *best) for ids, best in zip(portion, found, strict=True)]
    for index, answer in enumerate(data):
        answer["index"] = index
    read = sum(map(len, texts)) - len(texts)
    return {
        "object": "list", "data": data, "model": served.name,
        "usage": {"prompt_tokens": read, "total_tokens": read},
    }  # fmt: skip


def _masked(served: Served, text: str) -> Ids:
    special, model = served.text_model.tokenizer.special, served.text_model.config.model
    served.require_fitting(text, "input")
    try:
        ids = masked_ids(served.text_model.tokenizer, text)
    except DataError as error:
        raise Refusal(400, str(error), param="input") from None
    served.require_few(ids, "input")
    return (special.modes.prefix if model.shared_mode_token else special.modes.mask, *ids)


def _keep_count(served: Served, count: int) -> None:
    if count > served.bounds.prompts:
        raise Refusal(400, f"input has {count:,} texts; {served.bounds.prompts} are allowed", param="input")


def _portions(texts: Sequence[Ids]) -> Iterator[Sequence[Ids]]:
    """Cut texts into portions that a step may wait for."""
    first, size = 0, 0
    for place, ids in enumerate(texts):
        if place > first and size + len(ids) > _PORTION_TOKENS:
            yield texts[first:place]
            first, size = place, 0
        size += len(ids)
    if first < len(texts):
        yield texts[first:]


def _best(
    scheduler: Scheduler, tokenizer: Tokenizer, texts: Sequence[Ids], top_k: int
) -> list[tuple[list[list[int]], list[list[float]]]]:
    """Return for each text the best ids and their probabilities at each mask."""
    text_ids = torch.tensor(tokenizer.text_ids)
    found = []
    for probabilities in scheduler.fill(texts):
        best = _of_text(probabilities, text_ids).topk(min(top_k, len(text_ids)))
        found.append((text_ids[best.indices].tolist(), best.values.tolist()))
    return found


def _of_text(probabilities: Tensor, text_ids: Tensor) -> Tensor:
    return probabilities.cpu()[:, text_ids]


def _answer(tokenizer: Tokenizer, ids: Ids, best: list[list[int]], probabilities: list[list[float]]) -> dict[str, Any]:
    masks = [
        [
            {"token": number, "text": tokenizer.decode([number]), "probability": probability}
            for number, probability in zip(numbers, values, strict=True)
        ]
        for numbers, values in zip(best, probabilities, strict=True)
    ]
    firsts = iter(numbers[0] for numbers in best)
    whole = [next(firsts) if number == tokenizer.special.mask else number for number in ids]
    return {"object": "fill_mask", "index": 0, "text": tokenizer.decode(whole), "masks": masks}


def _written(vector: Any, form: str) -> list[float] | str:
    """Return a vector as numbers, or as OpenAI's base64 of little-endian fp32."""
    floats = np.asarray(vector, dtype="<f4")
    return base64.b64encode(floats.tobytes()).decode() if form == "base64" else floats.tolist()
