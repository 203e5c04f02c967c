"""A small Python beside this process: a module of this package, started with the same import path.

One way for loader workers and rank monitors. Signals that the child must not die of are blocked from its first
instruction on; it unblocks them once it has said what it does with them (`ignore_signals`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path


def start_python(
    module: str,
    descriptors: Collection[int],
    *,
    blocked: Collection[signal.Signals],
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `python -m module DESCRIPTOR ...`, which inherits those file descriptors and nothing of standard input.

    Args:
        blocked: signals that the child must not see before it called `ignore_signals`.
        environment: variables on top of this process's own.
    """
    path = os.pathsep.join(path for path in sys.path if path)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, descriptors)],
            pass_fds=tuple(descriptors),
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def anonymous_file(size: int) -> int:
    """Return the descriptor of a file of `size` bytes that has no name: a child inherits it, and it goes with both."""
    descriptor, path = tempfile.mkstemp()
    Path(path).unlink()
    os.ftruncate(descriptor, size)
    return descriptor


def ignore_signals(signals: Collection[signal.Signals]) -> None:
    """Ignore `signals` in this process, and let them come: what a child calls first."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
