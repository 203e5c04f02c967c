"""The errors a user can meet, each with the exit code of the command that ends with it: all exit codes are here.

An `OmegaError` is a sentence for the user: what was found, what is needed, what to do. commands/ending turns it into
that sentence on stderr and its exit code; everything else that is raised is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

DONE: Final = 0
BUG: Final = 1
"""Anything raised that is no `OmegaError`."""
LOST: Final = 137
"""A rank was killed, or lost a peer that was; as a shell writes SIGKILL."""


class OmegaError(Exception):
    """A failure the user can mend. Carries one or several independent findings."""

    exit_code = BUG

    def __init__(self, *findings: str) -> None:
        super().__init__("\n".join(findings))
        self.findings: Sequence[str] = findings

    def __str__(self) -> str:
        if len(self.findings) == 1:
            return self.findings[0]
        return "\n".join(f"{number}. {finding}" for number, finding in enumerate(self.findings, start=1))

    def __reduce__(self) -> tuple[type[OmegaError], tuple[str, ...]]:
        return type(self), tuple(self.findings)  # errors cross process borders (worker pools)


class ConfigError(OmegaError):
    """The configuration cannot be run. Holds every finding, not only the first."""

    exit_code = 2


class DataError(OmegaError):
    """A corpus, shard or tokenizer is missing, damaged or does not fit the model."""

    exit_code = 3


class CheckpointError(OmegaError):
    """A checkpoint is missing, damaged or belongs to another model."""

    exit_code = 4


class Preempted(OmegaError):
    """The run was asked to stop, has saved, and wants to be started again."""

    exit_code = 75


class HangError(OmegaError):
    """Ranks stopped making progress."""

    exit_code = 76


class FaultyMachineError(OmegaError):
    """A machine does not do what it should: it computes wrong, or fails, or is far slower than the others."""

    exit_code = 77
