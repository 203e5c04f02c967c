"""Real training of a small Omega on 2 hosts x 2 ranks: by every launcher, through a preemption, through a power cut."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import TinyCorpus

from cluster.conftest import starts, write_script
from cluster.lab import Lab

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]
STEPS = 30
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
    lab.run("python", "tools/launch.py", "hostfile", *words, environ=ENVIRONMENT)
    lab.run("bash", script, environ=ENVIRONMENT)


def without_ssh(lab: Lab, run: list[str], folder: Path) -> None:
    """One launcher on each host, which starts its ranks and speaks with nobody."""
    words = f"deepspeed --hostfile {lab.folder}/hostfile --no_ssh --master_addr n1 --master_port 29612 --no_local_rank"
    command = f'exec {words} --node_rank "$SLURM_NODEID" pretrain_omega.py {shlex.join(run)}'
    lab.run("srun", "--nodes=2", "--nodelist=n1,n2", "--ntasks-per-node=1", "bash", "-c", command, environ=ENVIRONMENT)


def by_deepspeed_slurm(lab: Lab, run: list[str], folder: Path) -> None:
    """DeepSpeed calls srun, and drops the meeting point on the way."""
    words = ["--launcher", "slurm", "--hostfile", lab.folder / "hostfile", "--no_ssh_check", "--master_addr", "n1"]
    allocation = ["salloc", "--nodes=2", "--nodelist=n1,n2", "--ntasks-per-node=2"]
    lab.run(*allocation, "deepspeed", *words, "--no_local_rank", "pretrain_omega.py", *run, environ=ENVIRONMENT)


def by_torchrun(lab: Lab, run: list[str], folder: Path) -> None:
    """One agent on each host; they meet on the first."""
    words = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29613"]
    task = ["srun", "--nodes=2", "--nodelist=n1,n2", "--ntasks-per-node=1"]
    lab.run(*task, "torchrun", *words, "pretrain_omega.py", *run, environ=ENVIRONMENT)


def by_srun(lab: Lab, run: list[str], folder: Path) -> None:
    """Nothing between Slurm and the ranks."""
    lab.run("srun", "--nodes=2", "--ntasks-per-node=2", "python", "pretrain_omega.py", *run, environ=ENVIRONMENT)


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


def submit(lab: Lab, corpus: TinyCorpus, folder: Path, *options: str) -> str:
    """Submit the batch script of a run of some steps; return the job once its first checkpoint is there."""
    arguments = [*run_arguments(corpus, folder, steps=STEPS), "--checkpoint.interval_steps=5", *options]
    job = lab.submit("--exclusive", write_script(folder, "pretrain_omega.py", *arguments), environ=ENVIRONMENT)
    lab.until((folder / "checkpoints/step-00000005/manifest.json").exists)
    return job


def assert_completed_in_two_turns(lab: Lab, job: str, folder: Path) -> list[str]:
    """Return the hosts of both turns of a job that had to be started twice."""
    log = folder / "log.txt"
    assert lab.wait(job) == "COMPLETED", log.read_text()
    found = starts(folder)
    assert [start["restart"] for start in found] == [0, 1], log.read_text()
    assert str(found[1]["checkpoint"]) >= "step-00000005"
    assert len(losses(folder)) == STEPS
    return [str(start["hosts"]) for start in found]


def test_a_preempted_training_goes_on(lab: Lab, tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    """Signalled as Slurm does before the time limit: every process of the job, the data workers too."""
    job = submit(lab, tiny_corpus, tmp_path, "--data.num_workers=1")
    lab.run("scancel", "--signal=USR1", job)
    assert_completed_in_two_turns(lab, job, tmp_path)
    assert "has saved" in (tmp_path / "log.txt").read_text()


def test_runs_outlive_a_host_without_power_and_one_without_network(
    lab: Lab, submit_stub: Callable[..., str], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    """Slurm takes its time to give a host up, so both at once: a training loses power, a run of stubs the network."""
    stub = submit_stub("--exclusive", hold=2)
    lab.until((tmp_path / "checkpoints/step-00000002/manifest.json").exists)
    folder = tmp_path / "training"
    folder.mkdir()
    training = submit(lab, tiny_corpus, folder)
    dark, silent = lab.hosts_of(training)[-1], lab.hosts_of(stub)[-1]
    assert dark != silent
    lab.crash(dark)
    lab.cut(silent)
    try:
        hosts = assert_completed_in_two_turns(lab, training, folder)
        assert dark in lab.expand(hosts[0]) and dark not in lab.expand(hosts[1])
        assert lab.wait(stub) == "COMPLETED", (tmp_path / "log.txt").read_text()
        first, second = starts(tmp_path)
        assert silent in lab.expand(str(first["hosts"])) and silent not in lab.expand(str(second["hosts"]))
        assert second["checkpoint"] == "step-00000002"
    finally:
        lab.plug(silent)
        lab.boot(dark)
