"""One cluster for the session, where this machine can have one; and batch scripts for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT

from cluster.lab import Lab, why_not
from megatron_omega.launching.scripts import Launch, slurm_script

STUB = ROOT / "tests/launching/stub.py"


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Six hosts: four for jobs, two to take the place of those that fail."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Lab(tmp_path_factory.mktemp("lab") / "site", hosts=6) as lab:
        yield lab


@pytest.fixture
def submit_stub(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submit the batch script of a run of stub ranks, 2 hosts x 2, whose plan is given; return the job."""
    jobs: list[str] = []

    def submit(*options: str, environment: dict[str, str] | None = None, **plan: object) -> str:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        script = write_script(tmp_path, str(STUB), "--config", "examples/omega-tiny/run.yaml")
        jobs.append(lab.submit(*options, script, environ=environment or {}))
        return jobs[-1]

    yield submit
    if jobs:
        lab.run("scancel", "--full", *jobs, check=False)


def write_script(folder: Path, program: str, *arguments: str, **machines: Any) -> Path:
    """Write the batch script of a run in `folder`, on 2 hosts x 2 ranks or on other `machines`."""
    path = folder / "run.sbatch"
    words = (*arguments, "--logging.run_directory", str(folder))
    launch = Launch(
        words, command="a test", device="cpu", time="00:10:00", cpus_per_rank=1, program=program,
        options=(f"--output={folder}/log.txt",), **{"nodes": 2, "ranks_per_node": 2, **machines},
    )  # fmt: skip
    path.write_text(slurm_script(launch, path, "run").replace("#SBATCH --output=%x-%j.out\n", ""))
    return path


def starts(folder: Path) -> list[dict[str, object]]:
    """Return the starts of the run: the hosts each was on, the checkpoint each went on from."""
    lines = [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "start"]
