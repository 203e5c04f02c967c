"""What the batch script makes of every end, on real Slurm. The ranks are stubs: here Slurm and the script are judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.lab import Lab

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]
Submit = Callable[..., str]


def starts(folder: Path) -> list[dict[str, object]]:
    """Return the starts of the run: the hosts each was on, the checkpoint each went on from."""
    lines = [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "start"]


def until_holding(lab: Lab, folder: Path, step: int) -> None:
    lab.until((folder / f"checkpoints/step-{step:08d}/manifest.json").exists)


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def test_a_preempted_run_goes_on_where_it_was(lab: Lab, submit_stub: Submit, tmp_path: Path) -> None:
    job = submit_stub(hold=3, steps=5)
    until_holding(lab, tmp_path, 3)
    lab.run("scancel", "--signal=USR1", job)  # what --signal=USR1@180 does before the time limit
    lab.run("scancel", "--signal=USR1", job)
    assert lab.wait(job) == "COMPLETED", log(tmp_path)
    assert [start["checkpoint"] for start in starts(tmp_path)] == ["", "step-00000003"]
    assert "asked to stop and has saved" in log(tmp_path) and "restart 1" in log(tmp_path)
    assert lab.facts(job)["Restarts"] == "1"


def test_a_cancelled_run_stays_cancelled(lab: Lab, submit_stub: Submit, tmp_path: Path) -> None:
    job = submit_stub(hold=2)
    until_holding(lab, tmp_path, 2)
    lab.run("scancel", job)
    assert lab.wait(job) == "CANCELLED", log(tmp_path)
    assert (tmp_path / "stopping").exists()  # the ranks were told, and had time to save
    assert len(starts(tmp_path)) == 1


@pytest.mark.parametrize("code", [-9, 76])
def test_a_failed_run_comes_back(lab: Lab, submit_stub: Submit, tmp_path: Path, code: int) -> None:
    job = submit_stub(exit=[2, code])
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
