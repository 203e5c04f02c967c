"""What ranks on a device say to each other: collectives on every axis, layouts that agree, a broken rank named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omega.config.layout import Axis, Layout
from megatron_omega.engine.internals import weight_copies
from megatron_omega.engine.start import accelerator, start_distributed
from megatron_omega.health.weights import Integrity
from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.places import gather_places
from megatron_omega.parallel.topology import Group, create_topology
from megatron_omega.planner.machine import this_machine
from megatron_omega.studies.device.findings import Finding, LeftOut, Setting
from megatron_omega.studies.device.oracle import plain_losses, relative
from megatron_omega.studies.device.training import in_ranks, losses
from megatron_omega.studies.made_up import few, replica_batches, start_engine

STEPS = 3
FP32_LIMIT = 2e-5
MESSAGE_BYTES = {"cpu": 2**22, "cuda": 2**28}
ROUNDS = 5
SHARE_OF_LINK = 0.4
"""What an all-reduce has to reach of a link's rate."""
BROKEN_RANK = 1
BIT = 1 << 20
"""Flipped in the broken rank's weights: a part in eight of an fp32 number."""
ALONE: tuple[tuple[dict[str, Any], int], ...] = (({}, 1), ({}, 2), ({}, 3))
"""Settings of `parallel` and the ZeRO stage of the layouts of one rank."""


def layouts(ranks: int) -> list[tuple[dict[str, Any], int]]:
    """Return the layouts that are compared on so many ranks: each axis, both schedules, ZeRO 1 to 3."""
    if ranks == 1:
        return list(ALONE)
    rest = ranks // 2
    interleaved = {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2}
    found: list[tuple[dict[str, Any], int]] = [
        ({"tensor_parallel_size": 2, "sequence_parallel": True}, 1),
        ({"pipeline_parallel_size": 2}, 1),
        (interleaved, 1),
        ({}, 3),
    ]
    if rest > 1:
        found.append(({"tensor_parallel_size": 2, **interleaved}, 1))
    return found


def grids(ranks: int) -> list[Layout]:
    """Return layouts of so many ranks in which, together, every axis has several."""
    if ranks % 8 == 0:
        return [Layout(pipeline=2, data=ranks // 4, tensor=2)]
    return [Layout(tensor=ranks), Layout(pipeline=ranks), Layout(data=ranks)]


def check_groups(setting: Setting) -> Iterator[Finding | LeftOut]:
    """Check collectives on the groups of every axis, and how fast an all-reduce is."""
    if setting.ranks < 2:
        yield LeftOut("groups", "one GPU has nobody to talk to; give --gpus 8")
        return
    results = in_ranks(setting, groups, setting.ranks, setting.device)
    for axis in results[0]:
        wrong = sum(result[axis][0] for result in results)
        yield Finding("groups", f"{axis}: wrong results of 4 collectives on {setting.ranks} ranks", wrong, 0)
        rate = min(result[axis][1] for result in results)
        yield Finding("groups", f"{axis}: all-reduce", rate / 1e9, _least_rate(setting), "GB/s", is_floor=True)


def _least_rate(setting: Setting) -> float | None:
    """Return what an all-reduce inside a node has to reach, in GB/s; None for a CPU, which others may be using."""
    machine = this_machine(torch.cuda.get_device_name()) if setting.on_gpu else None
    return None if machine is None else SHARE_OF_LINK * machine.hardware.link.bytes_per_second / 1e9


def groups(device: str) -> dict[Axis, tuple[int, float]]:
    """Return, for each axis, the number of wrong collectives and the rate of an all-reduce; in a rank."""
    start_distributed(local_rank=int(os.environ["LOCAL_RANK"]), timeout_seconds=120)
    found: dict[Axis, tuple[int, float]] = {}
    for layout in grids(dist.get_world_size()):
        topology = create_topology(layout)
        axes: dict[Axis, Group] = {"tensor": topology.tensor, "data": topology.data, "pipeline": topology.pipeline}
        for axis, group in axes.items():
            if group.size > 1:
                found[axis] = (wrong_collectives(group), all_reduce_rate(group, MESSAGE_BYTES[device]))
    return found


def wrong_collectives(group: Group) -> int:
    """Return how many collectives of a group give what they should not. Collective."""
    device, me, size = accelerator().current_device_name(), group.rank, group.size
    mine = torch.arange(4.0 * size, device=device) + me
    everyone = torch.stack([torch.arange(4.0 * size, device=device) + rank for rank in range(size)])
    total = mine.clone()
    dist.all_reduce(total, group=group.handle)
    gathered = torch.empty(size * 4 * size, device=device)
    dist.all_gather_into_tensor(gathered, mine, group=group.handle)
    part = torch.empty(4, device=device)
    dist.reduce_scatter_tensor(part, mine, group=group.handle)
    handed = torch.empty_like(mine)
    after, before = group.ranks[(me + 1) % size], group.ranks[(me - 1) % size]
    sends = [dist.P2POp(dist.isend, mine, after, group.handle), dist.P2POp(dist.irecv, handed, before, group.handle)]
    for work in dist.batch_isend_irecv(sends):
        work.wait()
    meant = (everyone.sum(0), everyone.flatten(), everyone.sum(0)[4 * me : 4 * me + 4], everyone[(me - 1) % size])
    results = (total, gathered, part, handed)
    return sum(not torch.equal(one, other) for one, other in zip(results, meant, strict=True))


def all_reduce_rate(group: Group, num_bytes: int) -> float:
    """Return bytes per second that each rank sends in an all-reduce of `num_bytes`. Collective."""
    device = accelerator()
    tensor = torch.zeros(num_bytes // 4, device=device.current_device_name())
    seconds = []
    for _ in range(ROUNDS):
        device.synchronize()
        begin = time.perf_counter()
        dist.all_reduce(tensor, group=group.handle)
        device.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * (group.size - 1) / group.size * num_bytes / min(seconds)


def check_layouts(setting: Setting) -> Iterator[Finding]:
    """Compare the losses of layouts with a training in fp64 on one CPU."""
    meant = plain_losses(few(), STEPS)
    wanted = layouts(setting.ranks)
    results = in_ranks(setting, every_layout, setting.ranks, wanted)
    for (parallel, stage), found in zip(wanted, results[0], strict=True):
        words = " ".join(f"{name}={value}" for name, value in parallel.items()) or f"data_parallel={setting.ranks}"
        what = f"{words}, ZeRO-{stage}: {STEPS} losses, relative to fp64"
        yield Finding("layouts", what, relative(found, meant), FP32_LIMIT)


def every_layout(wanted: list[tuple[dict[str, Any], int]]) -> list[list[float]]:
    """Return the losses under every layout, one after the other; in a rank."""
    return [losses(few(parallel={"recompute": "none", **parallel}), STEPS, stage) for parallel, stage in wanted]


def check_faults(setting: Setting) -> Iterator[Finding | LeftOut]:
    """Flip a bit in one rank's weights, and see whether that rank is named."""
    if setting.ranks < 2:
        yield LeftOut("faults", "one GPU has no other to compare with; give --gpus 8")
        return
    results = in_ranks(setting, flipped, setting.ranks)
    before = sum(len(named) for named, _ in results)
    yield Finding("faults", "ranks named while nothing is wrong", before, 0)
    wrong = [named for _, named in results if named != [BROKEN_RANK]]
    yield Finding("faults", f"ranks that do not name rank {BROKEN_RANK}, whose weight lost a bit", len(wrong), 0,
                  detail=", ".join(map(str, wrong[:3])))  # fmt: skip


def flipped() -> tuple[list[int], list[int]]:
    """Return the ranks that are named before and after a bit of the broken rank's weights is flipped; in a rank."""
    config = few()
    engine = start_engine(config, 1)
    places = gather_places(engine.topology.layout, Peers(timeout=timedelta(minutes=1)))
    integrity = Integrity(engine.deepspeed, engine.topology, places, interval_steps=1)
    batches = replica_batches(config, engine)
    step = partial(engine.train_step, batches, learning_rate=1e-3)
    step()
    return _named(integrity), _after_flip(integrity, engine, step)


def _after_flip(integrity: Integrity, engine: Any, step: Callable[[], Any]) -> list[int]:
    if dist.get_rank() == BROKEN_RANK:
        copies = weight_copies(engine.deepspeed)
        flip(next(part for part in (*copies.rows, *copies.own) if part.numel()))
    step()
    return _named(integrity)


def _named(integrity: Integrity) -> list[int]:
    fault = integrity.find_fault()
    return [] if fault is None else list(fault.ranks)


@torch.no_grad()
def flip(weights: Tensor) -> None:
    """Flip one bit of the first number of `weights`."""
    weights.view(-1)[:1].view(torch.int32).bitwise_xor_(BIT)
