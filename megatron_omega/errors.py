"""The errors a user can meet, each with the exit code of the command that ends with it.

An `OmegaError` is a sentence for the user: what was found, what is needed, what to do. Entry points turn it
into that sentence on stderr and its exit code (`exit_cleanly`); everything else that is raised is a bug of ours.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_omega.redaction import redact


class OmegaError(Exception):
    """A failure the user can mend. Carries one or several independent findings."""

    exit_code = 1

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


GRACE_SECONDS = 3.0
LONGEST_GRACE_SECONDS = 60.0


def _announced(error: OmegaError) -> str:
    if isinstance(error, Preempted):
        return str(error)
    return f"error: {error}" if len(error.findings) == 1 else f"errors:\n{error}"


@contextmanager
def exit_cleanly() -> Iterator[None]:
    """End the process with one clear message and the right exit code where an `OmegaError` was raised.

    Every rank finds the same configuration errors; rank 0 says them.
    """
    try:
        yield
    except OmegaError as error:
        rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
        if rank == 0 or _outlives_rank_0(rank, error):
            print(redact(_announced(error)), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: not an error of ours
        raise SystemExit(0) from None


def _outlives_rank_0(rank: int, error: OmegaError) -> bool:
    """Wait for rank 0 to be heard; return whether this rank, the first that nobody ended meanwhile, has to speak.

    A launcher ends all ranks as soon as one has failed. The first to fail would silence rank 0; and where rank 0 has no
    error, as when a file is missing on one machine only, nobody would say it.
    """
    if not isinstance(error, ConfigError):
        return False
    time.sleep(min(GRACE_SECONDS * (1 + rank), LONGEST_GRACE_SECONDS))
    return True
