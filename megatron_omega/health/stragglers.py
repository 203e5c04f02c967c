"""Stragglers: a rank that is slower than its peers, step after step, while everybody waits for it.

How long ranks take says nothing, since the fast ones wait for the slow one. What counts is how long a rank is busy in
a step: without what its main thread spends waiting for messages, or, on a machine with more ranks than cores, for a
core. Peers are the ranks of one pipeline stage, which have the same work.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from megatron_omega.config.layout import Layout
from megatron_omega.parallel.counting import MESSAGES
from megatron_omega.parallel.places import Places
from megatron_omega.parallel.shared_memory import Message
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import Fault, StepReport

SHARE = 0.75
"""Least share of the last steps in which a straggler is the slowest of its peers."""
CHANCE = 1e-6
"""Among few peers somebody is often the slowest by chance: it has to be less likely than this."""
FACTOR = 1.1
"""Least median of its busy time over its peers'."""
_SAMPLED = 10
"""On a GPU every so many steps are measured: waiting is seen there only by a device that stands still."""


def factors(busy: Sequence[float], layout: Layout) -> list[tuple[int, float]]:
    """Return (slowest rank, its busy time over the median of its peers') for every pipeline stage with peers.

    `busy` holds every rank's busy seconds of one step. A stage's ranks stand side by side.
    """
    stages = np.asarray(busy, dtype=np.float64).reshape(layout.pipeline, -1)
    peers = stages.shape[1]
    if peers == 1:
        return []
    slowest = stages.argmax(axis=1)
    others = np.median(np.sort(stages, axis=1)[:, :-1], axis=1)
    shares = stages.max(axis=1) / np.maximum(others, 1e-9)
    firsts = range(0, len(busy), peers)
    return [(first + int(who), float(share)) for first, who, share in zip(firsts, slowest, shares, strict=True)]


def times_needed(window: int, peers: int) -> int:
    """Return how often of `window` steps one of `peers` must be the slowest to be a straggler.

    >>> times_needed(20, 2), times_needed(20, 4), times_needed(20, 8)
    (20, 16, 15)
    """
    often = math.ceil(SHARE * window)
    while often < window and _tail(often, window, 1 / peers) > CHANCE:
        often += 1
    return often


def _tail(least: int, window: int, probability: float) -> float:
    """Return how likely at least `least` of `window` independent events are."""
    return sum(
        math.comb(window, n) * probability**n * (1 - probability) ** (window - n) for n in range(least, window + 1)
    )


class Stragglers:
    """Judges busy times. Pure: every rank that sees the same times names the same ranks."""

    def __init__(self, layout: Layout, window: int) -> None:
        """`window`: steps over which a rank must be slow to be named."""
        self._layout, self._window = layout, window
        self._peers = layout.data * layout.tensor
        stages = layout.pipeline if self._peers > 1 else 0
        self._needed = times_needed(window, self._peers)
        self._steps: list[deque[tuple[int, float]]] = [deque(maxlen=window) for _ in range(stages)]
        self._named: set[int] = set()

    def observe(self, busy: Sequence[float]) -> list[tuple[int, float]]:
        """Take one step's busy seconds of all ranks; return (rank, median factor) of those that are now to be named.

        A rank is named once, and again only when it was no straggler for a while in between.
        """
        fresh = []
        for stage, found in enumerate(factors(busy, self._layout)):
            steps = self._steps[stage]
            steps.append(found)
            times_slowest = {rank: [factor for who, factor in steps if who == rank] for rank, _ in steps}
            for rank, seen in times_slowest.items():
                is_slow = len(seen) >= self._needed and statistics.median(seen) >= FACTOR
                if is_slow and rank not in self._named:
                    fresh.append((rank, statistics.median(seen)))
                    self._named.add(rank)
            of_stage = {rank for rank in self._named if rank // self._peers == stage}
            self._named -= {rank for rank in of_stage if len(times_slowest.get(rank, ())) < SHARE / 2 * self._window}
        return fresh


class QueueClock:
    """How long this thread has been ready to run and was not let run. Nothing where the system does not tell."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        with suppress(OSError):
            self._descriptor = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)

    def seconds(self) -> float:
        """Return the seconds so far."""
        if self._descriptor is None:
            return 0.0
        return int(os.pread(self._descriptor, 64, 0).split()[1]) / 1e9

    def close(self) -> None:
        """Close the system's file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class BusyClock:
    """Measures how long training is busy: neither waiting in torch.distributed, whoever calls it, nor for a core."""

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        """`synchronise` lets the device finish what it was given; None on a CPU, whose calls return when they are done.

        A device is let finish before every message, which belongs to busy time, and after every wait, which does not.
        """
        self._synchronise = synchronise
        self._replaced: list[tuple[type, str, Any]] = []
        """(class, name, what stood there) of every method that has a clock around it."""
        self._thread = threading.get_ident()
        self._queue = QueueClock()
        self._began = self._idle = 0.0

    @property
    def is_running(self) -> bool:
        return bool(self._replaced)

    def start(self) -> None:
        """Measure from now on: put a clock around `wait`, through which every wait goes."""
        self.stop()
        for owner in (Work, Message):
            self._replace(owner, "wait", self._timed(owner.wait))
        if self._synchronise is not None:
            for name in MESSAGES:
                self._let_finish_before(name, self._synchronise)
        self._began, self._idle = self._now(), 0.0

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def timed(work: Work, *arguments: Any, **options: Any) -> Any:
            if not self._is_of_training():
                return wait(work, *arguments, **options)
            return self._time(lambda: wait(work, *arguments, **options))

        return timed

    def _is_of_training(self) -> bool:
        """Return whether this thread trains: the one that is measured or, for a device, that of its backward pass.

        While torch's engine runs the backward pass in a thread of its own, the first one stands still.
        """
        if threading.get_ident() == self._thread:
            return True
        return self._synchronise is not None and isinstance(threading.current_thread(), threading._DummyThread)

    def stop(self) -> float:
        """Measure no more; return the busy seconds."""
        if not self.is_running:
            return 0.0
        for owner, name, method in self._replaced:
            setattr(owner, name, method)
        self._replaced.clear()
        return self._now() - self._began - self._idle

    def close(self) -> None:
        """Stop, and let go of the system's file."""
        self.stop()
        self._queue.close()

    def _let_finish_before(self, name: str, synchronise: Callable[[], None]) -> None:
        issue = getattr(ProcessGroup, name)

        def issued(*arguments: Any, **options: Any) -> Any:
            synchronise()
            return issue(*arguments, **options)

        self._replace(ProcessGroup, name, issued)

    def _replace(self, owner: type, name: str, method: Callable[..., Any]) -> None:
        self._replaced.append((owner, name, vars(owner)[name]))  # as it stands there: what getattr gives does not bind
        setattr(owner, name, method)

    def _now(self) -> float:
        """Return the time after the device has finished, without what this thread waited for a core."""
        if self._synchronise is not None:
            self._synchronise()
        return self._time_now()

    def _time_now(self) -> float:
        return time.perf_counter() - self._queue.seconds()

    def _time(self, wait: Callable[[], Any]) -> Any:
        begin = self._time_now()
        try:
            return wait()
        finally:
            self._idle += self._now() - begin


def _finish_stream() -> None:
    torch.cuda.current_stream().synchronize()


class StragglerWatch(Hook):
    """Measures how long every rank is busy in a step, and names stragglers. Stands before the hooks it measures."""

    def __init__(self, layout: Layout, places: Places, *, window: int, tell: Callable[[Fault], None]) -> None:
        """`tell` is called with what was found, on every rank."""
        is_gpu = torch.cuda.is_available()
        self._layout, self._places, self._tell = layout, places, tell
        self._stragglers = Stragglers(layout, window)
        self._clock = BusyClock(_finish_stream if is_gpu else None)
        self._every = _SAMPLED if is_gpu else 1

    def on_step_begin(self, step: int) -> None:
        if step % self._every == 0:
            self._clock.start()

    def on_step_end(self, report: StepReport) -> None:
        if not self._clock.is_running:
            return
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mine = torch.tensor([self._clock.stop()], dtype=torch.float64, device=device)
        everyone = mine.new_empty(self._layout.world_size)
        dist.all_gather(list(everyone.split(1)), mine)
        busy = everyone.tolist()
        for rank, factor in self._stragglers.observe(busy):
            message = (
                f"{self._places.name(rank)} is a straggler: busy {factor:.2f} times as long as its peers in most "
                f"of the last steps, up to step {report.step}; everybody waits for it"
            )
            details = {"step": report.step, "hosts": [self._places.hosts[rank]], "factor": factor, "busy_seconds": busy}
            self._tell(Fault("straggler", message, (rank,), details))

    def on_close(self) -> None:
        self._clock.close()
