"""Start ranks on this machine and collect what they return. For tools and tests; real runs use a launcher.

A fork server imports the heavy modules once, so that a rank starts in milliseconds instead of seconds. When one rank
fails the others are ended, and its error is raised here.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_omega.errors import OmegaError
from megatron_omega.host.environment import free_port

_PRELOAD = [
    "torch._dynamo",  # what DeepSpeed and the hooks import late
    "torch._inductor.compile_fx",
    "matplotlib.backends.backend_agg",
    "megatron_omega.run.train",
]


class RankFailed(RuntimeError):
    """A rank ended with an error that is not the user's."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    preload: Sequence[str] = _PRELOAD,
    timeout_seconds: float = 600.0,
) -> list[Any]:
    """Call `function(*arguments)` in `world_size` CPU processes; return what each returned, by rank.

    The rank variables of a launcher are set. Raises the first failing rank's `OmegaError`, `RankFailed` for any other
    error, TimeoutError where a rank is not done in time. No process is left behind.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    port, processes, readers = free_port(), [], []
    try:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            process = context.Process(target=_run_rank, args=(writer, place, function, arguments), daemon=True)
            process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        return _collect(readers, time.monotonic() + timeout_seconds)
    finally:
        _end(processes)


def _run_rank(
    writer: Connection, place: dict[str, int], function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    try:
        import torch

        torch.set_num_threads(1)
        outcome = (True, function(*arguments))
    except OmegaError as error:
        outcome = (False, error)
    except BaseException:
        outcome = (False, RankFailed(f"rank {place['RANK']}:\n{traceback.format_exc()}"))
    writer.send(outcome)
    writer.close()


def _collect(readers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        pending = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {[readers.index(reader) for reader in pending]} did not finish in time")  # pyright: ignore[reportArgumentType]
        for reader in ready:
            rank = readers.index(reader)  # pyright: ignore[reportArgumentType]
            try:
                succeeded, result = readers[rank].recv()
            except EOFError:
                raise RankFailed(f"rank {rank} died without a word") from None
            if not succeeded:
                raise result
            results[rank] = result
    return [results[rank] for rank in range(len(readers))]


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(timeout=0.5)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
