"""What becomes of a host that is slow or computed wrong: it is left out from the next start on, or at once."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import FaultyMachineError
from megatron_omega.health.machines import find_slow_hosts
from megatron_omega.host.environment import exchanges_hosts
from megatron_omega.host.exclusions import exclude
from megatron_omega.log import get_logger
from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.places import Places
from megatron_omega.training.state import Fault

log = get_logger(__name__)
_SLOW_FACTOR = 1.5


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


def refuse_slow_hosts(config: RunConfig, places: Places, peers: Peers, device_type: str) -> None:
    """Measure all devices, and refuse hosts that are far slower than the others. Collective.

    Raises:
        FaultyMachineError: some are, by `resilience.slow_host_factor`.
    """
    factor = config.resilience.slow_host_factor
    factor = (0.0 if device_type == "cpu" else _SLOW_FACTOR) if factor is None else factor
    if factor == 0 or peers.size == 1:
        return
    device = torch.device(device_type) if device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())
    slow = find_slow_hosts(places, peers, device, factor)
    if not slow:
        return
    for host, reason in slow.items():
        if peers.is_first:
            exclude(Path(config.logging.run_directory), [host], reason)
    raise FaultyMachineError(
        *(f"{host} is slower than the others: {reason}; start without it" for host, reason in slow.items())
    )
