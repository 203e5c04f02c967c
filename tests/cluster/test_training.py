"""Real training of a small Omega on 2 hosts x 2 ranks: by every launcher, through a preemption, through a power cut."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import ROOT, TinyCorpus

from cluster.conftest import write_script
from cluster.lab import Lab

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]
BIN = Path(sys.executable).parent
ENVIRONMENT = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run_arguments(corpus: TinyCorpus, folder: Path, *, steps: int = 2) -> list[str]:
    """Return the command line of a run of 2 stages x 2 tensor ranks in `folder`."""
    settings = {
        "parallel.pipeline_parallel_size": 2, "parallel.tensor_parallel_size": 2, "batch.global_batch_size": 4,
        "training.train_steps": steps, "schedule.warmup_steps": 1, "evaluation.interval_steps": 0,
        "checkpoint.interval_steps": 1, "logging.tensorboard": "false", "logging.progress_bar": "false",
        "parallel.timeout_seconds": 120, "logging.run_directory": folder,
    }  # fmt: skip
    return ["--config", str(corpus.run_yaml), *(f"--{name}={value}" for name, value in settings.items())]


def losses(folder: Path) -> list[float]:
    """Return the loss of every step of a run that succeeded."""
    assert (folder / "SUCCESS").exists(), [path.name for path in folder.iterdir()]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def by_pdsh(lab: Lab, run: list[str], folder: Path) -> None:
    """Write hostfile and script with the tool, and start the script on the head."""
    script = folder / "hosts.sh"
    words = ["--hosts", "n1", "n2", "--ranks-per-node", "2", "--port", "29611", "--output", script, *run]
    lab.run("python", "tools/launch.py", "hostfile", *words, **ENVIRONMENT)
    lab.run("bash", script, **ENVIRONMENT)


def without_ssh(lab: Lab, run: list[str], folder: Path) -> None:
    """One launcher on each host, which starts its ranks and speaks with nobody."""
    words = f"deepspeed --hostfile {lab.folder}/hostfile --no_ssh --master_addr n1 --master_port 29612 --no_local_rank"
    command = f'exec {words} --node_rank "$SLURM_NODEID" pretrain_omega.py {shlex.join(run)}'
    lab.run("srun", "--nodes=2", "--nodelist=n1,n2", "--ntasks-per-node=1", "bash", "-c", command, **ENVIRONMENT)


def by_deepspeed_slurm(lab: Lab, run: list[str], folder: Path) -> None:
    """DeepSpeed calls srun, and drops the meeting point on the way."""
    words = ["--launcher", "slurm", "--hostfile", lab.folder / "hostfile", "--no_ssh_check", "--master_addr", "n1"]
    allocation = ["salloc", "--nodes=2", "--nodelist=n1,n2", "--ntasks-per-node=2"]
    lab.run(*allocation, "deepspeed", *words, "--no_local_rank", "pretrain_omega.py", *run, **ENVIRONMENT)


def by_torchrun(lab: Lab, run: list[str], folder: Path) -> None:
    """One agent on each host; they meet on the first."""
    words = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29613"]
    task = ["srun", "--nodes=2", "--nodelist=n1,n2", "--ntasks-per-node=1"]
    lab.run(*task, "torchrun", *words, "pretrain_omega.py", *run, **ENVIRONMENT)


def by_srun(lab: Lab, run: list[str], folder: Path) -> None:
    """Nothing between Slurm and the ranks."""
    lab.run("srun", "--nodes=2", "--ntasks-per-node=2", "python", "pretrain_omega.py", *run, **ENVIRONMENT)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of the first launcher, for the others to equal."""
    return {}


@pytest.mark.parametrize("launch", [by_srun, by_torchrun, without_ssh, by_deepspeed_slurm, by_pdsh])
def test_a_launcher_trains(
    launch: Callable[[Lab, list[str], Path], None],
    lab: Lab,
    tiny_corpus: TinyCorpus,
    tmp_path: Path,
    expected: dict[str, list[float]],
) -> None:
    launch(lab, run_arguments(tiny_corpus, tmp_path), tmp_path)
    found = losses(tmp_path)
    assert len(found) == 2 and found == expected.setdefault("losses", found)


def test_a_preempted_training_goes_on(lab: Lab, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """The batch script, signalled as Slurm does before the time limit; data workers must live through that, too."""
    arguments = [*run_arguments(tiny_corpus, tmp_path, steps=200), "--data.num_workers=1"]
    job = lab.submit(write_script(tmp_path, "pretrain_omega.py", *arguments), **ENVIRONMENT)
    lab.until((tmp_path / "checkpoints/step-00000001/manifest.json").exists)
    lab.run("scancel", "--signal=USR1", job)
    lab.until(lambda: "has saved" in (tmp_path / "log.txt").read_text())
    starts = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    lab.run("scancel", job)
    assert ROOT and starts
