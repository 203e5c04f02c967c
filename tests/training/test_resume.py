"""A resumed run is the unbroken run, bit for bit, through the entry point's own path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyCorpus

from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.studies.layouts import arguments_for, parse_layout, train_rank

pytestmark = pytest.mark.distributed
STEPS, BREAK = 20, 10
TIMES = ("step_seconds", "tokens_per_second", "mfu")


def train(corpus: TinyCorpus, label: str, folder: Path) -> Path:
    """Train to the end from wherever the run folder stands; return that folder."""
    layout = parse_layout(label)
    arguments = arguments_for(corpus.run_yaml, layout, [], steps=STEPS, folder=folder)
    again = {
        "checkpoint.resume": "true",
        "checkpoint.interval_steps": str(BREAK),
        "evaluation.interval_steps": "5",
        "evaluation.num_batches": "1",
        "batch.ramp_up": "{start: 4, increment: 4, samples: 50}",
    }
    overrides = (*arguments.overrides, *(Override(*pair) for pair in again.items()))
    run_ranks(train_rank, layout.world_size, Arguments(arguments.config, arguments.deepspeed_config, overrides))
    return folder / label


def figures(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.parametrize("label", ["tp2-pp2-dp2", "dp2-zero3"])
def test_resumed_equals_unbroken(label: str, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    unbroken = train(tiny_corpus, label, tmp_path / "unbroken")
    broken = tmp_path / "broken" / label
    shutil.copytree(unbroken, broken)
    shutil.rmtree(broken / f"checkpoints/step-{STEPS:08d}")
    train(tiny_corpus, label, tmp_path / "broken")
    expected, found = figures(unbroken), figures(broken)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert found == expected
    readers = [open_checkpoint(run / f"checkpoints/step-{STEPS:08d}") for run in (unbroken, broken)]
    for name in readers[0].names():
        assert torch.equal(readers[0].tensor(name), readers[1].tensor(name)), name
