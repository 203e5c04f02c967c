"""A run that was moved, on a machine where nothing is where it was: every tool works on it, from any folder."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hostile.trials import run_command
from tiny import TinyCorpus

from megatron_omega.commands.main import VERBS
from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.studies.layouts import train_rank

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")]
SETTINGS: dict[str, Any] = {
    "training.train_steps": 4, "schedule.warmup_steps": 1, "evaluation.interval_steps": 2, "evaluation.num_batches": 1,
    "checkpoint.interval_steps": 2, "logging.tensorboard": "false", "resilience.integrity_interval_steps": 0,
    "parallel.timeout_seconds": 60,
}  # fmt: skip
PATIENCE = 300
"""Seconds for a command: one of them reads a whole shard, and the machine may be busy."""
TOOLS = {
    "generate --greedy --max-new-tokens 2 --prompt hello --checkpoint {run}": "",
    "fill-mask --text a<mask>b --checkpoint {run}": "",
    "export-hf --checkpoint {run} --output {folder}/export": "",
    "generate --max-new-tokens 2 --prompt hello --checkpoint {folder}/export": "",
    "inspect-checkpoint {run} --verify": "step-00000004",
    "inspect-checkpoint {run}/checkpoints/step-00000002 --diff {run}": "tensors differ",
    "goodput --run {run}": "",
    "inspect-data --run {run} {shard} --step 2": "",
    "inspect-data --run {run} {shard} --find 0": "",
    "inspect-data {shard} --run {run} --show 0": "",
    "evaluate --checkpoint {run} --input {folder}/few.txt": "loss",
}
"""Command lines, and what they say. Their order matters: one reads what another has made."""


def test_every_tool_works_on_a_run_from_another_machine(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    for path in tiny_corpus.prefix.parent.glob(f"{tiny_corpus.prefix.name}.*"):
        shutil.copy(path, there)
    shutil.copy(tiny_corpus.tokenizer, there / "tokenizer.model")
    settings = SETTINGS | {
        "logging.run_directory": there / "run", "data.tokenizer": there / "tokenizer.model",
        "data.corpora": json.dumps([{"prefix": str(there / tiny_corpus.prefix.name)}]),
    }  # fmt: skip
    overrides = tuple(Override(name, str(value)) for name, value in settings.items())
    run_ranks(train_rank, 1, Arguments(str(tiny_corpus.run_yaml), None, overrides))

    (there / "run").rename(here / "moved")
    (here / "data").mkdir()
    for path in there.glob(f"{tiny_corpus.prefix.name}.*"):
        path.rename(here / "data" / path.name)
    (there / "tokenizer.model").unlink()
    there.rmdir()
    (here / "few.txt").write_text("hello world. " * 60)
    names = {"run": here / "moved", "folder": here, "shard": here / "data" / tiny_corpus.prefix.name}
    for module in ("run.validation", *(f"commands.{VERBS[line.split()[0]]}" for line in TOOLS)):
        importlib.import_module(f"megatron_omega.{module}")  # once, not for each tool
    for line, says in TOOLS.items():
        outcome = run_command([word.format(**names) for word in line.split()], here, PATIENCE)
        assert outcome.end == 0 and says in outcome.output, (line, outcome)
    again = ["train", "--config", here / "moved" / "config.yaml", "--logging.run_directory", here / "moved",
             "--data.tokenizer", here / "moved" / "tokenizer.model", "--training.train_steps", "5",
             "--data.corpora", json.dumps([{"prefix": str(names["shard"])}])]  # fmt: skip
    outcome = run_command(again, here, PATIENCE)
    assert outcome.end == 0 and (here / "moved/checkpoints/step-00000005/manifest.json").exists(), outcome.output
    assert not there.exists()
