"""What the end of a run means: done, start again, or stop. One rule for this host, for hosts by ssh and for Slurm.

Success is the marker that rank 0 writes last, never an exit code alone: a launcher may lose ranks and return 0. Without
success, the first rank to fail is the cause; those that follow lost a peer, or were ended by the launcher.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_omega.errors import (
    DONE,
    LOST,
    CheckpointError,
    ConfigError,
    DataError,
    FaultyMachineError,
    HangError,
    Preempted,
)
from megatron_omega.host.run_folder import SUCCESS

STOPPED, HANG, FAULTY = Preempted.exit_code, HangError.exit_code, FaultyMachineError.exit_code
_REQUESTED = (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
USERS = {
    ConfigError.exit_code: "the configuration",
    DataError.exit_code: "the data",
    CheckpointError.exit_code: "a checkpoint",
}


@dataclass(frozen=True)
class End:
    """The end of one rank."""

    rank: int
    code: int
    """As a shell sees it: 128 + signal where a signal ended it."""


@dataclass(frozen=True)
class Outcome:
    """What follows from the end of a run."""

    code: int
    """The run's true exit code; 0 is success."""
    cause: str
    """In words, without a stop."""

    @property
    def is_failure(self) -> bool:
        """A failure that another start may get over."""
        return self.code in (HANG, LOST, FAULTY)


def shell_code(returned: int) -> int:
    """Return what a process returned as a shell sees it; also what launchers made of -signal by `sys.exit`.

    >>> shell_code(-9), shell_code(247), shell_code(75)
    (137, 137, 75)
    """
    number = -returned if returned < 0 else 256 - returned
    return 128 + number if 0 < number <= 64 else returned


def judge(ends: Sequence[End], launcher_code: int = 0, *, succeeded: bool = False) -> Outcome:
    """Return the outcome on ranks that ended in the order of `ends`; ranks that a launcher lost are absent.

    `succeeded`: SUCCESS exists and this run wrote it. `launcher_code` counts if no rank's code is known.
    """
    failed = [end for end in ends if end.code != DONE]
    users = [end for end in failed if end.code in USERS]
    if succeeded and not users:
        return Outcome(DONE, "the run is done")
    if users:
        return Outcome(
            users[0].code, f"rank {users[0].rank} says that {USERS[users[0].code]} is wrong (its words are above)"
        )
    if failed:
        # A request to stop may end a rank that is on its way out already: others say what it was about.
        return _of_first(next((end for end in failed if end.code not in _REQUESTED), failed[0]))
    if launcher_code:
        return _of_first(End(-1, shell_code(launcher_code)))
    return Outcome(
        LOST, f"every rank that was heard of ended well, but there is no {SUCCESS} in the run folder: ranks were lost"
    )


def _of_first(end: End) -> Outcome:
    who = f"rank {end.rank}" if end.rank >= 0 else "the launcher"
    if end.code == STOPPED:
        return Outcome(STOPPED, "the run was asked to stop and has saved")
    if end.code in _REQUESTED:
        return Outcome(STOPPED, "the run was asked to stop, before its start or on its way out")
    if end.code == HANG:
        return Outcome(HANG, f"{who} found that ranks hang")
    if end.code == FAULTY:
        return Outcome(FAULTY, f"{who} found that a machine is faulty")
    if end.code == LOST and end.rank >= 0:
        return Outcome(LOST, f"{who} was killed, or lost a peer that was")
    if end.code > 128:
        return Outcome(LOST, f"{who} was ended by signal {end.code - 128}")
    if end.code in USERS:
        return Outcome(end.code, f"{USERS[end.code]} is wrong (the words are above)")
    return Outcome(end.code, f"{who} failed with exit code {end.code}")
