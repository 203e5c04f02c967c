"""Changes to DeepSpeed objects at run time, each with the fault it mends; all were found in DeepSpeed 0.19.8.

A new version of DeepSpeed is a reason to try each without its repair: the tests of engine/ and of layouts fail then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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

from megatron_omega.config.layout import Axis
from megatron_omega.parallel.topology import Topology

_ELSEWHERE = dist.GroupMember.NON_GROUP_MEMBER


def skip_inference_extension() -> None:
    """Keep DeepSpeed from compiling a C++ extension, for inference only, at a process's first start on a CPU."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


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

    DeepSpeed 0.19 creates every group of its grid, which are ours once more: 720 of them at PP 8 x DP 64 x TP 2, each a
    meeting of all ranks. Groups that are not ours (of a tied table's stages) are created as before, by all ranks.
    """
    if not dist.is_initialized():
        yield
        return
    create, layout, world = dist.new_group, topology.layout, tuple(range(topology.layout.world_size))
    ours = (topology.tensor, topology.data, topology.pipeline, topology.model)
    axes: Sequence[tuple[Axis, ...]] = (("tensor",), ("data",), ("pipeline",), ("pipeline", "tensor"))
    known: dict[tuple[int, ...], Any] = {ranks: _ELSEWHERE for names in axes for ranks in layout.groups(*names)}
    known |= {group.ranks: group.handle for group in ours} | {world: dist.group.WORLD}

    def new_group(ranks: Iterable[int] | None = None, **options: Any) -> Any:
        members = world if ranks is None else tuple(ranks)
        return known[members] if members in known else create(list(members), **options)

    dist.new_group = new_group
    try:
        yield
    finally:
        dist.new_group = create
