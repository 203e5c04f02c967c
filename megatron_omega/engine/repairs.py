"""Changes to DeepSpeed objects at run time, each with the fault it mends; all were found in DeepSpeed 0.19.8.

A new version of DeepSpeed is a reason to try each without its repair: the tests of engine/ and of layouts fail then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.timer import NoopTimer
from torch import Tensor

from megatron_omega.config.deepspeed import IN_PLACE_ELEMENTS
from megatron_omega.config.layout import Axis
from megatron_omega.parallel.topology import Topology, own_group

_ELSEWHERE = dist.GroupMember.NON_GROUP_MEMBER


def skip_inference_extension() -> None:
    """Keep DeepSpeed from compiling a C++ extension, for inference only, at a process's first start on a CPU."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def sum_with_fewer_copies(values: Mapping[str, Any], *, is_cpu: bool) -> Mapping[str, Any]:
    """Let ZeRO-1 sum gradients in the bucket that they were copied to, and on a CPU large ones where they lie.

    With `reduce_scatter`, DeepSpeed sums whole buckets too at stage 1, but joins them before, and copies them back.
    What the JSON says stays as it is, and so does the way of gradients to a host (offload_optimizer).
    """
    zero = values["zero_optimization"]
    if zero["stage"] != 1 or zero.get("offload_optimizer"):
        return values
    own = {"reduce_scatter": False, **({"reduce_bucket_size": IN_PLACE_ELEMENTS} if is_cpu else {})}
    return {**values, "zero_optimization": own | zero}


def sum_nothing_over_one_replica(engine: Any) -> None:
    """Let the gradients of an only replica lie: without ZeRO, DeepSpeed joins them, sums them, and copies them back."""
    sum_and_copy = engine.allreduce_and_copy

    def allreduce_and_copy(small_bucket: Sequence[Tensor], dp_group: Any, dp_world_size: int | None = None) -> None:
        replicas = dist.get_world_size(dp_group) if dp_world_size is None else dp_world_size
        if replicas > 1 or any(gradient.dtype != engine.communication_data_type for gradient in small_bucket):
            sum_and_copy(small_bucket, dp_group, dp_world_size)

    engine.allreduce_and_copy = allreduce_and_copy


def agree_on_norm_groups(optimizer: Any, topology: Topology) -> None:
    """Let stages with fewer parameter groups take part in the norm of every group.

    ZeRO reduces the gradient norm over all stages once per group; a stage that lacks one would let the others wait.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    accelerator: Any = get_accelerator()
    count = torch.tensor(len(optimizer.bit16_groups), device=accelerator.current_device_name())
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=topology.model.handle)
    missing = int(count) - len(optimizer.bit16_groups)
    if missing == 0:
        return

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        norms = [
            optimizer.complete_grad_norm_calculation_for_cpu_offload(optimizer.params_in_partition[index])
            if optimizer.cpu_offload
            else optimizer.get_grad_norm_direct(
                optimizer.averaged_gradients[index], optimizer.params_in_partition[index]
            )
            for index in range(len(optimizer.bit16_groups))
        ]
        norms += [optimizer.get_grad_norm_direct([], []) for _ in range(missing)]
        return combine_grad_norm_groups(norms, norm_type=norm_type)

    optimizer.scaled_global_norm = scaled_global_norm


def stop_timers(engine: Any) -> None:
    """Let the engine's own timers rest unless they are asked for: each step would leave two events behind for ever."""
    if not engine.wall_clock_breakdown():
        engine.timers = NoopTimer()


def clear_gradients_once_taken(optimizer: Any) -> None:
    """Let bf16 gradients be cleared after the optimizer added them to its own, and not before the next backward pass.

    "Before" is when that pass reaches what the module returned. The loss is outside of it: what it gives straight to a
    parameter (the token table, where the last stage needs it for the loss only) comes earlier, and would be lost.
    """
    if not isinstance(optimizer, BF16_Optimizer) or optimizer.immediate_grad_update:
        return
    take = optimizer.update_hp_grads
    optimizer.update_hp_grads = lambda clear_lp_grads=False: take(clear_lp_grads=True)
    optimizer.backward_prologue = lambda: None


@contextmanager
def handing_over_groups(topology: Topology) -> Iterator[None]:
    """Let DeepSpeed's grid take the groups of `topology`.

    DeepSpeed 0.19 creates every group of its grid, which are ours once more, and then one for each copy of the stages
    that share a table: 720 and 128 at PP 8 x DP 64 x TP 2, each a meeting of all ranks on CUDA. Those of a table are
    created here, all at the first question, with our patience (DeepSpeed leaves it to torch: 10 minutes on NCCL).
    """
    if not dist.is_initialized():
        yield
        return
    create, layout, world = dist.new_group, topology.layout, tuple(range(topology.layout.world_size))
    axes: Sequence[tuple[Axis, ...]] = (("tensor",), ("data",), ("pipeline",), ("pipeline", "tensor"))
    known: dict[tuple[int, ...], Any] = {ranks: _ELSEWHERE for names in axes for ranks in layout.groups(*names)}
    known |= {group.ranks: group.handle for group in topology.groups} | {world: dist.group.WORLD}

    def new_group(ranks: Iterable[int] | None = None) -> Any:
        members = world if ranks is None else tuple(ranks)
        if members not in known:
            dist.new_group = create
            known.update(_of_the_same_stages(members, topology))
            dist.new_group = new_group
        return known[members]

    dist.new_group = new_group
    try:
        yield
    finally:
        dist.new_group = create


def _of_the_same_stages(members: Sequence[int], topology: Topology) -> dict[tuple[int, ...], Any]:
    """Create a group like that of `members`, some stages of one pipeline, in every pipeline; return all by ranks."""
    stages = {topology.layout.coordinate(rank).pipeline for rank in members}
    pipelines = topology.layout.groups("pipeline")
    alike = [tuple(ranks[stage] for stage in sorted(stages)) for ranks in pipelines]
    assert tuple(members) in alike, f"ranks {members} are no stages of one pipeline"
    own = own_group(alike, topology.timeout)
    return {ranks: own if topology.rank in ranks else _ELSEWHERE for ranks in alike}
