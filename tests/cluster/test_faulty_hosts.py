"""A bad host does not end a run: a spare takes its place or, where there is none, the run goes on with fewer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny import TinyCorpus

from cluster.conftest import STUB, starts, write_script
from cluster.lab import Lab
from cluster.test_training import ENVIRONMENT, losses, run_arguments
from megatron_omega.launching.scripts import HostFiles, Launch, deepspeed_environment, hostfile, hosts_script

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


def test_a_host_that_is_slow_is_named_before_the_first_step_and_a_spare_takes_its_place(
    lab: Lab, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """One of three hosts gets hardly any time as soon as its rank has begun: the run starts once more, without it."""
    slow = "n2"
    settings = ["--parallel.pipeline_parallel_size=1", "--parallel.tensor_parallel_size=1", "--batch.global_batch_size=3",
                "--batch.micro_batch_size=1", "--resilience.slow_host_factor=3"]  # fmt: skip
    script = write_script(
        tmp_path, "pretrain_omega.py", *run_arguments(tiny_corpus, tmp_path), *settings,
        nodes=3, spares=1, ranks_per_node=1,
    )  # fmt: skip
    job, log = lab.submit("--exclusive", "--nodelist=n1,n2,n3,n4", script, environ=ENVIRONMENT), tmp_path / "log.txt"
    lab.until((tmp_path / "config.yaml").exists, seconds=400)  # all ranks have arrived
    with lab.throttled(slow, 0.03):
        assert lab.wait(job, seconds=500) == "COMPLETED", log.read_text()
    first, second = (str(start["hosts"]).split(",") for start in starts(tmp_path))
    assert first == ["n1", "n2", "n3"] and second == ["n1", "n3", "n4"]
    assert f"{slow} is slower than the others: a product takes" in log.read_text()
    assert [line["host"] for line in map(json.loads, (tmp_path / "excluded.jsonl").read_text().splitlines())] == [slow]
    assert len(losses(tmp_path)) == 2


def test_a_run_by_ssh_leaves_out_who_computed_wrong_and_who_does_not_answer(lab: Lab, tmp_path: Path) -> None:
    """n2 computes wrong in the first turn, and n3, the first to take its place, has no network."""
    (tmp_path / "plan.json").write_text(json.dumps({"exit": [2, 77], "blame": "silent fault"}))
    words = ("--config", "examples/omega-tiny/run.yaml", "--logging.run_directory", str(tmp_path))
    launch = Launch(words, 2, 2, command="a test", program=str(STUB), device="cpu", least_nodes=1, spares=2)
    files = HostFiles.beside(tmp_path / "hosts.sh")
    files.hostfile.write_text(hostfile(["n1", "n2", "n3", "n4"], 2))
    files.environment.write_text(deepspeed_environment(ENVIRONMENT, Path(sys.executable), exchanges_hosts=True))
    files.script.write_text(hosts_script(launch, files, 29614, str(tmp_path)))
    lab.cut("n3")
    try:
        said = lab.run("bash", "-c", f"bash {files.script} 2>&1", environ=ENVIRONMENT)
    finally:
        lab.plug("n3")
    first, second = (str(start["hosts"]).split(",") for start in starts(tmp_path))
    assert first == ["n1", "n2"] and second == ["n1", "n4"]
    assert "no answer by ssh: n3" in said and "left out: n2 (silent fault" in said
