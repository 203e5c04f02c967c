"""How a command ends: an `OmegaError` becomes one message on stderr and its exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_omega.errors import ConfigError, OmegaError, Preempted
from megatron_omega.host.environment import speaking_rank
from megatron_omega.host.redaction import redact

GRACE_SECONDS = 3.0
LONGEST_GRACE_SECONDS = 60.0


def _printable(text: str) -> str:
    """Return text that any stream takes: what is no Unicode, as in the name of a file, with escapes."""
    return text.encode(errors="backslashreplace").decode()


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
        rank = speaking_rank()
        if rank == 0 or _outlives_rank_0(rank, error):
            print(_printable(redact(_announced(error))), file=sys.stderr)
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
