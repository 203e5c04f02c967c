"""What the launcher left in the environment: the only place that reads and completes rank variables.

`deepspeed` and `torchrun` set RANK and its kin. Under plain `srun` only SLURM_* are there; they are mapped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megatron_omega.errors import ConfigError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class ProcessPlace:
    """Which process of how many this is."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def complete_environment(environ: MutableMapping[str, str] = os.environ) -> ProcessPlace:
    """Return this process's place, and set the variables torch.distributed reads where the launcher did not.

    Raises `ConfigError` where variables of a launcher are incomplete.
    """
    if "RANK" not in environ and "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ:
        _map_slurm(environ)
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in environ]
    if len(missing) == 1:
        raise ConfigError(f"{missing[0]} is not set but its counterpart is; start with deepspeed, torchrun or srun")
    environ.setdefault("RANK", "0")
    environ.setdefault("WORLD_SIZE", "1")
    environ.setdefault("LOCAL_RANK", "0")
    environ.setdefault("MASTER_ADDR", "127.0.0.1")
    environ.setdefault("MASTER_PORT", str(DEFAULT_PORT))
    return ProcessPlace(int(environ["RANK"]), int(environ["LOCAL_RANK"]), int(environ["WORLD_SIZE"]))


def meeting_host(environ: Mapping[str, str] = os.environ) -> str:
    """Return the host of rank 0, under a name that every rank can reach."""
    return environ.get("MASTER_ADDR", "127.0.0.1")


def require_repeatable_libraries(environ: MutableMapping[str, str] = os.environ) -> None:
    """Ask cuBLAS for results that do not depend on timing; read when CUDA starts."""
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def announced_world_size(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of processes that a launcher, or a user who asks what would run, has set; None: nobody did."""
    text = environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() and int(text) else None


def _map_slurm(environ: MutableMapping[str, str]) -> None:
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
    environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
    # Jobs that share a node must not meet: the port follows from the job.
    environ.setdefault("MASTER_PORT", str(20_000 + int(environ.get("SLURM_JOB_ID", "0")) % 10_000))


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list.

    >>> first_host("gpu[003-010,012],login1"), first_host("n1,n2"), first_host("rack2-n[7]")
    ('gpu003', 'n1', 'rack2-n7')
    """
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodelist)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodelist!r} names no host; set MASTER_ADDR")
    return match[1] + (match[2] or "")
