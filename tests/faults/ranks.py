"""A run of real ranks that can be hurt: started fast from a fork server, watched through what the run writes.

Every rank is the entry point's own code path with a launcher's variables; only the import of torch is shared.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_omega.host.json_lines import read_objects
from megatron_omega.host.run_folder import METRICS, MONITOR, SUCCESS
from megatron_omega.launching.local_ranks import free_port

PR_SET_PDEATHSIG = 1
PRELOAD = ["torch._dynamo", "torch._inductor.compile_fx", "megatron_omega.run.train", "faults.injection"]


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    codes: tuple[int, ...]
    """Exit code of every rank; negative where a signal killed it."""
    log: str
    seconds: float
    """From the moment asked about to the end of the last rank."""


@dataclass
class Attempt:
    """One start of a run."""

    processes: list[BaseProcess]
    log_path: Path
    run_directory: Path

    def pid(self, rank: int) -> int:
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a rank that is still this attempt's own."""
        if self.processes[rank].is_alive():
            os.kill(self.pid(rank), number)

    @property
    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def steps(self) -> int:
        """Return the last step that metrics.jsonl knows."""
        return max((row["step"] for row in read_objects(self.run_directory / METRICS)), default=0)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 180.0) -> None:
        """Wait for `condition`; an attempt that ends first is the caller's to see."""
        until = time.monotonic() + timeout
        while self.is_alive and not condition():
            assert time.monotonic() < until, f"nothing happened in {timeout} s:\n{self.log_path.read_text()[-3000:]}"
            time.sleep(0.05)

    def wait(self, timeout: float = 240.0, since: float | None = None) -> Ending:
        """Wait for the end of all ranks; those that are left after `timeout` are killed, which no test expects."""
        begin = time.monotonic() if since is None else since
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        seconds = time.monotonic() - begin
        self.kill()
        return Ending(tuple(process.exitcode or 0 for process in self.processes), self._whole_log(), seconds)

    def kill(self) -> None:
        """End what is left."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def _whole_log(self) -> str:
        """Return the log once the monitors have had their last word."""
        until = time.monotonic() + 15.0
        while time.monotonic() < until and (self.run_directory / MONITOR).exists():
            time.sleep(0.1)
        return self.log_path.read_text(errors="replace")


@dataclass
class Run:
    """A run folder and how to start training in it."""

    config: Path
    directory: Path
    logs: Path
    world_size: int
    overrides: Sequence[str] = ()
    faults: Sequence[Mapping[str, Any]] = ()
    """What `faults.injection` is to do inside ranks."""
    environment: Mapping[str, str] = field(default_factory=dict)
    attempts: int = 0

    def start(self, *, leave_out: Sequence[int] = (), port: int | None = None) -> Attempt:
        """Start all ranks but those left out."""
        self.attempts += 1
        log_path = self.logs / f"{self.directory.name}-{self.attempts}.log"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        arguments = ["--config", str(self.config), "--logging.run_directory", str(self.directory), *self.overrides]
        place = {"WORLD_SIZE": self.world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port()}
        processes = []
        log_path.write_text("")
        for rank in range(self.world_size):
            if rank in leave_out:
                continue
            environ = {name: str(value) for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **self.environment}
            process = context.Process(target=rank_main, args=(arguments, environ, str(log_path), list(self.faults)))
            process.start()
            processes.append(process)
        return Attempt(processes, log_path, self.directory)

    def finish(self, most_starts: int = 3) -> Ending:
        """Start until the run is complete, as its supervisor would."""
        ending = self.start().wait()
        for _ in range(most_starts - 1):
            if self.is_complete:
                break
            ending = self.start().wait()
        return ending

    @property
    def is_complete(self) -> bool:
        return (self.directory / SUCCESS).exists()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_objects(self.directory / "events.jsonl") if event["event"] == kind]


def rank_main(arguments: list[str], environ: dict[str, str], log_path: str, faults: list[dict[str, Any]]) -> None:
    """Be one rank: the entry point's steps, with hooks that hurt. Ends with the fork server, and so with the test."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    import torch

    torch.set_num_threads(1)
    from faults.injection import injectors
    from megatron_omega.commands.ending import exit_cleanly
    from megatron_omega.config.arguments import parse_arguments
    from megatron_omega.config.load import resolve_run
    from megatron_omega.host.environment import complete_environment
    from megatron_omega.run.train import train

    with exit_cleanly():
        place = complete_environment()
        resolved = resolve_run(parse_arguments(arguments), place.world_size)
        train(resolved, place, hooks=injectors(faults, place.rank))


def weights_digest(checkpoint: Path) -> dict[str, Any]:
    """Return the checksums of every tensor of a checkpoint, by name: equal where all bits are."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return {
        name: [(fragment["slice"], fragment["range"], fragment["blocks"]) for fragment in entry["fragments"]]
        for name, entry in manifest["parameters"].items()
    }


def losses(run: Run) -> dict[int, float]:
    """Return the loss of every step that counts."""
    return {row["step"]: row["loss"] for row in read_objects(run.directory / METRICS)}
