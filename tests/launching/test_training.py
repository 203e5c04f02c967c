"""Real training on this machine comes back from its last checkpoint when a rank is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny import ROOT, TinyCorpus

pytestmark = pytest.mark.distributed
STEPS = 30
SUPERVISOR = ["tools/launch.py", "local", "--ranks", "2"]
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "--max-restarts=3",
    "pretrain_omega.py",
]


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the ranks below a launcher, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if {"megatron_omega", "train"} <= {*child.cmdline()} or "pretrain_omega.py" in child.cmdline():
            found[child.environ()["RANK"]] = child
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize("launcher", [SUPERVISOR, TORCHRUN], ids=["supervisor", "torchrun"])
def test_a_killed_rank_costs_the_steps_since_the_checkpoint(
    launcher: list[str], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    settings = {
        "batch.global_batch_size": 4, "training.train_steps": STEPS, "schedule.warmup_steps": 1,
        "evaluation.interval_steps": 0, "checkpoint.interval_steps": 5, "logging.tensorboard": "false",
        "logging.progress_bar": "false", "logging.run_directory": tmp_path,
    }  # fmt: skip
    words = ["--config", str(tiny_corpus.run_yaml), *(f"--{name}={value}" for name, value in settings.items())]
    command = [sys.executable, *launcher, *words]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), text=True, stderr=subprocess.PIPE)
    end = time.monotonic() + 300
    while not (tmp_path / "checkpoints/step-00000005/manifest.json").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.1)
    first = ranks(process)
    first[1].send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert (tmp_path / "SUCCESS").exists() and not any(rank.is_running() for rank in first)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "start" for event in events) == 2, said
