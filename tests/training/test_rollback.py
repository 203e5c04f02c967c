"""Bad data: spikes are refused, the run goes back, and passes over them; what was good before is replayed bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyCorpus, run_python

from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.data.batch import Sample
from megatron_omega.data.samples import SampleSource
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.studies.layouts import arguments_for, parse_layout, train_rank

pytestmark = pytest.mark.distributed
STEPS, BATCH, CHECKPOINT = 13, 4, 4
POISONED = range(9 * BATCH, 12 * BATCH)
"""The samples of steps 10, 11 and 12; a checkpoint falls among them."""
TIMES = ("step_seconds", "tokens_per_second", "mfu")


def poison(samples: range) -> None:
    """Let every label of `samples` be a token that hardly occurs."""
    honest = SampleSource.__getitem__

    def poisoned(self: SampleSource, index: int) -> Sample:
        sample = honest(self, index)
        if self.part == "train" and index in samples:
            sample.row.lm_labels[sample.row.lm_labels >= 0] = 999
        return sample

    SampleSource.__getitem__ = poisoned


def train_poisoned(arguments: Arguments, samples: range) -> None:
    poison(samples)
    train_rank(arguments)


def train_leaving_out(arguments: Arguments, samples: range) -> None:
    """The undisturbed run: those samples are simply not there."""
    honest = SampleSource.__getitem__

    def without(self: SampleSource, index: int) -> Sample:
        if self.part == "train" and index >= samples.start:
            return replace(honest(self, index + len(samples)), index=index)
        return honest(self, index)

    SampleSource.__getitem__ = without
    train_rank(arguments)


def run(corpus: TinyCorpus, label: str, folder: Path, function: Any, samples: range, **settings: str) -> Path:
    layout = parse_layout(label)
    arguments = arguments_for(corpus.run_yaml, layout, [], steps=STEPS, folder=folder)
    own = {
        "checkpoint.interval_steps": str(CHECKPOINT), "checkpoint.asynchronous": "true",
        "batch.global_batch_size": str(BATCH), "resilience.spike_window": "16", "resilience.spike_z_score": "3", "logging.tensorboard": "true",
    }  # fmt: skip
    overrides = (*arguments.overrides, *(Override(*pair) for pair in (own | settings).items()))
    run_ranks(
        function, layout.world_size, Arguments(arguments.config, arguments.deepspeed_config, overrides), samples,
        timeout_seconds=240,
    )  # fmt: skip
    return folder / label


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(path: Path) -> list[dict[str, Any]]:
    hidden = (*TIMES, "consumed_samples", "epoch", "corpus_epochs")  # these count what was left out
    return [{name: value for name, value in row.items() if name not in hidden} for row in rows(path)]


def test_a_poisoned_window_is_left_out(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    found = run(tiny_corpus, "pp2", tmp_path / "poisoned", train_poisoned, POISONED)
    expected = run(tiny_corpus, "pp2", tmp_path / "without", train_leaving_out, POISONED)
    events = rows(found / "events.jsonl")
    bad = [event for event in events if event["event"] == "bad_step"]
    assert [event["step"] for event in bad] == [10, 11, 12]
    assert all(event["cause"] == "loss spike" and event["z_score"] > 3 for event in bad)
    assert all(document["source"].startswith(str(tiny_corpus.text)) for event in bad for document in event["documents"])
    (back,) = [event for event in events if event["event"] == "rollback"]
    assert (back["step"], back["to_step"]) == (12, 8)
    assert back["left_out"] == [[POISONED.start, POISONED.stop]]
    assert figures(found / "metrics.jsonl") == figures(expected / "metrics.jsonl")
    assert rows(found / "metrics.jsonl")[-1]["consumed_samples"] == STEPS * BATCH + len(POISONED)
    readers = [open_checkpoint(folder / f"checkpoints/step-{STEPS:08d}") for folder in (found, expected)]
    for name in readers[0].names():
        assert torch.equal(readers[0].tensor(name), readers[1].tensor(name)), name
    seen = run_python("tools/inspect_data.py", "--run", found, "--step", "10", "--json")
    samples = {json.loads(line)["sample"] for line in seen.stdout.splitlines()}
    assert samples == set(range(POISONED.stop, POISONED.stop + BATCH)), seen.stderr
