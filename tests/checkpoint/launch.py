"""Starts gloo ranks for the tests of this folder: forked from one warm server, so that a launch costs no imports."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PRELOADED = [
    "deepspeed",
    "torch._dynamo",
    "functorch.compile",
    "synthetic",
    "scenarios",
    "megatron_omega.run.train",
    "megatron_omega.checkpoint.store",
]


def rank_context() -> ForkServerContext:
    """Return the context whose children have torch and the package loaded."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in ":".join(paths).split(":") if path))
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "error"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Ranks:
    """Running ranks: each calls `function(*arguments)`."""

    def __init__(self, size: int, function: Callable[..., Any], *arguments: Any) -> None:
        context = rank_context()
        self._folder = tempfile.TemporaryDirectory()
        self._results = context.Queue()
        rendezvous = f"file://{self._folder.name}/rendezvous"
        self.processes = [
            context.Process(target=_run, args=(rank, size, rendezvous, self._results, function, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def results(self, *, timeout: float = 300) -> list[Any]:
        """Wait for all ranks and return what each returned; the first failure ends them all and is raised."""
        found: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(found) < len(self.processes):
                rank, value, failure = self._next(deadline)
                assert failure is None, f"rank {rank} failed:\n{failure}"
                found[rank] = value
        finally:
            self.stop()
        return [found[rank] for rank in sorted(found)]

    def _next(self, deadline: float) -> tuple[int, Any, str | None]:
        while True:
            try:
                return self._results.get(timeout=1)
            except queue.Empty:
                dead = [rank for rank, process in enumerate(self.processes) if process.exitcode not in (None, 0)]
                assert not dead, f"ranks {dead} died: exit codes {[process.exitcode for process in self.processes]}"
                assert time.monotonic() < deadline, "ranks did not finish"

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300) -> list[Any]:
    """Call `function(*arguments)` on `size` ranks and return their results."""
    return Ranks(size, function, *arguments).results(timeout=timeout)


def _run(
    rank: int, size: int, rendezvous: str, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    try:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        value = function(*arguments)
        dist.barrier()
        dist.destroy_process_group()
        results.put((rank, value, None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)  # a process group whose other ranks are stuck would keep this one
