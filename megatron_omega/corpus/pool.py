"""Worker processes that make parts: a task out, a report back, in whatever order they finish."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import signal
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_omega.corpus.parts import PartMaker, PartReport, Task
from megatron_omega.errors import DataError, OmegaError

_PR_SET_PDEATHSIG = 1
_AGAIN = "the same command goes on from there"


def make_parts(maker: PartMaker, tasks: Iterable[Task], workers: int) -> Iterator[PartReport]:
    """Make every part, in `workers` processes (in this one where workers is 0), and yield reports as they come.

    Raises DataError if the input cannot be read, the disk is full or a worker dies; finished parts remain.
    """
    if workers == 0:
        for task in tasks:
            yield _raise_or_return(_attempt(maker, task))
        return
    pool = _Pool(maker, workers)
    try:
        yield from pool.run(iter(tasks))
    finally:
        pool.close()


class _Pool:
    def __init__(self, maker: PartMaker, workers: int) -> None:
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        process_class: Any = context.Process  # pyright: ignore[reportAttributeAccessIssue]
        self._processes: dict[Connection, BaseProcess] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            others = [ours, *self._processes]
            process = process_class(
                target=_serve, args=(maker, theirs, others if method == "fork" else []), daemon=True
            )
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self, tasks: Iterator[Task]) -> Iterator[PartReport]:
        busy: set[Connection] = set()
        for connection in self._processes:
            self._next(connection, tasks, busy)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                answer = self._receive(ready)
                busy.discard(ready)
                self._next(ready, tasks, busy)
                yield _raise_or_return(answer)

    def close(self) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
            process.join()

    def _next(self, connection: Connection, tasks: Iterator[Task], busy: set[Connection]) -> None:
        task = next(tasks, None)
        if task is not None:
            connection.send(task)
            busy.add(connection)

    def _receive(self, connection: Connection) -> PartReport | OmegaError:
        try:
            return connection.recv()
        except (EOFError, ConnectionError):
            process = self._processes[connection]
            process.join()
            code = process.exitcode or 0
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise DataError(
                f"a worker ended {how}, perhaps for want of memory; finished parts are kept, {_AGAIN} "
                "(try fewer --workers)"
            ) from None


def _serve(maker: PartMaker, connection: Connection, others: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_parent()
    for other in others:
        other.close()  # a worker must see the end of its own connection when the parent is gone
    try:
        while True:
            connection.send(_attempt(maker, connection.recv()))
    except (EOFError, ConnectionError):
        return


def _die_with_parent() -> None:
    """End at once when the parent is killed, so that the lock it held is free for the next start (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _attempt(maker: PartMaker, task: Task) -> PartReport | OmegaError:
    try:
        return maker.make(task)
    except OmegaError as error:
        return error
    except OSError as error:
        return DataError(_describe(error, maker))


def _describe(error: OSError, maker: PartMaker) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {maker.folder} is full; finished parts are kept: free some space, then {_AGAIN}"
    return (
        f"{error.filename or maker.folder} failed ({error.strerror}); finished parts are kept: mend it, then {_AGAIN}"
    )


def _raise_or_return(answer: PartReport | OmegaError) -> PartReport:
    if isinstance(answer, OmegaError):
        raise answer
    return answer
