"""Which of a job's hosts a start uses, and how the run is laid out on them: for `launch begin` inside a script."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_omega.config.arguments import parse_arguments
from megatron_omega.config.load import ResolvedRun, resolve_run
from megatron_omega.errors import ConfigError
from megatron_omega.host.exclusions import choose, excluded, short_name
from megatron_omega.log import get_logger
from megatron_omega.planner.candidates import Candidate, obstacle, of_config
from megatron_omega.planner.hardware import Hardware, find_hardware
from megatron_omega.planner.machine import CPU, this_machine
from megatron_omega.planner.ranking import rank

log = get_logger(__name__)


@dataclass(frozen=True)
class Start:
    """Hosts and layout of one start."""

    hosts: tuple[str, ...]
    words: tuple[str, ...]
    """Further words of the run's command line; none for the layout that is configured."""

    def for_shell(self, codes: Path) -> str:
        """Return assignments for the script's shell."""
        words = " ".join(map(shlex.quote, self.words))
        hosts = shlex.quote(",".join(self.hosts))
        return f"codes={shlex.quote(str(codes))} nodes={len(self.hosts)} hosts={hosts} layout=({words})"


def job_hosts(nodelist: str) -> list[str]:
    """Return the hosts of a Slurm job. Raises ConfigError."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"the hosts of {nodelist} cannot be told: {error}; start the script with sbatch") from None
    return done.stdout.split()


def fit(run: Sequence[str], hosts: Sequence[str], run_directory: Path, arguments: argparse.Namespace) -> Start:
    """Choose the hosts of a start and the layout on them: as many as are wanted, else as many as a layout fits.

    Raises:
        ConfigError: no layout fits any number of hosts that is left.
    """
    (least, most), each = arguments.nodes, arguments.ranks_per_node
    left_out = excluded(run_directory)
    usable, back = choose(hosts, left_out, least)
    names = set(map(short_name, hosts))
    for one in left_out:
        if short_name(one.host) in names:
            log.warning("%s %s", "used again, too few others are left:" if one in back else "left out:", one)
    resolved = resolve_run(parse_arguments(run), most * each)
    configured = of_config(resolved.config, most * each, resolved.deepspeed.zero_stage)
    for count in range(min(most, len(usable)), least - 1, -1):
        candidate = configured if count == most else fitting_layout(resolved, count * each, _hardware(arguments.gpu))
        if candidate is not None:
            if count < most:
                log.warning("%d hosts instead of %d: %s", count, most, candidate.label)
            return Start(tuple(usable[:count]), tuple(as_words(candidate, configured)))
    batch = resolved.config.batch.global_batch_size
    raise ConfigError(
        f"{len(usable)} hosts are left of {least}-{most} (--nodes), and the global batch of {batch} fits no layout on "
        "them; reserve more (--spares) or name more (--hosts)"
    )


def _hardware(name: str) -> Hardware:
    if name == CPU and (machine := this_machine()) is not None:
        return machine.hardware
    return find_hardware(name)


def fitting_layout(resolved: ResolvedRun, world_size: int, hardware: Hardware) -> Candidate | None:
    """Return the layout to run on `world_size` ranks: the configured one if it fits, else the fastest; None: none does.

    The ZeRO stage stays: it is DeepSpeed's configuration that says it.
    """
    config, zero_stage = resolved.config, resolved.deepspeed.zero_stage
    own = of_config(config, world_size, zero_stage)
    if own.world_size == world_size and obstacle(config, own) is None:
        return own
    found = rank(config, hardware, world_size, _micro_batches(config.batch.micro_batch_size)).fitting
    return next((estimate.candidate for estimate in found if estimate.candidate.zero_stage == zero_stage), None)


def _micro_batches(largest: int) -> list[int]:
    return [size for size in range(1, largest + 1) if largest % size == 0]


def as_words(candidate: Candidate, configured: Candidate) -> list[str]:
    """Return the words of a command line that ask for a layout in place of the configured one."""
    settings = {
        "parallel.tensor_parallel_size": (candidate.tensor, configured.tensor),
        "parallel.pipeline_parallel_size": (candidate.pipeline, configured.pipeline),
        "parallel.sequence_parallel": (candidate.sequence_parallel, configured.sequence_parallel),
        "parallel.pipeline_schedule": (candidate.schedule, configured.schedule),
        "parallel.virtual_stages": (candidate.virtual_stages, configured.virtual_stages),
        "parallel.recompute": (candidate.recompute, configured.recompute),
        "batch.micro_batch_size": (candidate.micro_batch, configured.micro_batch),
    }
    words = [
        word for name, (value, was) in settings.items() if value != was for word in (f"--{name}", str(value).lower())
    ]
    same_cut = (candidate.pipeline, candidate.schedule, candidate.virtual_stages) == (
        configured.pipeline, configured.schedule, configured.virtual_stages,
    )  # fmt: skip
    return words if same_cut else [*words, "--parallel.stage_boundaries", "null"]
