"""A checkpoint's validation loss, measured again, is the one that training measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TinyCorpus, run_python

pytestmark = pytest.mark.distributed


def test_the_loss_of_a_checkpoint_is_that_of_the_run(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = {
        "batch.global_batch_size": 2, "training.train_steps": 2, "schedule.warmup_steps": 0,
        "evaluation.interval_steps": 2, "evaluation.num_batches": 2, "logging.tensorboard": "false",
        "logging.run_directory": tmp_path,
    }  # fmt: skip
    words = ["--config", tiny_corpus.run_yaml, *(f"--{name}={value}" for name, value in settings.items())]
    trained = run_python("pretrain_omega.py", *words)
    assert trained.returncode == 0, trained.stderr
    measured = run_python("tools/evaluate.py", *words, "--json")
    assert measured.returncode == 0, measured.stderr
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    expected = [event for event in events if event["event"] == "evaluate"][-1]
    found = json.loads(measured.stdout)
    assert expected["step"] == 2
    assert (found["loss"], found["num_tokens"]) == (expected["loss"], expected["num_tokens"])
    again = run_python("-m", "megatron_omega", "evaluate", "--checkpoint", tmp_path, "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["loss"] == expected["loss"]
    assert (found["step"], Path(found["checkpoint"]).name) == (2, "step-00000002")
    assert len(again.stderr.splitlines()) == 1 and "measuring step 2" in again.stderr
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(tiny_corpus.text.read_text().splitlines(keepends=True)[:20]))
    text = run_python("-m", "megatron_omega", "evaluate", "--checkpoint", tmp_path, "--input", lines)
    assert text.returncode == 0 and "step 2 " in text.stdout
    assert not list((tmp_path / "evaluation/checkpoints").iterdir())  # nothing was trained, nothing is saved
