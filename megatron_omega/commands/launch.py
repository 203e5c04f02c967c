"""Start a run on this machine, on several, or under Slurm; docs/launching.md shows each.

    megatron-omega launch local --ranks 8 --config examples/omega-tiny/run.yaml [--section.field value ...]
    megatron-omega launch hostfile --hosts n1 n2 --ranks-per-node 8 --config ...
    megatron-omega launch slurm --nodes 64 --ranks-per-node 8 --config examples/omega-11.9b/run.yaml [--submit]

What is not an option of this verb is the command line of `train`. `begin` and `end` are for the scripts.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from megatron_omega.commands.fitting import fit, job_hosts
from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import COMMAND, CommandLine, output_file, writing
from megatron_omega.host.environment import host_name
from megatron_omega.host.exclusions import excluded, short_name
from megatron_omega.host.shipped import located, presets
from megatron_omega.launching import scripts
from megatron_omega.launching.by_ssh import listed, reachable
from megatron_omega.launching.outcome import LOST, Outcome
from megatron_omega.launching.turns import MAX_RESTARTS, Turn, next_step
from megatron_omega.launching.words import require_hosts, require_port
from megatron_omega.log import configure_logging, get_logger

PACKAGE = "megatron_omega"


def _range(text: str) -> tuple[int, int]:
    """Read `N` or `LEAST-N`."""
    least, _, most = text.rpartition("-")
    return int(least or most), int(most)


log = get_logger()


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = CommandLine(
        description=(__doc__ or "").split("\n")[0], epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True)
    local = verbs.add_parser("local", allow_abbrev=False, help="run on this machine, and again after failures")
    local.add_argument("--ranks", type=int, required=True, help="processes")
    local.add_argument("--port", type=int, help="where ranks meet (default: a free port)")
    local.add_argument(
        "--max-restarts", type=int, default=MAX_RESTARTS, help=f"failures in a row (default {MAX_RESTARTS})"
    )
    hosts = verbs.add_parser("hostfile", allow_abbrev=False, help="write a hostfile and the script that uses it")
    hosts.add_argument("--hosts", nargs="+", required=True, help="names, the first one is rank 0's; spares last")
    hosts.add_argument(
        "--nodes",
        type=_range,
        metavar="N|LEAST-N",
        help="machines to run on; with LEAST- so few are enough (default all)",
    )
    hosts.add_argument("--port", type=int, default=29500, help="of the first host, where ranks meet (default 29500)")
    slurm = verbs.add_parser("slurm", allow_abbrev=False, help="write a batch script")
    slurm.add_argument(
        "--nodes", type=_range, required=True, metavar="N|LEAST-N", help="machines; with LEAST- so few are enough"
    )
    slurm.add_argument("--spares", type=int, default=0, help="machines reserved besides, to replace faulty ones")
    slurm.add_argument("--time", default="24:00:00", help="limit of one turn (default 24:00:00)")
    slurm.add_argument("--cpus-per-rank", type=int, default=8, help="cores (default 8)")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="such as --sbatch=--partition=gpu"
    )
    slurm.add_argument("--evaluate", action="store_true", help="measure the validation loss instead of training")
    slurm.add_argument("--submit", action="store_true", help="submit it, too")
    slurm.add_argument(
        "--chain", type=int, default=0, metavar="N",
        help="with --submit: N jobs one after the other instead of one that requeues itself, where that is not allowed",
    )  # fmt: skip
    for verb in (hosts, slurm):
        verb.add_argument("--ranks-per-node", type=int, required=True, help="processes on each machine")
        verb.add_argument(
            "--gpu", default="h100-80g", help="accelerator, for a layout on fewer machines (default h100-80g)"
        )
        verb.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="one GPU for each rank, or none")
        verb.add_argument("--output", type=output_file, help="script to write (default: in the folder of --config)")
        verb.add_argument("--dry-run", action="store_true", help="print only")
    begin = verbs.add_parser("begin", allow_abbrev=False, help="for scripts: record a start, print where codes go")
    begin.add_argument("--nodes", type=_range, help="machines to run on: choose among the job's")
    begin.add_argument("--ranks-per-node", type=int, help="processes on each machine")
    begin.add_argument("--gpu", default="cpu", help="accelerator, for a layout on fewer machines (default cpu)")
    begin.add_argument("--hostfile", type=Path, help="choose among its hosts that answer, instead of a Slurm job's")
    begin.add_argument("--by-pdsh", action="store_true", help="check that other hosts will read the command as it is")
    end = verbs.add_parser("end", allow_abbrev=False, help="for scripts: judge an end, print whether to start again")
    end.add_argument("--code", type=int, required=True, help="exit code of the launcher")
    end.add_argument("--stop-is-final", action="store_true", help="a stop was the user's wish, not the scheduler's")
    return parser


def run_local(arguments: argparse.Namespace, run: list[str]) -> int:
    """Run on this machine; return the run's exit code."""
    from megatron_omega.launching.supervisor import Job, supervise

    launch = scripts.Launch(tuple(run), 1, arguments.ranks, command="")
    directory = Path(launch.resolve().config.logging.run_directory)
    for one in excluded(directory):
        if short_name(one.host) == short_name(host_name()):
            log.warning("this host was found faulty, and there is no other: %s", one)
    program = [sys.executable, "-u", "-m", PACKAGE, "train", *run]
    turn = Turn(directory, f"local-{os.getpid()}", max_restarts=arguments.max_restarts)
    return supervise(Job(program, arguments.ranks, port=arguments.port), turn).code


def write_hosts(arguments: argparse.Namespace, run: list[str]) -> int:
    """Write hostfile, environment file and script; print them."""
    require_hosts(arguments.hosts)
    require_port(arguments.port)
    least, most = arguments.nodes or (len(arguments.hosts),) * 2
    if most > len(arguments.hosts):
        raise ConfigError(f"--nodes {most}: --hosts names {len(arguments.hosts)}; name more, or ask for fewer")
    launch = scripts.Launch(
        tuple(run), most, arguments.ranks_per_node, command=arguments.command, device=arguments.device,
        least_nodes=least, spares=len(arguments.hosts) - most, gpu=arguments.gpu,
    )  # fmt: skip
    directory = launch.resolve().config.logging.run_directory
    scripts.require_reachable(run, os.environ, Path(sys.executable), Path.cwd())
    files = scripts.HostFiles.beside(arguments.output or _beside_config(run, "hosts.sh"))
    texts = {
        files.hostfile: scripts.hostfile(arguments.hosts, arguments.ranks_per_node),
        files.environment: scripts.deepspeed_environment(
            os.environ, Path(sys.executable), exchanges_hosts=launch.is_elastic
        ),
        files.script: scripts.hosts_script(launch, files, arguments.port, directory),
    }
    for file, text in texts.items():
        print(f"== {file}\n{text}")
        if not arguments.dry_run:
            with writing(file):
                file.write_text(text)
    print("== where there is no ssh between the hosts, instead of the script, in the checkout on each host:")
    print("\n".join(scripts.without_ssh(launch, arguments.hosts, files, arguments.port)))
    return 0


def write_slurm(arguments: argparse.Namespace, run: list[str]) -> int:
    """Write and print the batch script; submit it where asked."""
    path = arguments.output or _beside_config(run, "evaluate.sbatch" if arguments.evaluate else "slurm.sbatch")
    launch = scripts.Launch(
        tuple(run), arguments.nodes[1], arguments.ranks_per_node, command=arguments.command, device=arguments.device,
        time=arguments.time, cpus_per_rank=arguments.cpus_per_rank, options=tuple(arguments.sbatch),
        is_evaluation=arguments.evaluate, least_nodes=arguments.nodes[0], spares=arguments.spares, gpu=arguments.gpu,
    )  # fmt: skip
    name = Path(launch.resolve().config.logging.run_directory).name
    text = scripts.slurm_script(launch, path, f"{name}-evaluate" if arguments.evaluate else name)
    print(text, end="")
    if arguments.dry_run:
        return 0
    with writing(path):
        path.write_text(text)
    if arguments.submit:
        jobs = scripts.submit(path, arguments.chain)
        print(f"submitted: {', '.join(jobs)}", file=sys.stderr)
    return 0


def begin(arguments: argparse.Namespace, run: list[str]) -> int:
    """Record the start of a turn and print the folder where failing ranks leave their exit codes."""
    if arguments.by_pdsh:
        scripts.require_reachable(run, os.environ, Path(sys.executable), Path.cwd())
    turn, hosts = _turn(run), os.environ.get("SLURM_JOB_NODELIST", "the hosts of the hostfile")
    final = turn.last_final_code() if "OMEGA_CHAIN" in os.environ else None
    if final is not None:
        log.error("an earlier job of this chain ended with exit code %d; this one has nothing to do", final)
        return final
    if not turn.may_start():
        outcome = Outcome(LOST, "starts came to no end (did nodes fail?)")
        log.error("%s", next_step(turn, outcome, goes_on_when_stopped=True)[1])
        return LOST
    chosen = None
    if arguments.nodes is not None:
        least = arguments.nodes[0]
        names = reachable(listed(arguments.hostfile), least) if arguments.hostfile else job_hosts(hosts)
        chosen = fit(run, names, turn.run_directory, arguments)
        hosts = ",".join(chosen.hosts)
    turn.begin(hosts=hosts)
    log.info("job %s, restart %d, on %s", turn.job, turn.restart, hosts)
    print(turn.codes if chosen is None else chosen.for_shell(turn.codes))
    return 0


def end(arguments: argparse.Namespace, run: list[str]) -> int:
    """Judge a turn; print `again` where another is to follow; return the run's exit code."""
    turn = _turn(run)
    outcome = turn.end(arguments.code)
    again, sentence = next_step(turn, outcome, goes_on_when_stopped=not arguments.stop_is_final)
    log.log(logging.WARNING if outcome.code else logging.INFO, "%s", sentence)
    if again:
        print("again")
    return outcome.code


def _turn(run: list[str]) -> Turn:
    environ = os.environ
    return Turn(
        scripts.run_directory(run).absolute(),
        environ.get("OMEGA_CHAIN") or environ.get("SLURM_JOB_ID") or environ.get("OMEGA_JOB", "by-hand"),
        int(environ.get("SLURM_RESTART_COUNT", "0")),
        int(environ.get("OMEGA_MAX_RESTARTS", str(MAX_RESTARTS))),
    )


def _beside_config(run: list[str], name: str) -> Path:
    words = dict(pairwise(run))
    if "--config" not in words:
        raise ConfigError(f"there is no --config to put {name} beside; give --output")
    path = located(words["--config"], presets())
    return (path.parent if path == Path(words["--config"]) else Path()) / name  # nothing is written into the package


def _command(argv: Sequence[str]) -> str:
    return shlex.join([COMMAND, "launch", *(word for word in argv if word not in ("--dry-run", "--submit"))])


def main(argv: Sequence[str]) -> int:
    """Run the tool; return its exit code."""
    arguments, run = build_parser().parse_known_args(argv)
    arguments.command = _command(argv)
    configure_logging()
    if arguments.verb == "local":
        return run_local(arguments, run)
    if arguments.verb == "hostfile":
        return write_hosts(arguments, run)
    if arguments.verb == "slurm":
        return write_slurm(arguments, run)
    return begin(arguments, run) if arguments.verb == "begin" else end(arguments, run)
