"""Bytes of one rank: weights, gradients, optimizer state, activations in flight, what the engine and the run time hold.

States follow what DeepSpeed 0.19 allocates for the optimizer it picks: BF16_Optimizer for bf16 at stage 1 (fp32
gradients are kept whole beside the bf16 ones), its ZeRO optimizers elsewhere, the plain AdamW at stage 0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_omega.planner.activations import FP32
from megatron_omega.planner.hardware import GIB

REDUCE_BUCKET = 200_000_000
"""Elements DeepSpeed gathers before a reduction at stages 2 and 3, as in ds_configs/."""
ALL_REDUCE_BUCKET = 500_000_000
"""Elements DeepSpeed flattens for one all-reduce at stages 0 and 1."""
LIVE_PARAMETERS = 1_000_000_000
"""Gathered parameters that stage 3 keeps alive at most."""
GPU_RUNTIME = int(2.0 * GIB)
"""CUDA context, kernels, communicators."""
CPU_RUNTIME = int(1.5 * 2**20)
"""What a CPU process, all its libraries loaded, allocates with its first engine and step beside what is listed here.

What the C library keeps of freed memory is not counted: 10 to 20 MiB in a small model, 2% in one of 300 million."""
ALLOCATOR_SLACK = 0.04
"""Share of activations lost between blocks of the caching allocator."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moment."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    """Master weights and both moments."""
    activations: int = 0
    """Kept for the backward pass, all micro-batches in flight."""
    working: int = 0
    """Of the layer that runs backward: recomputed activations and gradients; logits of one chunk."""
    buffers: int = 0
    """Communication buckets, tensors received from and waiting for other stages."""
    runtime: int = 0
    """Driver, kernels, communicators, allocator slack."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def states(
    parameters: int, *, dtype: str, zero_stage: int, data_parallel_size: int, copies_messages: bool = False
) -> Memory:
    """Return weights, gradients, optimizer state and buckets for `parameters` local parameters.

    `copies_messages`: scatters and gathers go through copies, as in gloo on a CPU.
    """
    dp, element = data_parallel_size, FP32 if dtype == "fp32" else 2
    share = -(-parameters // dp)
    copied = element if copies_messages and dp > 1 else 0
    flattened = min(parameters, ALL_REDUCE_BUCKET)  # also by a single replica, which sends nothing
    if zero_stage == 0:
        bucket = flattened * element
        return Memory(element * parameters, element * parameters, 2 * FP32 * parameters, buffers=bucket)
    optimizer = 3 * FP32 * share
    if zero_stage == 1 and dtype == "bf16":
        return Memory(element * parameters, (element + FP32) * parameters, optimizer, buffers=flattened * FP32)
    if zero_stage == 1:
        gradients = element * parameters + FP32 * share
        return Memory(element * parameters, gradients, optimizer, buffers=flattened * element)
    reduced = min(parameters, REDUCE_BUCKET)
    bucket = 2 * reduced * element
    if zero_stage == 2:
        return Memory(element * parameters, FP32 * share, optimizer, buffers=bucket + reduced * copied)
    live = min(parameters, LIVE_PARAMETERS)  # a single replica copies them, too
    copies = 2 * (reduced + live) * copied  # DeepSpeed joins what it sends, gloo clones it
    return Memory(element * share, FP32 * share, optimizer, buffers=bucket + live * element + copies)


def runtime(activations: int, *, is_cpu: bool) -> int:
    """Return what the run time takes; the baseline of a CPU process (interpreter, torch, DeepSpeed) is not counted."""
    return CPU_RUNTIME if is_cpu else GPU_RUNTIME + int(ALLOCATOR_SLACK * activations)
