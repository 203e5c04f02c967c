"""Samples of supervised pairs: any index -> a `Sample`, alone or beside pretraining text.

Every sample is a row of one task, or a row of text. Which, is the blend's arithmetic: a function of the index, as all
else here. A validation has each held-out pair exactly once; samples beyond them are empty rows, which have no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_omega.data.batch import Batch, Origin, Part, Sample, pack_row
from megatron_omega.data.blending import Blend
from megatron_omega.data.objectives import Example, Opening, pair_example
from megatron_omega.data.packing import Budget
from megatron_omega.data.pairs.packing import Grouping, Lengths, group_pairs
from megatron_omega.data.pairs.shard import PairShard
from megatron_omega.data.permutation import Permutation, derive_key
from megatron_omega.data.tokenizer import SpecialIds

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Fit:
    """How pairs are cut to the streams of a run."""

    budget: Budget
    special: SpecialIds
    cuts_start: bool = False
    """Whether a prompt that is too long loses its start instead of its end."""

    @property
    def has_encoder(self) -> bool:
        return self.budget.encoder > 0

    def lengths(self, prompts: Lengths, targets: Lengths) -> tuple[Lengths, Lengths]:
        """Return the tokens that pairs take in the encoder and in the decoder, once they are cut."""
        if self.has_encoder:
            answers = np.minimum(targets + 1 + self._repeated(prompts), self.budget.decoder)
            return np.minimum(prompts + 1, self.budget.encoder), answers
        answers = np.minimum(targets + 1, self.budget.decoder)
        return np.zeros_like(prompts), np.minimum(prompts, self.budget.decoder - answers) + answers

    def cut(self, prompt: Ids, target: Ids) -> tuple[Ids, Ids, bool]:
        """Return prompt and target as they fit, and whether the target is whole: it then has an end token."""
        most = self.budget.decoder - int(self._repeated(np.asarray(len(prompt))))
        is_whole = len(target) < most
        target = target[:most]
        room = self.budget.encoder - 1 if self.has_encoder else self.budget.decoder - len(target) - is_whole
        excess = max(0, len(prompt) - room)
        kept = prompt[excess:] if self.cuts_start else prompt[: len(prompt) - excess]
        return kept, target, is_whole

    def too_long(self, prompts: Lengths, targets: Lengths) -> NDArray[np.bool_]:
        """Return which targets do not fit the decoder with their end token."""
        return targets + 1 + self._repeated(prompts) > self.budget.decoder

    def _repeated(self, prompts: Lengths) -> Lengths:
        """Return the tokens of prompts that the decoder reads before the one that predicts its first label."""
        read = np.minimum(prompts, self.budget.encoder - 1)
        return np.maximum(0, np.minimum(read, self.budget.overlap) - 1)

    def cut_prompts(self, prompts: Lengths, targets: Lengths) -> Lengths:
        """Return how many tokens every prompt loses."""
        encoder, decoder = self.lengths(prompts, targets)
        kept = encoder - 1 if self.has_encoder else decoder - np.minimum(targets + 1, self.budget.decoder)
        return prompts - kept


class PairRows:
    """The packed rows of some pairs of one task. Picklable: the pairs are mapped again in the other process."""

    def __init__(self, shard: PairShard, pairs: NDArray[np.int64], fit: Fit, key: int) -> None:
        self.shard, self.fit, self._key = shard, fit, key
        prompts, targets = (lengths[pairs] for lengths in shard.lengths())
        order = Permutation(len(pairs), key).many(np.arange(len(pairs))) if len(pairs) else pairs
        grouping = group_pairs(*fit.lengths(prompts, targets), fit.budget, order)
        self._grouping = Grouping(pairs[grouping.members], grouping.bounds)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self._grouping)

    @property
    def pairs(self) -> NDArray[np.int64]:
        """Numbers of its pairs, ascending."""
        return np.sort(self._grouping.members)

    @property
    def num_pairs(self) -> int:
        return len(self._grouping.members)

    def row_of(self, ordinal: int) -> tuple[int, int]:
        """Return the epoch and the row of the `ordinal`-th row that is drawn."""
        epoch, place = divmod(ordinal, len(self))
        return epoch, Permutation(len(self), derive_key(self._key, epoch))[place]

    def members(self, row: int) -> list[int]:
        """Return the pairs of a row."""
        return self._grouping.row(row).tolist()

    def holder(self, pair: int) -> int | None:
        """Return the row that holds a pair; None if none does."""
        found = np.flatnonzero(self._grouping.members == pair)
        return int(np.searchsorted(self._grouping.bounds, found[0], side="right")) - 1 if len(found) else None

    def drawn_at(self, row: int, epoch: int) -> int:
        """Return the ordinal at which `row` is drawn in `epoch`."""
        return epoch * len(self) + Permutation(len(self), derive_key(self._key, epoch)).index(row)

    def build(self, row: int, corpus: int) -> tuple[Batch, tuple[Origin, ...]]:
        """Return a row, and where its pairs came from; `corpus` is the task's number."""
        fit, examples, origins = self.fit, [], []
        encoder = decoder = 0
        for segment, number in enumerate(self.members(row), start=1):
            prompt, target, is_whole = fit.cut(*self.shard.pair(number))
            example = pair_example(
                prompt,
                target,
                fit.special,
                is_end=is_whole,
                has_encoder=fit.has_encoder,
                opening=Opening(fit.budget.overlap),
            )
            examples.append((example, encoder, decoder))
            encoder = fit.budget.align(encoder + len(example.encoder_ids))
            decoder = fit.budget.align(decoder + len(example.decoder_ids))
            origins.append(Origin(segment, "pair", corpus, number, 0, len(prompt) + len(target)))
        return _packed(examples, fit), tuple(origins)


def _packed(examples: Sequence[tuple[Example, int, int]], fit: Fit) -> Batch:
    return pack_row(
        examples,
        encoder_seq_length=fit.budget.encoder,
        decoder_seq_length=fit.budget.decoder,
        pad=fit.special.pad,
    )


class TextSamples(Protocol):
    """What is asked of pretraining text that is blended in."""

    @property
    def corpora(self) -> Sequence[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def epochs(self, samples: int) -> tuple[float, dict[str, float]]: ...
    def held(self, index: int) -> list[tuple[int, int]]: ...
    def samples_of(self, corpus: int, document: int, stop: int) -> list[int]: ...


class PairSource:
    """Training samples of tasks, and of text where some is blended in. `source[i]` works for every i >= 0."""

    def __init__(
        self, tasks: Sequence[PairRows], weights: Sequence[float], text: TextSamples | None, text_weight: float
    ) -> None:
        """`weights`: share of rows of each task; corpora of the text are numbered before the tasks."""
        self.part: Part = "train"
        self._tasks, self._text = tuple(tasks), text
        self._blend = Blend([text_weight if text is not None else 0.0, *weights])
        self.corpora: tuple[Any, ...] = (*(text.corpora if text is not None else ()), *tasks)

    def __len__(self) -> int:
        """Samples of one epoch: the rows of all tasks."""
        return sum(map(len, self._tasks))

    def epochs(self, samples: int) -> tuple[float, dict[str, float]]:
        """Return how often the first `samples` go through the pairs: all of them, and each task by its name."""
        text, *drawn = self._blend.counts(samples)
        passes = {f"task {task.shard.name}": rows / len(task) for task, rows in zip(self._tasks, drawn, strict=True)}
        of_text = self._text.epochs(text)[1] if self._text is not None else {}
        return sum(drawn) / max(1, len(self)), passes | of_text

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"samples are numbered from 0, not {index}")
        stream, ordinal = self._blend.locate(index)
        if stream == 0:
            assert self._text is not None
            return replace(self._text[ordinal], index=index)
        task = self._tasks[stream - 1]
        epoch, row = task.row_of(ordinal)
        return Sample(index, epoch, *task.build(row, self._number_of(stream)), 0)

    def held(self, index: int) -> list[tuple[int, int]]:
        """Return (corpus, document) of all that a sample holds; a pair counts as a document of its task."""
        stream, ordinal = self._blend.locate(index)
        if stream == 0:
            assert self._text is not None
            return self._text.held(ordinal)
        task = self._tasks[stream - 1]
        return [(self._number_of(stream), pair) for pair in task.members(task.row_of(ordinal)[1])]

    def samples_of(self, corpus: int, document: int, stop: int) -> list[int]:
        """Return, ascending, the samples before `stop` that hold a document of a corpus, or a pair of a task."""
        first = len(self.corpora) - len(self._tasks)
        if corpus < first:
            assert self._text is not None
            stream = 0
            ordinals = self._text.samples_of(corpus, document, self._blend.counts(stop)[0])
        else:
            stream, task = corpus - first + 1, self._tasks[corpus - first]
            row = task.holder(document)
            epochs = range(-(-self._blend.counts(stop)[stream] // len(task)))
            ordinals = [] if row is None else [task.drawn_at(row, epoch) for epoch in epochs]
        found = [self._blend.sample_of(stream, ordinal, stop) for ordinal in ordinals]
        return sorted(sample for sample in found if sample is not None)

    def _number_of(self, stream: int) -> int:
        return len(self.corpora) - len(self._tasks) + stream - 1


class HeldOutPairs:
    """Every held-out pair once, in rows; samples beyond them are empty."""

    def __init__(self, part: Part, tasks: Sequence[PairRows], fit: Fit) -> None:
        self.part: Part = part
        self.corpora, self._fit = tuple(tasks), fit

    def __len__(self) -> int:
        return sum(map(len, self.corpora))

    def epochs(self, samples: int) -> tuple[float, dict[str, float]]:
        """Return which share of the pairs the first `samples` have."""
        return min(1.0, samples / max(1, len(self))), {}

    def __getitem__(self, index: int) -> Sample:
        found = self._locate(index)
        if found is None:
            return Sample(index, 0, _packed([], self._fit), (), 0)
        task, row = found
        return Sample(index, 0, *self.corpora[task].build(row, task), 0)

    def held(self, index: int) -> list[tuple[int, int]]:
        """Return (task, pair) of all that a sample holds."""
        found = self._locate(index)
        return [] if found is None else [(found[0], pair) for pair in self.corpora[found[0]].members(found[1])]

    def samples_of(self, corpus: int, document: int, stop: int) -> list[int]:
        """Return the sample before `stop` that holds a pair of a task."""
        row = self.corpora[corpus].holder(document)
        sample = sum(map(len, self.corpora[:corpus])) + (row or 0)
        return [sample] if row is not None and sample < stop else []

    def _locate(self, index: int) -> tuple[int, int] | None:
        for number, task in enumerate(self.corpora):
            if index < len(task):
                return number, index
            index -= len(task)
        return None
