"""A bad host does not end a run: a spare takes its place or, where there is none, the run goes on with fewer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TinyCorpus

from cluster.conftest import STUB, starts, write_script
from cluster.lab import Lab
from cluster.test_training import ENVIRONMENT, losses, run_arguments

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]
STEPS = 24


def test_a_spare_takes_the_place_of_a_host_that_computed_wrong(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"exit": [2, 77], "blame": "silent fault"}))
    script = write_script(tmp_path, str(STUB), "--config", "examples/omega-tiny/run.yaml", spares=1)
    job = lab.submit("--exclusive", script, environ={})
    log = tmp_path / "log.txt"
    assert lab.wait(job) == "COMPLETED", log.read_text()
    first, second = (str(start["hosts"]).split(",") for start in starts(tmp_path))
    blamed = json.loads((tmp_path / "excluded.jsonl").read_text())["host"]
    assert len(first) == len(second) == 2 and blamed == first[1] and blamed not in second
    assert f"left out: {blamed} (silent fault" in log.read_text()
    assert "rank 2 found that a machine is faulty" in log.read_text()


def test_a_training_goes_on_with_fewer_hosts(lab: Lab, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Three hosts of which one loses power, and no other is free: the same global batch, the same losses."""
    layout = ["--parallel.pipeline_parallel_size=1", "--parallel.tensor_parallel_size=1", "--batch.global_batch_size=6",
              "--batch.micro_batch_size=1", "--checkpoint.interval_steps=4"]  # fmt: skip
    run, whole = tmp_path / "run", tmp_path / "whole"
    run.mkdir()
    script = write_script(
        run, "pretrain_omega.py", *run_arguments(tiny_corpus, run, steps=STEPS), *layout,
        nodes=3, least_nodes=2, ranks_per_node=1,
    )  # fmt: skip
    others = ",".join(f"n{number}" for number in range(4, lab.hosts + 1))
    job = lab.submit("--exclusive", f"--exclude={others}", script, environ=ENVIRONMENT)
    lab.until((run / "checkpoints/step-00000004/manifest.json").exists)
    dark = lab.hosts_of(job)[-1]
    lab.crash(dark)
    try:
        assert lab.wait(job) == "COMPLETED", (run / "log.txt").read_text()
    finally:
        lab.boot(dark)
    first, second = (str(start["hosts"]).split(",") for start in starts(run))
    assert len(first) == 3 and len(second) == 2 and dark not in second
    words = [*run_arguments(tiny_corpus, whole, steps=STEPS), *layout]
    lab.run("srun", "--nodes=1", "--ntasks=1", "python", "pretrain_omega.py", *words, environ=ENVIRONMENT)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
