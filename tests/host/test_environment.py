from __future__ import annotations

import socket

import pytest

from megatron_omega.errors import ConfigError
from megatron_omega.host.environment import (
    DEFAULT_PORT,
    ProcessPlace,
    complete_environment,
    free_port,
    network_findings,
)


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


def test_slurm_is_mapped_to_what_the_batch_script_exported() -> None:
    """Under `deepspeed --launcher slurm` too: its srun passes on what was exported, and nothing of its own."""
    environ = {
        "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]", "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "1234",
    }  # fmt: skip
    assert complete_environment(environ) == ProcessPlace(rank=0, local_rank=0, world_size=4)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.7", "1234")


def by_torchrun(restarts: int, port: int, agents: int = 1) -> dict[str, str]:
    environ = {
        "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "GROUP_WORLD_SIZE": str(agents),
    }  # fmt: skip
    complete_environment(environ)
    return environ


def test_started_again_by_torchrun_ranks_leave_the_store_of_the_dead() -> None:
    ports = [by_torchrun(restarts, 40000)["MASTER_PORT"] for restarts in range(4)]
    assert len({*ports}) == 4 and by_torchrun(0, 40000)["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    assert by_torchrun(1, 40000)["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    assert by_torchrun(2, 65535)["MASTER_PORT"] == "65533"
    assert by_torchrun(1, 40000, agents=2)["MASTER_PORT"] == "40000"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_a_launcher_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not set but its counterpart is"):
        complete_environment({name: "1"})


def place(**variables: str) -> dict[str, str]:
    return {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | variables


def test_a_free_port_of_a_known_host_is_no_finding() -> None:
    assert network_findings(place()) == []


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_a_taken_port_is_found_by_rank_0_alone(family: socket.AddressFamily) -> None:
    with socket.socket(family) as holder:
        if family == socket.AF_INET6:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            holder.bind(("", 0))
        except OSError:
            pytest.skip("this host has no IPv6")
        holder.listen()
        port = str(holder.getsockname()[1])
        (finding,) = network_findings(place(MASTER_PORT=port))
        assert f"MASTER_PORT={port}" in finding and "in use" in finding and "--master_port" in finding
        assert network_findings(place(MASTER_PORT=port, RANK="1")) == []
        assert network_findings(place(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")) == []
    assert network_findings(place(MASTER_PORT=port)) == []


def test_a_name_that_does_not_resolve_is_found_by_every_rank() -> None:
    for rank in "01":
        (finding,) = network_findings(place(MASTER_ADDR="no-such-host.invalid", RANK=rank))
        assert "MASTER_ADDR=no-such-host.invalid" in finding and "/etc/hosts" in finding


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_what_is_no_port_is_found(port: str) -> None:
    (finding,) = network_findings(place(MASTER_PORT=port))
    assert f"MASTER_PORT={port} is not a port" in finding


def test_a_port_that_was_left_a_moment_ago_is_free() -> None:
    """A run that starts again meets connections of the one before in TIME_WAIT."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            connection, _ = server.accept()
            connection.close()
            assert client.recv(1) == b""
    assert network_findings(place(MASTER_PORT=str(port))) == []


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK=x"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 and LOCAL_RANK=0 do not fit WORLD_SIZE=1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE=-1"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}, "LOCAL_RANK="),
        ({"RANK": "0", "WORLD_SIZE": "9" * 99}, "WORLD_SIZE=9"),
        ({"SLURM_PROCID": "x", "SLURM_STEP_NODELIST": "n1"}, "RANK=x"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": "a"}, "SLURM_JOB_ID=a"),
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "a"}, "TORCHELASTIC_RESTART_COUNT=a"),
    ],
)
def test_variables_that_are_no_numbers_are_one_sentence(environ: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        complete_environment(environ)


def test_an_empty_job_number_is_none() -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": ""}
    assert complete_environment(environ).rank == 0 and environ["MASTER_PORT"] == "20000"


def test_a_task_that_sees_its_own_device_only_takes_the_first() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-4]"}
    assert complete_environment(dict(slurm)).local_rank == 1
    assert complete_environment(slurm | {"SLURM_GPUS_PER_TASK": "1"}).local_rank == 0
    assert complete_environment(slurm | {"SLURM_GPUS_PER_TASK": "a100:1"}).local_rank == 0
    assert complete_environment(slurm | {"SLURM_GPUS_PER_TASK": "2"}).local_rank == 1


def test_a_process_alone_takes_a_free_port_and_others_the_one_they_know() -> None:
    alone: dict[str, str] = {}
    complete_environment(alone)
    assert alone["MASTER_PORT"] not in ("0", str(DEFAULT_PORT))
    together = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    complete_environment(together)
    assert together["MASTER_PORT"] == str(DEFAULT_PORT)
