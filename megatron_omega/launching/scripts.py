"""Write the scripts and host files that start a run on a cluster. The run is checked against the cluster first."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from megatron_omega.config.arguments import parse_arguments
from megatron_omega.config.load import ResolvedRun, load_config, resolve_run
from megatron_omega.errors import ConfigError
from megatron_omega.launching import templates, words

CHECKOUT_PROGRAM = "pretrain_omega.py"
PYTHON_PROGRAM, DEEPSPEED_PROGRAM = "-m megatron_omega train", "--module megatron_omega train"
"""What `python` and `deepspeed` are told to start where there is no checkout."""
PASSED_ON = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_HOME", "TORCH_EXTENSIONS_DIR")
"""Variables that ssh does not carry to the other hosts, and ranks read. No secrets: the file is plain text."""


@dataclass(frozen=True)
class Launch:
    """A run and the machines it is for."""

    arguments: tuple[str, ...]
    """Command line of the run: --config, --deepspeed_config, --section.field value."""
    nodes: int
    """Hosts that ranks run on."""
    ranks_per_node: int
    command: str
    """What wrote the script, for its reader."""
    device: str = "cuda"
    time: str = "24:00:00"
    cpus_per_rank: int = 8
    options: tuple[str, ...] = ()
    """Further options of sbatch, such as --partition=gpu."""
    program: str | None = None
    """What each rank runs, if not a training of this package."""
    is_evaluation: bool = False
    """Measure the validation loss instead of training."""
    least_nodes: int | None = None
    """Hosts that are enough to go on with, where fewer are left; as many as `nodes` where it is not given."""
    spares: int = 0
    """Hosts that are reserved besides, to take the place of faulty ones."""
    gpu: str = "h100-80g"
    """Accelerator, for the choice of a layout on fewer hosts."""

    def program_of(self, launcher_program: str) -> str:
        """Return what ranks run: in a checkout its entry point, elsewhere what a launcher takes in its place."""
        return self.program or (CHECKOUT_PROGRAM if Path(CHECKOUT_PROGRAM).exists() else launcher_program)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def fewest(self) -> int:
        return self.nodes if self.least_nodes is None else self.least_nodes

    @property
    def is_elastic(self) -> bool:
        """Whether a host can be left out."""
        return self.spares > 0 or self.fewest < self.nodes

    @property
    def reserved(self) -> str:
        """What is asked of Slurm: a number of hosts, or the fewest and the most."""
        most = self.nodes + self.spares
        return str(most) if self.fewest == most else f"{self.fewest}-{most}"

    def resolve(self) -> ResolvedRun:
        """Check the run on these machines. Raises ConfigError with every finding."""
        findings = [
            f"--{name} {value}: needed is at least 1"
            for name, value in (("nodes", self.fewest), ("ranks-per-node", self.ranks_per_node))
            if value < 1
        ]
        if self.fewest > self.nodes:
            findings.append(f"--nodes {self.fewest}-{self.nodes}: the first number is the smaller one")
        if self.spares < 0:
            findings.append(f"--spares {self.spares}: needed is at least 0")
        if findings:
            raise ConfigError(*findings)
        return resolve_run(parse_arguments(self.arguments), self.ranks)


def activation() -> str:
    """Return the line that enters the environment: the checkout's own, or the one this process runs in."""
    if Path(CHECKOUT_PROGRAM).exists():
        return "source .venv/bin/activate"
    if sys.prefix == sys.base_prefix:
        return f"# no virtual environment: {sys.executable} is used as it is found on the path"
    return f"source {shlex.quote(sys.prefix)}/bin/activate"


def run_directory(arguments: Sequence[str]) -> Path:
    """Return the run folder of a command line of a run. Raises ConfigError."""
    parsed = parse_arguments(arguments)
    return Path(load_config(parsed.config, parsed.overrides).logging.run_directory)


def slurm_script(launch: Launch, path: Path, name: str) -> str:
    """Return the batch script of a run, to be written to `path`; `name` is the job's.

    Raises ConfigError where a word would be more to Slurm or bash than what it is.
    """
    resources = [f"--gpus-per-node={launch.ranks_per_node}"] if launch.device != "cpu" else []
    is_range = "-" in launch.reserved
    resources += [] if is_range else [f"--cpus-per-task={launch.cpus_per_rank}"]
    resources += launch.options
    # Of a range of hosts Slurm gives the fewest as soon as it knows a number of tasks; srun says it anyway.
    tasks = f"--mincpus={launch.ranks_per_node * launch.cpus_per_rank}"
    tasks = tasks if is_range else f"--ntasks-per-node={launch.ranks_per_node}"
    return Template(templates.EVALUATE if launch.is_evaluation else templates.PRETRAIN).substitute(
        signal="" if launch.is_evaluation else "#SBATCH --signal=USR1@180\n",
        name=words.job_name(name),
        nodes=launch.reserved,
        environment=_environment(launch),
        hosts=_hosts(launch),
        ranks_per_node=launch.ranks_per_node,
        tasks=f"#SBATCH {tasks}",
        resources="\n".join(f"#SBATCH {words.sbatch_option(option)}" for option in resources),
        time=words.time_limit(launch.time),
        path=words.quoted("--output", [str(path)]),
        command=words.one_line("the command line", launch.command),
        threads=launch.cpus_per_rank,
        device=launch.device,
        arguments=words.quoted("the run's argument", launch.arguments),
        program=words.one_line("the program", launch.program_of(PYTHON_PROGRAM)),
        activation=words.one_line("the environment", activation()),
    )


def _hosts(launch: Launch) -> str:
    """Return the words that tell `launch begin` what to choose hosts and a layout for."""
    accelerator = "cpu" if launch.device == "cpu" else words.one_word("--gpu", launch.gpu)
    return f"--nodes {launch.fewest}-{launch.nodes} --ranks-per-node {launch.ranks_per_node} --gpu {accelerator}"


def _environment(launch: Launch) -> str:
    """Return the variables that a large run needs beside threads and device."""
    lines = ["export OMEGA_EXCHANGES_HOSTS=1 # a host that computes wrong is left out at once"] * launch.is_elastic
    if launch.device == "cuda":
        lines += [
            "# What a verdict reads when ranks hang: the last messages of every device, with their times.",
            "export TORCH_NCCL_TRACE_BUFFER_SIZE=2000 TORCH_NCCL_ENABLE_TIMING=1 TORCH_NCCL_DUMP_ON_TIMEOUT=1",
            "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        ]
    return "\n".join(lines)


def hostfile(hosts: Sequence[str], ranks_per_node: int) -> str:
    """Return DeepSpeed's list of hosts.

    >>> hostfile(["n1", "n2"], 8)
    'n1 slots=8\\nn2 slots=8\\n'
    """
    return "".join(f"{host} slots={ranks_per_node}\n" for host in hosts)


def deepspeed_environment(environ: Mapping[str, str], python: Path, *, exchanges_hosts: bool = False) -> str:
    """Return the text of DeepSpeed's environment file: what ranks on other hosts need and ssh does not carry."""
    values = _handed_on(environ, python) | ({"OMEGA_EXCHANGES_HOSTS": "1"} if exchanges_hosts else {})
    words.require_words_for_pdsh((), {}, values)
    return "".join(f"{name}={value}\n" for name, value in values.items())


def _handed_on(environ: Mapping[str, str], python: Path) -> dict[str, str]:
    path = f"{python.parent}:{environ.get('PATH', '/usr/local/bin:/usr/bin:/bin')}"
    return {"PATH": path, **{name: environ[name] for name in PASSED_ON if environ.get(name)}}


def require_reachable(arguments: Sequence[str], environ: Mapping[str, str], python: Path, checkout: Path) -> None:
    """Raise ConfigError where pdsh would not hand the command of a run to the other hosts as it stands."""
    places = {"the folder": str(checkout), "the Python": str(python)}
    words.require_words_for_pdsh(arguments, places, _handed_on(environ, python))


@dataclass(frozen=True)
class HostFiles:
    """Where the files for starting by ssh stand."""

    script: Path
    hostfile: Path
    environment: Path

    @staticmethod
    def beside(script: Path) -> HostFiles:
        return HostFiles(script, script.with_name("hostfile"), script.with_name("deepspeed_env"))


def hosts_script(launch: Launch, files: HostFiles, port: int, directory: str) -> str:
    """Return the script that starts a run on the hosts of a file by ssh, and again after failures; `directory` is its
    run folder.
    """
    return Template(templates.HOSTS).substitute(
        path=words.quoted("--output", [str(files.script)]),
        command=words.one_line("the command line", launch.command),
        run_directory=words.quoted("logging.run_directory", [directory]),
        arguments=words.quoted("the run's argument", launch.arguments),
        hostfile=shlex.quote(str(files.hostfile)),
        environment=shlex.quote(str(files.environment)),
        hosts=_hosts(launch),
        # One host that is left of several is not necessarily this one.
        several="--force_multi " if launch.reserved != "1" else "",
        port=port,
        program=launch.program_of(DEEPSPEED_PROGRAM),
        activation=activation(),
    )


def without_ssh(launch: Launch, hosts: Sequence[str], files: HostFiles, port: int) -> list[str]:
    """Return the command for each host where there is no ssh between them."""
    return [
        f"deepspeed --hostfile {shlex.quote(str(files.hostfile))} --no_ssh --node_rank {rank} --master_addr {hosts[0]} "
        f"--master_port {port} --no_local_rank {launch.program_of(DEEPSPEED_PROGRAM)} {shlex.join(launch.arguments)}"
        for rank in range(launch.nodes)
    ]


def submit(path: Path | str, chain: int = 0) -> list[str]:
    """Submit the script once, or as a chain: each job starts where the one before did not succeed.

    Return the numbers of the jobs. Raises ConfigError where Slurm refuses.
    """
    jobs: list[str] = []
    name = f"chain-{time.time_ns()}"
    for _ in range(max(1, chain)):
        command = ["sbatch", "--parsable"]
        command += [f"--export=ALL,OMEGA_CHAIN={name}", "--no-requeue"] if chain else []
        command += [f"--dependency=afternotok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        try:
            done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ConfigError("sbatch is not on this machine's path; submit the script where Slurm is") from None
        if done.returncode:
            raise ConfigError(f"sbatch refused {path}: {done.stderr.strip()}")
        jobs.append(done.stdout.strip().partition(";")[0])
    return jobs
