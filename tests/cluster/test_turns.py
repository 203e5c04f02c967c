"""What the batch script makes of every end, on real Slurm. The ranks are stubs: here Slurm and the script are judged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.conftest import STUB, starts, write_script
from cluster.lab import Lab

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]
Submit = Callable[..., str]
CHAIN = "import sys; from megatron_omega.launching.scripts import submit; print(*submit(sys.argv[1], chain=3))"


def until_holding(lab: Lab, folder: Path, step: int) -> None:
    lab.until((folder / f"checkpoints/step-{step:08d}/manifest.json").exists)


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def test_a_preempted_run_goes_on_where_it_was(lab: Lab, submit_stub: Submit, tmp_path: Path) -> None:
    job = submit_stub(hold=3, steps=5)
    until_holding(lab, tmp_path, 3)
    lab.run("scancel", "--signal=USR1", job)  # what --signal=USR1@180 does before the time limit
    lab.run("scancel", "--signal=USR1", job, check=False)  # a second one does no harm, if there is still whom to tell
    assert lab.wait(job) == "COMPLETED", log(tmp_path)
    assert [start["checkpoint"] for start in starts(tmp_path)] == ["", "step-00000003"]
    assert "the run was asked to stop" in log(tmp_path) and "restart 1" in log(tmp_path)
    assert lab.facts(job)["Restarts"] == "1"


def test_a_cancelled_run_stays_cancelled(lab: Lab, submit_stub: Submit, tmp_path: Path) -> None:
    job = submit_stub(hold=2)
    until_holding(lab, tmp_path, 2)
    lab.run("scancel", job)
    assert lab.wait(job) == "CANCELLED", log(tmp_path)
    assert (tmp_path / "stopping").exists()  # the ranks were told, and had time to save
    assert len(starts(tmp_path)) == 1


def test_a_failed_run_comes_back(lab: Lab, submit_stub: Submit, tmp_path: Path) -> None:
    job = submit_stub(exit=[2, -9])
    assert lab.wait(job) == "COMPLETED", log(tmp_path)
    assert len(starts(tmp_path)) == 2 and "failure 1 of at most 20" in log(tmp_path)


def test_a_run_does_not_come_back_for_ever(lab: Lab, submit_stub: Submit, tmp_path: Path) -> None:
    job = submit_stub(exit=[0, -9], always=True, environment={"OMEGA_MAX_RESTARTS": "1"})
    assert lab.wait(job) == "FAILED"
    assert lab.facts(job)["ExitCode"] == "137:0" and len(starts(tmp_path)) == 2


@pytest.mark.parametrize("code", [1, 4])
def test_a_mistake_does_not_come_back(lab: Lab, submit_stub: Submit, tmp_path: Path, code: int) -> None:
    job = submit_stub(exit=[3, code])
    assert lab.wait(job) == "FAILED"
    assert lab.facts(job)["ExitCode"] == f"{code}:0" and len(starts(tmp_path)) == 1, log(tmp_path)


@pytest.mark.parametrize(("plan", "states"), [
    ({"hold": 2}, ["FAILED", "COMPLETED", "CANCELLED"]),
    ({"exit": [1, 4]}, ["FAILED", "FAILED", "FAILED"]),
], ids=["a stop", "a mistake"])  # fmt: skip
def test_a_chain_goes_on_after_a_stop_and_not_after_a_mistake(
    lab: Lab, submit_stub: Submit, tmp_path: Path, plan: dict[str, object], states: list[str]
) -> None:
    """Where jobs may not requeue themselves: each link starts where the one before did not succeed."""
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    script = write_script(tmp_path, str(STUB), "--config", "examples/omega-tiny/run.yaml")
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"}
    said = lab.run("python", "-c", CHAIN, script, environ=environment)
    jobs = said.split()
    if "hold" in plan:
        until_holding(lab, tmp_path, 2)
        lab.run("scancel", "--signal=USR1", jobs[0])
    assert [lab.wait(job) for job in jobs] == states, log(tmp_path)
    assert len(starts(tmp_path)) == (2 if "hold" in plan else 1)
