"""What a model knows of held-out text: the same windows for every model, with and without the text before them.

A window is a prefix and its continuation, cut from one document. Measured is the loss of the continuation given the
whole prefix, and given the prefix's last token alone; the difference is what the context is worth. Given as much of
it as the decoder reads itself, the decoder's input is the same, and the difference is the encoder's. Beside them stands
what frequencies of tokens and pairs reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megatron_omega.data.indexed import IndexedShard
from megatron_omega.data.objectives import first_decoder_ids
from megatron_omega.data.tokenizer import SpecialIds, Tokenizer
from megatron_omega.errors import DataError
from megatron_omega.model.omega import Omega, vocabulary_logits

Ids = NDArray[np.int64]
POSITIONS: Mapping[str, slice] = {
    "first": slice(0, 1),
    "second": slice(1, 2),
    "3-8": slice(2, 8),
    "9-32": slice(8, 32),
    "33-": slice(32, None),
}
"""Places of labels in the continuation, for losses by position."""

_PSEUDO_COUNT = 5.0
_BATCH = 32


@dataclass(frozen=True)
class HeldOut:
    """Windows of held-out text."""

    prefixes: Ids  # [n, p]
    continuations: Ids  # [n, c]
    is_masked: NDArray[np.bool_]  # [n, p]
    """Which tokens of the prefix the MLM head has to find."""
    num_bytes: int
    """UTF-8 bytes of all continuations."""


def cut_windows(
    shard: IndexedShard, documents: range, tokenizer: Tokenizer, *, count: int, prefix: int, continuation: int,
    mask_rate: float = 0.15, vocab_size: int,
) -> HeldOut:  # fmt: skip
    """Cut up to `count` windows that do not overlap; the same ones every time.

    Raises:
        DataError: no document is long enough.
    """
    random = np.random.default_rng(0)
    length = prefix + continuation
    starts = [
        start
        for document in documents  # the last token closes a document
        for start in range(shard.start(document), shard.start(document + 1) - length, length)
    ]
    if not starts:
        raise DataError(f"no document of the validation part of {shard.prefix} has {length} tokens")
    places = random.permutation(np.asarray(starts))[:count].tolist()
    tokens = np.stack([np.asarray(shard.ids(at, at + length, vocab_size), dtype=np.int64) for at in places])
    chosen = np.argsort(random.random((len(tokens), prefix)), axis=1) < max(1, round(mask_rate * prefix))
    text = [tokenizer.decode(row[prefix:].tolist()) for row in tokens]
    return HeldOut(tokens[:, :prefix], tokens[:, prefix:], chosen, sum(len(part.encode()) for part in text))


@torch.inference_mode()
def measure(model: Omega, windows: HeldOut, special: SpecialIds) -> dict[str, float]:
    """Return losses in nats a token, the context's gain, the MLM head's loss and accuracy, and bits per byte."""
    losses = _continuation_losses(model, windows, windows.prefixes, special)
    without = _continuation_losses(model, windows, windows.prefixes[:, -1:], special)
    overlap = max(1, model.context.model.resolved_overlap)
    own = _continuation_losses(model, windows, windows.prefixes[:, -overlap:], special) if overlap > 1 else without
    found = {
        "loss": losses.mean(),
        "loss_without": without.mean(),
        "gain": without.mean() - losses.mean(),
        "encoder_gain": own.mean() - losses.mean(),
        "bits_per_byte": losses.sum() / windows.num_bytes / log(2),
    }
    by_position = {name: losses[:, place] for name, place in POSITIONS.items()}
    found |= {f"loss_{name}": part.mean() for name, part in by_position.items() if part.size}
    if model.context.model.has_mlm_head:
        found |= _masked(model, windows, special)
    return {name: float(value) for name, value in found.items()}


def _continuation_losses(model: Omega, windows: HeldOut, prefixes: Ids, special: SpecialIds) -> NDArray[np.float64]:
    """Return the loss of every token of the continuations: [n, c]."""
    return np.concatenate(
        [
            _losses(model, prefixes[rows], windows.continuations[rows], special)
            for rows in _batches(len(windows.prefixes))
        ]
    )


def _losses(model: Omega, prefixes: Ids, labels: Ids, special: SpecialIds) -> NDArray[np.float64]:
    settings = model.context.model
    count, length = labels.shape
    if settings.is_decoder_only:
        begin = np.full((count, 1), special.bos)
        decoder = np.concatenate([begin, prefixes, labels[:, :-1]], axis=1)
        hidden = model.hidden(_padded(decoder, settings.axial_width, special.pad))[0]
    else:
        first = [first_decoder_ids(row, special, settings.resolved_overlap) for row in prefixes]
        decoder = np.concatenate([np.asarray(first), labels[:, :-1]], axis=1)
        encoder = np.concatenate([np.full((count, 1), special.modes.prefix), prefixes], axis=1)
        width = settings.axial_width
        hidden = model.hidden((*_padded(encoder, width, special.pad), *_padded(decoder, width, special.pad)))[0]
    logits = vocabulary_logits(model, hidden[:, decoder.shape[1] - length : decoder.shape[1]])
    losses = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten(), reduction="none")
    return losses.view(count, length).double().numpy()


def _masked(model: Omega, windows: HeldOut, special: SpecialIds) -> dict[str, float]:
    """Return the MLM head's loss and accuracy, and the share of its commonest answer."""
    logits = masked_logits(model, windows.prefixes, windows.is_masked, special)
    labels = torch.from_numpy(windows.prefixes[windows.is_masked])
    answer = logits.argmax(-1)
    return {
        "mlm_loss": F.cross_entropy(logits, labels).item(),
        "mlm_accuracy": (answer == labels).float().mean().item(),
        "mlm_commonest_answer": answer.bincount().max().item() / len(answer),
    }


@torch.inference_mode()
def masked_logits(model: Omega, prefixes: Ids, chosen: NDArray[np.bool_], special: SpecialIds) -> Tensor:
    """Return the MLM head's logits for the chosen tokens of texts [n, p], all of them masked: [count, vocabulary]."""
    mode = special.modes.prefix if model.context.model.shared_mode_token else special.modes.mask
    width, found = model.context.model.axial_width, []
    for rows in _batches(len(prefixes)):
        seen = np.where(chosen[rows], special.mask, prefixes[rows])
        encoder = np.concatenate([np.full((len(seen), 1), mode), seen], axis=1)
        decoder = np.full((len(seen), 1), special.bos)
        _, encoded, bias = model.hidden((*_padded(encoder, width, special.pad), *_padded(decoder, width, special.pad)))
        at = torch.from_numpy(chosen[rows])
        found.append(vocabulary_logits(model, encoded[:, 1 : 1 + seen.shape[1]][at], bias))
    return torch.cat(found)


@dataclass(frozen=True)
class FoundToken:
    """A masked token that a model found, and how sure it was: given its own text, and given another's around it."""

    window: int
    place: int
    probability: float
    elsewhere: float


def found_tokens(model: Omega, windows: HeldOut, special: SpecialIds, times: float = 4.0) -> list[FoundToken]:
    """Return the masked tokens that were found because of their text: the surest first.

    The first answer is right, and its probability falls to less than 1 / `times` if the mask stands in the text of
    the next window instead.
    """
    labels = torch.from_numpy(windows.prefixes[windows.is_masked])
    given = masked_logits(model, windows.prefixes, windows.is_masked, special)
    other = masked_logits(model, np.roll(windows.prefixes, 1, axis=0), windows.is_masked, special)
    own, elsewhere = (logits.softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1) for logits in (given, other))
    is_found = (given.argmax(-1) == labels) & (own > times * elsewhere)
    places = np.argwhere(windows.is_masked)
    found = [
        FoundToken(int(places[number, 0]), int(places[number, 1]), float(own[number]), float(elsewhere[number]))
        for number in is_found.nonzero().flatten().tolist()
    ]
    return sorted(found, key=lambda token: -token.probability)


def _padded(ids: Ids, width: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and segments [n, s], s a multiple of `width`; what was added is padding."""
    more = -ids.shape[1] % width
    segments = np.pad(np.ones_like(ids), ((0, 0), (0, more)))
    return torch.from_numpy(np.pad(ids, ((0, 0), (0, more)), constant_values=pad)), torch.from_numpy(segments)


def _batches(count: int) -> Iterator[slice]:
    return (slice(start, start + _BATCH) for start in range(0, count, _BATCH))


def references(windows: HeldOut, shard: IndexedShard, documents: range, vocab_size: int) -> dict[str, float]:
    """Return what frequencies of tokens and of pairs in the training text reach on the windows."""
    start, stop = shard.start(documents[0]), shard.start(documents[-1] + 1)
    tokens = np.asarray(shard.ids(start, stop, vocab_size), dtype=np.int64)
    counts = np.bincount(tokens, minlength=vocab_size) + 0.1
    unigram = counts / counts.sum()
    pairs = np.bincount(tokens[:-1] * vocab_size + tokens[1:], minlength=vocab_size**2).reshape(vocab_size, -1)
    bigram = (pairs + _PSEUDO_COUNT * unigram) / (pairs.sum(axis=1, keepdims=True) + _PSEUDO_COUNT)
    before = np.concatenate([windows.prefixes[:, -1:], windows.continuations[:, :-1]], axis=1)
    surprise = -np.log(bigram[before, windows.continuations])
    wanted = windows.prefixes[windows.is_masked]
    return {
        "unigram": float(-np.log(unigram[windows.continuations]).mean()),
        "bigram": float(surprise.mean()),
        "bigram_first": float(surprise[:, 0].mean()),
        "unigram_first": float(-np.log(unigram[windows.continuations[:, 0]]).mean()),
        "mlm_unigram": float(-np.log(unigram[wanted]).mean()),
        "most_frequent_accuracy": float((wanted == unigram.argmax()).mean()),
    }


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float, float, int]:
    """Return mean and standard error of `first` - `second` over the seeds that both have, and how many those are."""
    shared: Sequence[int] = sorted(first.keys() & second.keys())
    differences = np.asarray([first[seed] - second[seed] for seed in shared])
    error = differences.std(ddof=1) / len(shared) ** 0.5 if len(shared) > 1 else float("nan")
    return float(differences.mean()) if shared else float("nan"), float(error), len(shared)
