"""What a model knows of plain texts: how probable they are, and what the MLM head finds of them when it is masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch

from megatron_omega.export.loading import TextModel
from megatron_omega.model.layers import Head
from megatron_omega.model.omega import vocabulary_logits
from megatron_omega.tasks.likelihood import room_of, tokens_together
from megatron_omega.tasks.metrics import Mean, ratio_of
from megatron_omega.tasks.questions import Exam, Question
from megatron_omega.tasks.reading import Ids, encoded
from megatron_omega.tasks.sharing import ALONE, Share

MASK_RATE = 0.15
OF_TEXTS = ("bits_per_byte", "byte_perplexity", "word_perplexity")


class Masked(NamedTuple):
    """A piece of text, and which of its tokens are masked."""

    ids: Ids
    places: Ids


def text_exam(model: TextModel, name: str, texts: Sequence[str]) -> Exam:
    """Return the exam of which every question is a whole text, given nothing."""
    questions = tuple(
        Question(f"{name}:{number}", text[:60], text, (), tuple(model.tokenizer.encode(text)))
        for number, text in enumerate(texts, start=1)
        if text
    )
    return Exam(name, OF_TEXTS, questions)


def masked_pieces(model: TextModel, texts: Sequence[str], seed: int = 0) -> list[Masked]:
    """Cut texts into what the encoder reads at once, and draw `MASK_RATE` of each piece's tokens, one at least."""
    room, found = room_of(model).encoder, []
    for number, text in enumerate(texts):
        ids = tuple(model.tokenizer.encode(text))
        for start in range(0, len(ids), room):
            piece = ids[start : start + room]
            random = np.random.default_rng([seed, number, start])
            count = max(1, round(MASK_RATE * len(piece)))
            found.append(Masked(piece, tuple(sorted(random.permutation(len(piece))[:count].tolist()))))
    return found


@torch.inference_mode()
def masked_metrics(model: TextModel, pieces: Sequence[Masked], share: Share = ALONE, seed: int = 0) -> dict[str, Mean]:
    """Return the share of masked tokens that the MLM head finds, and its loss, nats a masked token."""
    ordered = sorted(pieces, key=lambda piece: -len(piece.ids))
    most = tokens_together(model.device)
    batches: list[list[Masked]] = []
    for piece in ordered:
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].ids) > most:
            batches.append([])
        batches[-1].append(piece)
    found = share.collect(batches, lambda mine: [_score(model, batch) for batch in mine])
    rows = [row for batch in found for row in batch]
    counts = [float(row[2]) for row in rows]
    return {
        "masked_accuracy": ratio_of([row[0] for row in rows], counts, seed),
        "masked_loss": ratio_of([row[1] for row in rows], counts, seed),
    }


def _score(model: TextModel, batch: Sequence[Masked]) -> list[tuple[float, float, int]]:
    """Return found tokens, summed loss and number of masked tokens of every piece."""
    special, omega = model.tokenizer.special, model.model
    mode = special.modes.prefix if omega.context.model.shared_mode_token else special.modes.mask
    reads = []
    for piece in batch:
        read = list(piece.ids)
        for place in piece.places:
            read[place] = special.mask
        reads.append((mode, *read))
    memory, _ = encoded(model, reads)
    head = cast(Head, omega.module_named("head"))
    found = []
    for row, piece in enumerate(batch):
        places = torch.tensor(piece.places, device=model.device)
        logits = vocabulary_logits(omega, head.transform(memory[row, places + 1]), head.output_bias)
        wanted = torch.tensor([piece.ids[place] for place in piece.places], device=model.device)
        nats = (logits.logsumexp(-1) - logits.gather(1, wanted[:, None])[:, 0]).double().sum()
        found.append((float((logits.argmax(-1) == wanted).sum()), float(nats), len(piece.places)))
    return found
