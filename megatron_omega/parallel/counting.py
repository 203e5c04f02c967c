"""Every message that this process sends or joins is counted, whoever sends it: the engine, a layer, a hook.

What is counted are calls of torch's process groups: messages inside compiled layers are left out, on all ranks alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import ProcessGroup

from megatron_omega.parallel.shared_memory import SharedMemoryGroup

_IN_SOME_VERSION = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "allgather_coalesced", "_allgather_base",
    "all_gather_single", "all_gather_single_coalesced", "allgather_into_tensor_coalesced", "gather", "scatter",
    "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base", "all_to_all_single", "barrier",
)  # fmt: skip
COLLECTIVES = tuple(name for name in _IN_SOME_VERSION if name in vars(ProcessGroup))
"""Methods in which all ranks of a group take part, in this version of torch."""
MESSAGES = (*COLLECTIVES, "send", "recv")
"""Methods that send or join a message."""


class Ledger(Protocol):
    """What keeps the counts."""

    def open_row(self, name: str) -> None: ...
    def count(self, name: str, operation: str) -> None: ...


def count_messages(ledger: Ledger) -> Callable[[], None]:
    """Count every message from now on; return what ends it. All ranks call it at the same place of their program."""
    classes = (ProcessGroup, SharedMemoryGroup)
    before = [(owner, name, vars(owner)[name]) for owner in classes for name in MESSAGES if name in vars(owner)]
    for owner, name, _ in before:
        counted = _counted if name in COLLECTIVES else _counted_transfer
        setattr(owner, name, counted(getattr(owner, name), name, ledger))
    open_rows(ledger)

    def restore() -> None:
        for owner, name, method in before:
            setattr(owner, name, method)

    return restore


def open_rows(ledger: Ledger) -> None:
    """Begin a row for every group that this rank is in, so that one who has not come yet is known to be missing."""
    for group in dist.distributed_c10d._world.pg_names:
        ledger.open_row(group.group_name)


def _counted(method: Callable[..., Any], name: str, ledger: Ledger) -> Callable[..., Any]:
    operation = name.strip("_")

    @wraps(method)
    def counted(group: ProcessGroup, *arguments: Any, **options: Any) -> Any:
        ledger.count(group.group_name, operation)
        return method(group, *arguments, **options)

    return counted


def _counted_transfer(method: Callable[..., Any], name: str, ledger: Ledger) -> Callable[..., Any]:
    @wraps(method)
    def counted(group: ProcessGroup, tensors: Any, peer: int, *arguments: Any, **options: Any) -> Any:
        ends = dist.get_global_rank(group, group.rank()), dist.get_global_rank(group, int(peer))
        sender, receiver = ends if name == "send" else ends[::-1]
        ledger.count(f"{group.group_name}:{sender}>{receiver}", name)
        return method(group, tensors, peer, *arguments, **options)

    return counted


Progress = Mapping[str, tuple[int, int]]
"""Messages that the device has started and finished, for every group."""
TRANSFERS = "transfers"
"""Stands for everything between two ranks, whose numbers are not the same on both."""


def device_progress(device_type: str) -> Callable[[], tuple[bool, Progress]] | None:
    """Return what says, from any thread, whether this rank's device has work left, and how far its messages are.

    None on a CPU. The progress is empty where torch's flight recorder is off.
    """
    if device_type != "cuda":
        return None
    device = torch.cuda.current_device()
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json", None)

    def ask() -> tuple[bool, Progress]:
        is_busy = not torch.cuda.default_stream(device).query()
        return is_busy, {} if dump is None else progress_of(json.loads(dump(includeCollectives=True, onlyActive=True)))

    return ask


def progress_of(recorded: Mapping[str, Any]) -> Progress:
    """Read what torch's flight recorder says of every group, and of what is under way between two ranks.

    >>> status = {"last_enqueued_collective": 9, "last_started_collective": 8, "last_completed_collective": 7}
    >>> progress_of({"pg_config": {"0": {"name": "7"}}, "pg_status": {"0": status}, "entries": [{"is_p2p": True}]})
    {'7': (8, 7), 'transfers': (1, 0)}
    """
    names = {key: str(group.get("name", key)) for key, group in recorded.get("pg_config", {}).items()}
    found = {}
    for key, status in recorded.get("pg_status", {}).items():
        started, finished = (int(status.get(f"last_{what}_collective", -1)) for what in ("started", "completed"))
        found[names.get(key, key)] = (started, finished) if started >= finished else (-1, -1)  # it keeps no times
    if any(entry.get("is_p2p") for entry in recorded.get("entries", ())):
        found[TRANSFERS] = (1, 0)
    return found
