"""Only ranks that read data open the corpus; the others are told what they need to know of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TinyCorpus

from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.layout import Layout, reads_data
from megatron_omega.config.load import load_config
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.studies.layouts import train_rank


@pytest.mark.parametrize(
    ("schedule", "readers"), [("1f1b", [0, 1, 6, 7]), ("interleaved", [0, 1, 6, 7]), ("dualpipev", [0, 1])]
)
def test_the_first_stage_and_the_one_with_the_loss_read(schedule: str, readers: list[int]) -> None:
    virtual = "2" if schedule == "interleaved" else "1"
    names = ("pipeline_schedule", "pipeline_parallel_size", "virtual_stages")
    config = load_config(
        None, {f"parallel.{name}": text for name, text in zip(names, (schedule, "4", virtual), strict=True)}
    )
    assert [rank for rank in range(8) if reads_data(config, Layout(4, 2, 1), rank)] == readers


def _train_and_count(arguments: Arguments) -> int:
    from megatron_omega.data.sources import open_sources
    from megatron_omega.run import train as module

    opened: list[int] = []
    module.open_sources = lambda config: (opened.append(1), open_sources(config))[1]
    train_rank(arguments)
    return len(opened)


@pytest.mark.distributed
def test_a_rank_in_the_middle_of_a_pipeline_opens_no_corpus(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Its run validates and resumes as any does."""
    overrides = {
        "parallel.pipeline_parallel_size": "3", "batch.global_batch_size": "2", "training.train_steps": "2",
        "schedule.warmup_steps": "1", "evaluation.interval_steps": "1", "evaluation.num_batches": "1",
        "checkpoint.interval_steps": "2", "logging.tensorboard": "false", "resilience.monitor": "false",
        "logging.run_directory": str(tmp_path),
    }  # fmt: skip
    words = tuple(Override(name, text) for name, text in overrides.items())
    assert run_ranks(_train_and_count, 3, Arguments(str(tiny_corpus.run_yaml), None, words)) == [1, 0, 1]
    assert '"event":"evaluate"' in (tmp_path / "events.jsonl").read_text()
