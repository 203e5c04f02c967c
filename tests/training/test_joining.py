"""A run whose batch changes twice and which a corpus joins: nothing is read twice, and the tool knows what each step read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny import TinyCorpus

from megatron_omega.commands.inspect_data import examples_of_step, open_history, read_arguments, steps_of_document
from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.studies.layouts import train_rank

pytestmark = pytest.mark.distributed


def train_and_write_down(arguments: Arguments, record: Path) -> None:
    """Train as one rank; write down the samples in the order in which they are read, and what text they hold."""
    from megatron_omega.data.samples import SampleSource

    read = SampleSource.__getitem__

    def reading(source: SampleSource, index: int) -> object:
        sample = read(source, index)
        if source.part == "train":
            spans = [[span.corpus, span.document, span.offset, len(span.tokens)] for span in source.window(index)[1]]
            with record.open("a") as file:
                file.write(json.dumps([index, spans]) + "\n")
        return sample

    SampleSource.__getitem__ = reading  # pyright: ignore[reportAttributeAccessIssue]
    train_rank(arguments)


def test_what_a_step_read_is_known_and_nothing_is_read_twice(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    folder, record = tmp_path / "run", tmp_path / "record"
    first = f"{{prefix: {tiny_corpus.prefix}}}"
    both = f"{first}, {{prefix: {tiny_corpus.prefix}, from_sample: 24}}"
    phases = [
        (4, 4, first),
        (8, 2, first),
        (12, 6, both),
    ]  # last step, batch, corpora: joins in the middle of the third
    sizes = [size for (last, size, _), before in zip(phases, (0, 4, 8), strict=True) for _ in range(last - before)]
    for last, size, corpora in phases:
        settings = {
            "data.corpora": f"[{corpora}]", "batch.global_batch_size": size, "training.train_steps": last,
            "schedule.warmup_steps": 1, "evaluation.interval_steps": 0, "checkpoint.interval_steps": 0,
            "logging.run_directory": folder, "logging.tensorboard": "false", "resilience.integrity_interval_steps": 0,
        }  # fmt: skip
        overrides = tuple(Override(name, str(value)) for name, value in settings.items())
        run_ranks(train_and_write_down, 1, Arguments(str(tiny_corpus.run_yaml), None, overrides), record)
    read = [json.loads(line) for line in record.read_text().splitlines()]
    assert [index for index, _ in read] == list(range(sum(sizes)))
    tokens = Counter((corpus, doc, place) for _, spans in read for corpus, doc, start, count in spans
                     for place in range(start, start + count))  # fmt: skip
    assert {corpus for corpus, *_ in tokens} == {0, 1} and max(tokens.values()) == 1

    for step, size in enumerate(sizes, start=1):
        seen = list(examples_of_step(read_arguments(["--run", str(folder), "--step", str(step)])))
        before = sum(sizes[: step - 1])
        assert {example.sample for example in seen} == set(range(before, before + size)), step
    corpus, document = read[-1][1][0][:2]
    arguments = read_arguments(["--run", str(folder), "--find", str(document), "--corpus", str(corpus)])
    _, found = steps_of_document(arguments, open_history(folder))
    holding = [index for index, spans in read if [corpus, document] in [span[:2] for span in spans]]
    assert [one["sample"] for one in found] == holding
    ends = [sum(sizes[:step]) for step in range(1, len(sizes) + 1)]
    assert [one["step"] for one in found] == [1 + sum(end <= sample for end in ends) for sample in holding]
