"""Run all ranks on this host, start them again after a failure, and hand requests to stop on to them.

The supervisor is its ranks' parent and group: what is sent to the group reaches them, the kernel kills them where the
supervisor dies, and what they leave behind is ended before the next turn. Training itself decides what SIGTERM and
SIGUSR1 mean (save, exit 75); here they are only passed on. DeepSpeed's own launcher cannot serve: it kills its ranks
30 seconds after a SIGTERM, saved or not, and returns 1.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil

from megatron_omega.host.environment import free_port
from megatron_omega.launching.outcome import DONE, STOPPED, End, Outcome, shell_code
from megatron_omega.launching.turns import Turn, next_step
from megatron_omega.log import get_logger

GRACE_SECONDS = 8.0
"""How long the others may take to notice that a rank failed, and to say so, before they are killed; as long again for
what ended ranks had started."""
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_WATCHED = {*REQUESTS, signal.SIGCHLD}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")

log = get_logger(__name__)


@dataclass(frozen=True)
class Job:
    """What to run on this host."""

    program: Sequence[str]
    """Command line of one rank."""
    ranks: int
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    port: int | None = None
    """Where ranks meet; a free one for each turn if it is not given."""
    grace_seconds: float = GRACE_SECONDS


def supervise(job: Job, turn: Turn) -> Outcome:
    """Run `job` until it is done, is asked to stop, or fails in a way that another start does not mend.

    A request to stop (SIGTERM, SIGUSR1, Ctrl-C) is passed on and ends the supervisor too; Ctrl-C again kills.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a dead rank leaves behind becomes ours to end
    try:
        while True:
            turn.begin(ranks=job.ranks)
            ends, is_asked_to_stop = _Ranks(job).run()
            outcome = turn.end(next((end.code for end in ends if end.code), 0), ends)
            if is_asked_to_stop and outcome.is_failure:
                outcome = Outcome(STOPPED, f"the run was asked to stop before it could save ({outcome.cause})")
            again, sentence = next_step(turn, outcome, goes_on_when_stopped=False)
            (log.info if outcome.code == DONE else log.warning)("%s", sentence)
            if not again:
                return outcome
            turn = replace(turn, restart=turn.restart + 1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class _Ranks:
    """The ranks of one turn."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._ends: list[End] = []
        self._is_asked_to_stop = False
        self._deadline: float | None = None
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def run(self) -> tuple[list[End], bool]:
        """Return the ends of all ranks in their order, and whether a request to stop came in between."""
        try:
            self._start()
            while self._running:
                self._wait()
        finally:
            for process in self._running.values():
                process.kill()
                process.wait()
            _end_orphans(self._job.grace_seconds)
        return self._ends, self._is_asked_to_stop

    def _start(self) -> None:
        place = {name: value for name, value in self._job.environ.items() if name not in _RANK_VARIABLES}
        place |= {"WORLD_SIZE": str(self._job.ranks), "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = str(self._job.port or free_port())
        for rank in range(self._job.ranks):
            environ = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._running[rank] = subprocess.Popen(self._job.program, env=environ, preexec_fn=_become_rank)

    def _wait(self) -> None:
        """Wait for a rank to end, a signal, or the end of the grace."""
        seconds = 3600.0 if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        found = signal.sigtimedwait(_WATCHED, seconds)
        if found is None and self._deadline is not None:
            log.warning("ranks %s did not end by themselves and are killed", sorted(self._running))
            self._send(signal.SIGKILL)
            self._deadline = None
        elif found is not None and found.si_signo in REQUESTS:
            self._pass_on(signal.Signals(found.si_signo))
        self._collect()

    def _pass_on(self, request: signal.Signals) -> None:
        if request == signal.SIGINT and self._is_asked_to_stop:
            self._send(signal.SIGKILL)
            return
        log.warning("%s: the ranks are asked to save and stop", request.name)
        self._is_asked_to_stop = True
        self._send(signal.SIGTERM if request == signal.SIGINT else request)

    def _send(self, number: signal.Signals) -> None:
        for process in self._running.values():
            process.send_signal(number)

    def _collect(self) -> None:
        for rank, process in list(self._running.items()):
            returned = process.poll()
            if returned is None:
                continue
            del self._running[rank]
            end = End(rank, shell_code(returned))
            self._ends.append(end)
            # After an end on request, or a good one, the others are saving or finishing too, and have all their time.
            if end.code not in (DONE, STOPPED) and self._deadline is None:
                self._deadline = time.monotonic() + self._job.grace_seconds


def _become_rank() -> None:
    """In the new process: die with the supervisor; leave Ctrl-C to it; take all other signals as they come."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)


def _end_orphans(grace_seconds: float) -> None:
    """End what the ranks started; whatever is still writing down why they failed may do so first."""
    orphans = psutil.Process().children(recursive=True)
    _, living = psutil.wait_procs(orphans, timeout=grace_seconds)
    for orphan in living:
        orphan.kill()
    psutil.wait_procs(living)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
