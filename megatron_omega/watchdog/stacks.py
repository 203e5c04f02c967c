"""Reading the stacks that `faulthandler` writes: where a process stands, and whether it waits for others there.

Pure functions of text. The main thread is the one that trains; a dump lists the innermost frame first.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'^  File "(.*)", line (\d+|\?\?\?) in (.*)$')
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/comm.py", "deepspeed/comm/torch.py",
                "megatron_omega/parallel/exchange.py", "megatron_omega/parallel/shared_memory.py",
                "megatron_omega/parallel/slots.py")  # fmt: skip
_PASSED_OVER = (*_COLLECTIVES, "torch/distributed/c10d_logger.py", "deepspeed/comm/", "deepspeed/utils/timer.py",
                "megatron_omega/health/stragglers.py",
                "torch/utils/_contextlib.py", "torch/autograd/")  # fmt: skip


_DEVICE_FILES = ("torch/cuda/streams.py",)
_DEVICE_WAIT = re.compile(
    r"\.(item|tolist|cpu|numpy|synchronize|wait)\(|\b(float|int|bool)\(|run_backward\(|\.to\(|_cuda_synchronize"
)


@dataclass(frozen=True)
class Frame:
    """One Python frame."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        parts = PurePath(self.file).parts
        roots = [index for index, part in enumerate(parts) if part in ("megatron_omega", "site-packages")]
        start = roots[-1] + (parts[roots[-1]] == "site-packages") if roots else max(0, len(parts) - 2)
        return f"{'/'.join(parts[start:])}:{self.line} in {self.function}"


def main_thread(dump: str, ident: int) -> list[Frame]:
    """Return the frames of the thread `ident`, innermost first; of the last thread where it is not listed."""
    threads: dict[int, list[Frame]] = {}
    frames: list[Frame] = []
    for line in dump.splitlines():
        thread, frame = _THREAD.match(line), _FRAME.match(line)
        if thread:
            frames = threads.setdefault(int(thread[1], 16), [])
        elif frame:
            frames.append(Frame(frame[1], int(frame[2]) if frame[2].isdigit() else 0, frame[3]))
    return threads.get(ident, frames)


def collective_of(frames: Sequence[Frame]) -> str | None:
    """Return the name of the communication call that the thread is inside; None where it is not."""
    names = [frame.function for frame in frames if frame.file.endswith(_COLLECTIVES)]
    return next((name for name in reversed(names) if name not in ("wrapper", "log_wrapper")), None) if names else None


def waits_for_device(frames: Sequence[Frame]) -> bool:
    """Return whether the innermost line is one in which a host waits until its device is done. Reads the source."""
    if not frames:
        return False
    innermost = frames[0]
    line = linecache.getline(innermost.file, innermost.line)
    return innermost.file.endswith(_DEVICE_FILES) or _DEVICE_WAIT.search(line) is not None


def caller_of(frames: Sequence[Frame]) -> Frame | None:
    """Return the innermost frame that is neither of the communication library nor of the autograd engine."""
    own = (frame for frame in frames if not any(part in frame.file for part in _PASSED_OVER))
    return next(own, frames[0] if frames else None)
