"""What a run reads: pretraining text, supervised tasks, or both, as three parts that give a sample for any index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_omega.config.schema import RunConfig
from megatron_omega.data.batch import Part, Sample
from megatron_omega.data.pairs.opening import open_tasks
from megatron_omega.data.pairs.source import PairRows
from megatron_omega.data.samples import open_text
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError


class Source(Protocol):
    """The samples of one part. Cheap to pickle."""

    @property
    def part(self) -> Part: ...

    @property
    def corpora(self) -> Sequence[Any]:
        """What it reads: windows of text, then rows of tasks; each has a `shard` with a `prefix`."""
        ...

    def __len__(self) -> int:
        """Samples of one epoch."""
        ...

    def __getitem__(self, index: int) -> Sample: ...

    def epochs(self, samples: int) -> tuple[float, dict[str, float]]:
        """Return how often the first `samples` go through all of it, and through each corpus and task by its name."""
        ...

    def held(self, index: int) -> list[tuple[int, int]]:
        """Return (corpus, document) of all that a sample holds."""
        ...

    def samples_of(self, corpus: int, document: int, stop: int) -> list[int]:
        """Return, ascending, the samples before `stop` that hold a document of a corpus."""
        ...


@dataclass(frozen=True)
class Sources:
    """The three parts, and the tokenizer that made them."""

    train: Source
    validation: Source
    test: Source
    tokenizer: Tokenizer
    notices: tuple[str, ...] = ()
    """Sentences about what was read: how full rows are, what was cut."""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the training pairs of each task, so that a resumed run notices other ones; nothing without tasks."""
        return tuple(each.shard.fingerprint for each in self.train.corpora if isinstance(each, PairRows))


def sources_fingerprint(sources: Sources) -> str:
    """Return a short text that differs if two ranks were given corpora of other sizes, or another tokenizer."""
    parts = (sources.train, sources.validation, sources.test)
    sizes = [(len(part), [(len(corpus.shard), len(corpus)) for corpus in part.corpora]) for part in parts]
    return hashlib.sha256(repr((sources.tokenizer.fingerprint, sizes)).encode()).hexdigest()[:12]


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """Open the tokenizer of a run. Raises DataError if it is none, or has more pieces than the model has rows."""
    tokenizer = Tokenizer.open(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size to {tokenizer.vocab_size}"
        )
    return tokenizer


def open_sources(config: RunConfig) -> Sources:
    """Open tokenizer, shards and tasks of `config.data`.

    Raises DataError with every finding: missing or damaged files, a shard of another tokenizer, a vocabulary that does
    not fit the model, too little text for one sample, records that are no pairs.
    """
    data = config.data
    if not data.tasks and not data.corpora:
        raise DataError("data.corpora is empty; list at least one {prefix, weight}")
    tokenizer = open_tokenizer(config)
    if not data.tasks:
        return Sources(*open_text(config, tokenizer), tokenizer)
    text, findings = None, []
    if data.text_fraction:
        try:
            text = open_text(config, tokenizer)[0]
        except DataError as error:
            findings += error.findings
    try:
        tasks = open_tasks(config, tokenizer)
    except DataError as error:
        raise DataError(*findings, *error.findings) from None
    if findings:
        raise DataError(*findings)
    return Sources(tasks.train(text), tasks.validation, tasks.test, tokenizer, tasks.notices)
