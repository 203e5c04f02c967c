"""What the launcher left in the environment: the only place that reads and completes rank variables.

`deepspeed` and `torchrun` set RANK and its kin. Under plain `srun`, and under `deepspeed --launcher slurm`, which calls
srun and drops its own --master_addr and --master_port, only SLURM_* are there; they are mapped.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megatron_omega.errors import ConfigError

DEFAULT_PORT = 29500
_DEVICES, _GPU_FILES = Path("/dev"), ("nvidia[0-9]*", "kfd")


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
    _leave_old_store(environ)
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in environ]
    if len(missing) == 1:
        raise ConfigError(f"{missing[0]} is not set but its counterpart is; start with deepspeed, torchrun or srun")
    if not has_gpu(environ):
        environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says on every rank that it looked for one
    environ.setdefault("RANK", "0")
    environ.setdefault("WORLD_SIZE", "1")
    environ.setdefault("LOCAL_RANK", "0")
    environ.setdefault("MASTER_ADDR", "127.0.0.1")
    environ.setdefault("MASTER_PORT", str(free_port() if missing else DEFAULT_PORT))  # alone: nobody else has to know
    place = ProcessPlace(*(_number(environ, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    if not max(place.rank, place.local_rank) < place.world_size:
        raise ConfigError(
            f"RANK={place.rank} and LOCAL_RANK={place.local_rank} do not fit WORLD_SIZE={place.world_size}; they count "
            "from 0; start with deepspeed, torchrun or srun, or unset all three for one process"
        )
    return place


def speaking_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return this process's rank as far as it can be told; 0 where nobody said it, or said no number."""
    text = environ.get("RANK") or environ.get("SLURM_PROCID") or "0"
    return int(text) if _is_number(text) else 0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name) or default
    if not _is_number(text):
        raise ConfigError(
            f"{name}={text} in the environment is not a number; launchers set it: start with deepspeed, torchrun or "
            "srun, or unset it"
        )
    return int(text)


def meeting_host(environ: Mapping[str, str] = os.environ) -> str:
    """Return the host of rank 0, under a name that every rank can reach."""
    return environ.get("MASTER_ADDR", "127.0.0.1")


def meeting_point(environ: Mapping[str, str] = os.environ) -> str:
    """Return where the ranks of this start meet, which no other start does at the same time."""
    return f"{meeting_host(environ)}:{environ.get('MASTER_PORT', DEFAULT_PORT)}"


def exchanges_hosts(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether what started this run has other hosts to start it on, or goes on with fewer."""
    return environ.get("OMEGA_EXCHANGES_HOSTS") == "1"


def run_secret(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the secret by which the ranks of a run know each other, if the launcher gave them one."""
    return environ.get("OMEGA_RUN_SECRET") or None


def require_repeatable_libraries(environ: MutableMapping[str, str] = os.environ) -> None:
    """Ask cuBLAS for results that do not depend on timing; read when CUDA starts."""
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def announced_world_size(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of processes that a launcher, or a user who asks what would run, has set; None: nobody did."""
    text = environ.get("WORLD_SIZE", "")
    return int(text) or None if _is_number(text) else None


def network_findings(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return what keeps this process from meeting the others: an address that does not resolve, a port that is taken.

    Reads the variables `complete_environment` left. The port is asked for on rank 0 only, whose host is MASTER_ADDR's;
    where torchrun's agent holds it open for its ranks, not at all.
    """
    address, text = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    port = int(text) if text.isdecimal() else 0
    if not 0 < port < 2**16:
        return [f"MASTER_PORT={text} is not a port; set it to a number from 1024 to 65535"]
    findings = []
    if reason := _why_unresolved(address, port):
        findings.append(
            f"MASTER_ADDR={address} does not resolve on host {socket.gethostname()} ({reason}); every host has to know "
            "where rank 0 is: set MASTER_ADDR to its IP address, or make the name known (DNS, /etc/hosts)"
        )
    is_held_by_agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if environ["RANK"] == "0" and not is_held_by_agent and (reason := _why_port_unusable(port)):
        findings.append(
            f"MASTER_PORT={port} on host {socket.gethostname()} cannot be opened ({reason}); rank 0 needs it for all "
            "ranks to meet: end what holds it, or choose another (MASTER_PORT, deepspeed --master_port, "
            "torchrun --master-port)"
        )
    return findings


def _why_unresolved(address: str, port: int) -> str | None:
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return error.strerror
    return None


def _why_port_unusable(port: int) -> str | None:
    """Open the port on every interface, as torch's store will, and close it."""
    for family, everywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((everywhere, port))
                probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return error.strerror
            # A host without IPv6 (or without IPv4) is none that the port is taken on.
    return None


def has_gpu(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this host has an accelerator that a run would use, without asking a library."""
    wanted = environ.get("DS_ACCELERATOR")
    return wanted not in (None, "", "cpu") or (not wanted and any(any(_DEVICES.glob(name)) for name in _GPU_FILES))


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _leave_old_store(environ: MutableMapping[str, str]) -> None:
    """Meet on a new port where torchrun started this process again.

    Its agent keeps the store of the first start open, with the addresses of ranks that are gone (torch 2.13). Where
    there are several agents they count restarts differently; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is needed.
    """
    restarts = _number(environ, "TORCHELASTIC_RESTART_COUNT", "0")
    is_one_agent = environ.get("GROUP_WORLD_SIZE", "1") == "1"
    if restarts and is_one_agent and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        port = _number(environ, "MASTER_PORT") + restarts
        environ["MASTER_PORT"] = str(port if port < 2**16 else port - 2 * restarts)
        environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _map_slurm(environ: MutableMapping[str, str]) -> None:
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    # With --gpus-per-task=1 every task sees one device, its own, as the first.
    sees_its_own = environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1"
    environ["LOCAL_RANK"] = "0" if sees_its_own else environ.get("SLURM_LOCALID", "0")
    environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
    # Jobs that share a node must not meet: the port follows from the job.
    environ.setdefault("MASTER_PORT", str(20_000 + _number(environ, "SLURM_JOB_ID", "0") % 10_000))


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list.

    >>> first_host("gpu[003-010,012],login1"), first_host("n1,n2"), first_host("rack[2,4]-n[7-9]-ib")
    ('gpu003', 'n1', 'rack2-n7-ib')
    """
    first = re.match(r"(?:[^\[\],]+|\[\d[\d,-]*\])+", nodelist)
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodelist!r} names no host; set MASTER_ADDR")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def host_name() -> str:
    """Return what this host calls itself."""
    return socket.gethostname()
