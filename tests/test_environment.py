from __future__ import annotations

import pytest

from megatron_omega.environment import ProcessPlace, complete_environment
from megatron_omega.errors import ConfigError


def test_srun_is_mapped() -> None:
    environ = {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_NODELIST": "gpu[003-004],login1", "SLURM_JOB_ID": "123456",
    }  # fmt: skip
    assert complete_environment(environ) == ProcessPlace(rank=5, local_rank=1, world_size=6)
    assert environ["MASTER_ADDR"] == "gpu003" and environ["MASTER_PORT"] == "23456"


def test_a_launcher_has_precedence_over_slurm() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1"}
    assert complete_environment(environ) == ProcessPlace(rank=3, local_rank=3, world_size=4)


def test_alone_is_one_process() -> None:
    environ = {"SLURM_PROCID": "0"}  # a batch script, outside of srun
    assert complete_environment(environ) == ProcessPlace(rank=0, local_rank=0, world_size=1)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_a_launcher_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not set but its counterpart is"):
        complete_environment({name: "1"})
