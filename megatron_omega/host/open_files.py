"""How many files and connections a process may have open: raised as far as the system allows, and what a run needs."""

from __future__ import annotations

import contextlib
import resource

_MOST = 1 << 17
"""No process needs more; some systems give a billion, and programs that close all of them take hours."""
_OWN = 512
"""What a rank opens however large the run is: libraries, loader workers, files of the run, connections of a device."""


def allow_many_files() -> int:
    """Raise the soft limit of open files to the hard one; return what it is now. Children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def files_needed(rank: int, world_size: int, group_sizes: int) -> int:
    """Return how many files a rank, or the monitor beside it, has open at most.

    Rank 0 keeps a connection to every rank, and so does its monitor. `group_sizes` is the sum of the sizes of those
    process groups whose members are all connected with each other (gloo); 0 on a GPU.

    >>> files_needed(0, 1024, 0), files_needed(5, 1024, 0)
    (1536, 512)
    """
    return _OWN + group_sizes + (world_size if rank == 0 else 0)
