"""Bytes of one rank: weights, gradients, optimizer state, activations in flight, what the engine and the run time hold.

A rank is fullest at one of a few moments: at some layer of a backward pass, when gradients are reduced after the last
one, or when the optimizer steps. States follow what DeepSpeed 0.19 allocates for the optimizer it picks:
BF16_Optimizer for bf16 at stage 1 (fp32 gradients are kept whole beside the bf16 ones), its ZeRO optimizers elsewhere,
the plain AdamW at stage 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_omega.config.deepspeed import IN_PLACE_ELEMENTS
from megatron_omega.planner.activations import FP32
from megatron_omega.planner.hardware import CPU_HOOKS, CPU_RUNTIME, GIB

REDUCE_BUCKET = 200_000_000
"""Elements DeepSpeed gathers before a reduction at stages 2 and 3, as in ds_configs/."""
ALL_REDUCE_BUCKET = 500_000_000
"""Elements DeepSpeed joins for one all-reduce at stages 0 and 1."""
LIVE_PARAMETERS = 1_000_000_000
"""Gathered parameters that stage 3 keeps alive at most."""
GPU_RUNTIME = int(2.0 * GIB)
"""CUDA context, kernels, communicators."""
ALLOCATOR_SLACK = 0.04
"""Share of activations lost between blocks of the caching allocator."""


class Memory(NamedTuple):
    """Bytes of one rank at its fullest moment. A tuple: a plan makes hundreds of thousands."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    """Master weights and both moments."""
    activations: int = 0
    """Kept for the backward pass, all micro-batches in flight."""
    working: int = 0
    """Of the layer that runs backward: recomputed activations and gradients; logits of one chunk."""
    buffers: int = 0
    """Communication buckets, gathered parameters, tensors received from and waiting for other stages."""
    runtime: int = 0
    """Driver, kernels, communicators, allocator slack."""

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class States:
    """What a rank holds for its own `parameters`, and for how long."""

    parameters: int
    """Local ones: its part of tensors and stages, all of them that it shares with its replicas."""
    dtype: str
    zero_stage: int
    data_parallel_size: int
    persistent: int = 0
    """Parameters that stage 3 never lets go of, in small tensors."""
    matrices: int = 0
    """Parameters that Muon moves: they have one moment."""
    is_cpu: bool = False
    """Whether only the part of a bucket that is written to counts, and gloo copies what it sends."""

    @property
    def share(self) -> int:
        """Parameters whose optimizer state this rank holds."""
        return -(-self.parameters // self.data_parallel_size) if self.zero_stage else self.parameters

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return FP32 if self.dtype == "fp32" else 2

    @property
    def weights(self) -> int:
        return self.element * (self.share + self.persistent if self.zero_stage == 3 else self.parameters)

    @property
    def optimizer(self) -> int:
        """Both moments, and from stage 1 on the master weights."""
        matrices = -(-self.matrices // self.data_parallel_size) if self.zero_stage else self.matrices
        return (3 if self.zero_stage else 2) * FP32 * self.share - FP32 * matrices

    @property
    def _has_fp32_gradients(self) -> bool:
        return self.zero_stage == 1 and self.dtype == "bf16"

    def in_backward(self, formed: int, *, is_first: bool) -> Memory:
        """Return what is held when the gradients of `formed` parameters have been formed in this backward pass.

        `is_first`: no other micro-batch of the step has run backward yet.
        """
        if self.zero_stage <= 1:
            gradients = self.element * (formed if is_first else self.parameters)
            gradients += FP32 * self.parameters * self._has_fp32_gradients
        else:
            gradients = 0 if is_first and self.zero_stage == 2 else FP32 * self.share  # stage 3 allocates it at once
            gradients += 0 if self.zero_stage == 3 else self.element * formed // self.data_parallel_size
        return Memory(self.weights, gradients, self.optimizer, buffers=self._buckets(formed))

    def _buckets(self, formed: int) -> int:
        """Buckets gradients are copied into, parameters gathered, and what sending copies, in a backward pass."""
        if self.zero_stage == 0 or self._has_fp32_gradients:
            return 0
        element = self.element
        if self.zero_stage == 1:  # a CPU writes to it after the last backward pass only
            return 0 if self.is_cpu else ALL_REDUCE_BUCKET * element
        is_flushed = formed >= min(REDUCE_BUCKET, self.parameters)
        sent = min(formed, REDUCE_BUCKET) * element if is_flushed else 0
        if self.zero_stage == 2:
            both = 2 * REDUCE_BUCKET * element
            copied = sent if self.is_cpu and self.data_parallel_size > 1 else 0
            return min(both, formed * element) + copied if self.is_cpu else both
        bucket = min(REDUCE_BUCKET, self.parameters) if self.is_cpu else REDUCE_BUCKET
        gathered = min(max(self.parameters - self.persistent - formed, 0), LIVE_PARAMETERS)
        gathered *= self.data_parallel_size > 1
        return (bucket + gathered) * element + sent * (2 if self.is_cpu else 1)  # joined; gloo clones that

    def afterwards(self) -> Iterator[Memory]:
        """Yield what is held after the last backward pass: reducing gradients, stepping, gathering weights."""
        reduced = self.in_backward(self.parameters, is_first=False)
        buffers = reduced.buffers
        if self.zero_stage == 0 or self._has_fp32_gradients:  # flattened, also by a single replica, which sends nothing
            buffers = min(self.parameters, ALL_REDUCE_BUCKET) * (FP32 if self._has_fp32_gradients else self.element)
        elif self.zero_stage == 1 and self.is_cpu:  # large gradients are summed where they lie
            buffers = min(self.parameters, IN_PLACE_ELEMENTS) * self.element
        yield Memory(reduced.weights, reduced.gradients, reduced.optimizer, buffers=buffers)
        if self.zero_stage in (1, 2) and not self._has_fp32_gradients:  # a partition's gradients, and joined
            yield Memory(self.weights, 2 * FP32 * self.share, self.optimizer)
        if self.zero_stage in (1, 2) and self.data_parallel_size > 1 and self.is_cpu:
            bucket = ALL_REDUCE_BUCKET if self.zero_stage == 1 else REDUCE_BUCKET
            sent = min(self.parameters, bucket) * self.element
            kept = FP32 * self.parameters * self._has_fp32_gradients
            yield Memory(self.weights, kept, self.optimizer, buffers=2 * sent)


class Moment(NamedTuple):
    """A layer's turn in the backward pass of one micro-batch on one rank."""

    kept: int
    """Bytes still kept for this and the layers before it."""
    working: int
    """Bytes that exist beside them while it runs."""
    formed: int
    """Parameters whose gradients the layers behind it have formed."""


class InFlight(NamedTuple):
    """The micro-batches of one stage that are between their forward and their backward pass."""

    count: int
    travelling: int
    """Bytes of one that were received or wait to have been sent."""
    turns: tuple[Moment, ...]
    """Of one in its backward pass."""

    @property
    def kept(self) -> int:
        """Bytes one keeps before its backward pass."""
        return self.turns[0].kept


def _in_backward(states: States, parts: Sequence[InFlight], micro_batches: int) -> Iterator[Memory]:
    """Yield what a rank holds at the moments of the backward passes of its stages, all others in flight waiting."""
    travelling = sum(part.count * part.travelling for part in parts)
    total = sum(part.count * part.kept for part in parts)
    for part in parts:
        # Gradients of the step exist already, or, where all its micro-batches are in flight, from the second pass on.
        is_first = micro_batches == part.count
        passes = [(total, is_first)] + [(total - part.kept, False)] * (is_first and part.count > 1)
        for alive, first in passes:
            for turn in part.turns:
                held = states.in_backward(turn.formed, is_first=first)
                activations = alive - part.kept + turn.kept
                buffers = held.buffers + travelling
                yield Memory(held.weights, held.gradients, held.optimizer, activations, turn.working, buffers)


def fullest(states: States, parts: Sequence[InFlight], micro_batches: int) -> Memory:
    """Return what a rank holds at its fullest moment; `parts` are its stages, `micro_batches` those of a step."""
    moments = (*states.afterwards(), *_in_backward(states, parts, micro_batches))
    return max((_with_runtime(moment, states) for moment in moments), key=lambda moment: moment.total)


def _with_runtime(moment: Memory, states: States) -> Memory:
    """Add what the run time takes; the baseline of a CPU process (interpreter, torch, DeepSpeed) is not counted."""
    if states.is_cpu:
        return Memory(*moment[:-1], CPU_RUNTIME + CPU_HOOKS * (states.zero_stage == 3))
    slack = int(ALLOCATOR_SLACK * (moment.activations + moment.working))
    return Memory(*moment[:-1], GPU_RUNTIME + slack)
