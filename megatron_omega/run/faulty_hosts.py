"""What becomes of a host that computed wrong: it is left out from the next start on, and at once where others wait."""

from __future__ import annotations

from pathlib import Path

from megatron_omega.errors import FaultyMachineError
from megatron_omega.host.environment import exchanges_hosts
from megatron_omega.host.exclusions import exclude
from megatron_omega.training.state import Fault


def part_with_host(run_directory: Path, fault: Fault, *, is_main: bool) -> None:
    """Leave the hosts of a fault out.

    Raises:
        FaultyMachineError: the launcher has other hosts; it starts the run again there, from its last checkpoint.
    """
    hosts: list[str] = fault.details.get("hosts", [])
    if is_main:
        exclude(run_directory, hosts, "silent fault")
    if exchanges_hosts():
        raise FaultyMachineError(f"{fault.message}; the run is started again without {', '.join(hosts)}")
