"""Batches in a given order, read in this process or by worker processes. Workers change the speed, never the order.

A worker is a fresh Python that imports the data wing only (no torch, no copy of the training process); it gets lists of
sample indices over a socket and answers with batches. It ends when its socket closes, so it never outlives training.
"""

from __future__ import annotations

import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Protocol

from typing_extensions import Self

from megatron_omega.data.batch import Batch, Sample, stack
from megatron_omega.errors import DataError, OmegaError
from megatron_omega.host.child_process import start_python
from megatron_omega.log import get_logger

log = get_logger(__name__)
MOST_DEATHS = 3
"""How often in a row a worker may die before it is given up."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What a terminal or a scheduler sends to every process of a run. Training answers; its workers end with it."""


class IndexedSamples(Protocol):
    """Anything that gives a sample for an index, and can be sent to a worker."""

    def __getitem__(self, index: int) -> Sample: ...


def micro_batch_indices(
    consumed_samples: int,
    samples_of_step: Callable[[int], Sequence[range]],
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[list[int]]:
    """Yield, for ever, the sample indices of each micro-batch of one replica.

    The step that starts at `consumed` takes the samples that `samples_of_step` says, and the next one starts at their
    end; micro-batch m of replica r takes its micro_batch_size samples from number (m · data_parallel_size + r) ·
    micro_batch_size of them on.
    """
    consumed = consumed_samples
    stride = micro_batch_size * data_parallel_size
    while True:
        pieces = samples_of_step(consumed)
        samples = list(chain.from_iterable(pieces))
        if not samples or len(samples) % stride:
            raise ValueError(
                f"a step of {len(samples)} samples cannot be dealt to {data_parallel_size} x {micro_batch_size}"
            )
        for start in range(data_parallel_rank * micro_batch_size, len(samples), stride):
            yield samples[start : start + micro_batch_size]
        consumed = pieces[-1].stop


def build_batch(source: IndexedSamples, indices: Sequence[int]) -> Batch:
    """Return the batch of the samples `indices`."""
    return stack([source[index].row for index in indices])


class _Worker:
    """One worker process and the socket to it. One that is killed is replaced: what it was asked is asked again."""

    def __init__(self, source: IndexedSamples) -> None:
        self._source = source
        self._pending: deque[list[int]] = deque()
        self._deaths = 0
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, indices: list[int]) -> None:
        self._pending.append(indices)
        try:
            self._connection.send(indices)
        except (BrokenPipeError, ConnectionError):
            self._replace()

    def answer(self) -> Batch:
        """Return the batch of the oldest question."""
        while True:
            try:
                answer = self._connection.recv()
                break
            except (EOFError, ConnectionError):
                self._replace()
        self._pending.popleft()
        self._deaths = 0
        if isinstance(answer, OmegaError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"a data worker failed:\n{answer}")
        return answer

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        self._process = start_python(
            "megatron_omega.data.loader_worker",
            [theirs.fileno()],
            blocked=STOP_SIGNALS,
            environment={"OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        with suppress(BrokenPipeError, ConnectionError):  # its death is met where its answer is waited for
            for message in (self._source, *self._pending):
                self._connection.send(message)

    def _replace(self) -> None:
        self._connection.close()
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._deaths += 1
        if self._deaths > MOST_DEATHS:
            raise DataError(
                f"data worker {self.pid} {how}, the {self._deaths}th time without a batch in between; where the system "
                "ran out of memory, lower data.num_workers or data.prefetch_batches, then start again: the run "
                "continues where it was"
            )
        log.warning("data worker %d %s; another takes its place", self.pid, how)
        self._start()


class Loader:
    """Iterator of batches: one for each list of `indices`, in their order.

    With `num_workers` > 0, worker k builds batches k, k + num_workers, ...; each keeps up to `prefetch_batches` ready.
    """

    def __init__(
        self, source: IndexedSamples, indices: Iterator[list[int]], num_workers: int = 0, prefetch_batches: int = 2
    ) -> None:
        self._source, self._indices = source, indices
        self._workers = [_Worker(source) for _ in range(num_workers)]
        self._asked: deque[_Worker] = deque()
        self._turn = 0
        for _ in range(num_workers * prefetch_batches):
            self._ask_next()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if not self._workers:
            return build_batch(self._source, next(self._indices))
        if not self._asked:
            raise StopIteration
        batch = self._asked.popleft().answer()
        self._ask_next()
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """End the workers. Closing twice is harmless."""
        workers, self._workers = self._workers, []
        self._asked.clear()
        self._indices = iter(())
        for worker in workers:
            worker.close()

    def _ask_next(self) -> None:
        indices = next(self._indices, None)
        if indices is None:
            return
        worker = self._workers[self._turn % len(self._workers)]
        self._turn += 1
        worker.ask(indices)
        self._asked.append(worker)


def serve(connection: Connection) -> None:
    """Answer index lists with batches until the other side closes; errors are answers too."""
    try:
        source: IndexedSamples = connection.recv()
        while True:
            indices = connection.recv()
            connection.send(_answer(source, indices))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        connection.close()


def _answer(source: IndexedSamples, indices: list[int]) -> Batch | OmegaError | str:
    try:
        return build_batch(source, indices)
    except OmegaError as error:
        return error
    except Exception:  # whatever it is, training must learn of it with its traceback
        import traceback

        return traceback.format_exc()
